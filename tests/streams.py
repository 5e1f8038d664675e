"""What tests of scoring share: texts of random documents, losses that are watched, float64, ranks.

Ranks run in lockstep: each until it has something to reduce, then all get the result.
"""

import threading

import torch
from corpus import BOS

from train_gpt import dist, world


def text_of(*lengths: int, seed: int = 0, end: bool = False) -> torch.Tensor:
    """Documents of random tokens, of these lengths with their BOS; `end`: and one BOS more."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 64, (sum(lengths),), generator=generator)
    tokens[[sum(lengths[:i]) for i in range(len(lengths))]] = BOS
    return torch.cat((tokens, torch.tensor([BOS]))) if end else tokens


def documents_of(tokens: torch.Tensor) -> list[tuple[int, int]]:
    """(first, end) of the targets of each document: target i is token i + 1, so that the BOS of a
    document is a target of the one before."""
    n = len(tokens) - 1
    starts = [i for i in range(n) if i == 0 or tokens[i] == BOS]
    return list(zip(starts, [*starts[1:], n], strict=True))


def count_documents(doc: torch.Tensor) -> int:
    """doc: [B, T] numbers of documents; each row begins one."""
    return len(doc) + (doc[:, 1:] != doc[:, :-1]).sum().item()


def read_by_ranks(docs, chunk: int, rows: int, size: int) -> list[list[list[tuple[int, int]]]]:
    """What each row of each rank reads in each step, (start, end) or (0, 0): a document in chunks,
    in the first of all rows that has least to read."""
    loads = [[] for _ in range(rows * size)]
    for a, b in docs:
        min(loads, key=len).extend((c, min(c + chunk, b)) for c in range(a, b, chunk))
    steps = max(map(len, loads))
    loads = [load + [(0, 0)] * (steps - len(load)) for load in loads]
    return [loads[rank * rows : (rank + 1) * rows] for rank in range(size)]


def windows_of(n: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, first): reads start .. end - 1, scores first .. end - 1."""
    found, first, end = [], 0, min(seq_len, n)
    while first < n:
        found.append((max(0, end - seq_len), end, first))
        first, end = end, min(end + stride, n)
    return found


def nats_by_hand(model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of one row, [T]."""
    logits = model(x[None])[0]
    return logits.logsumexp(-1) - logits[torch.arange(len(y)), y]


@torch.no_grad()
def each_document_alone(model, tokens: torch.Tensor) -> torch.Tensor:
    parts = [(tokens[a:b], tokens[a + 1 : b + 1]) for a, b in documents_of(tokens)]
    return torch.cat([nats_by_hand(model, *part) for part in parts])


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def stands_for_a_model(function):
    """Gives a function of x, y and a cache what `score` asks of a model besides."""
    function.most_documents, function.reach = {}, 3
    function.new_cache = lambda rows: [rows]
    return function


class Spied:
    """A model that is watched: before(x, y) and after(x, y, nats) see every call."""

    def __init__(self, model, before=lambda *_: None, after=lambda *_: None):
        self.model, self.before, self.after = model, before, after

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, x, y, cache=None):
        self.before(x, y)
        out = self.model(x, y, cache)
        self.after(x, y, out if cache is None else out[0])
        return out

    def passes(self, x, y):
        yield self(x, y)


def all_in_float64(monkeypatch):
    """All arithmetic in float64, for a fixture to yield from: what differs from the truth by more
    than its rounding is wrong."""
    monkeypatch.setattr(world, "dtype", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


REDUCTIONS = dict(SUM=lambda x: x.sum(0), MIN=lambda x: x.amin(0), MAX=lambda x: x.amax(0))


def in_lockstep(monkeypatch, size: int, run) -> list:
    """[run() of each rank]: one rank at a time runs to its next all_reduce; when all are there,
    all get the result. run() must not share weights with another rank's."""
    turn, back = [threading.Semaphore(0) for _ in range(size)], threading.Semaphore(0)
    posted, results, errors, over = {}, {}, {}, threading.Event()
    mine = threading.local()

    def all_reduce(x, op=dist.ReduceOp.SUM):
        posted[mine.rank] = (x, op)
        back.release()
        turn[mine.rank].acquire()
        if over.is_set():
            raise SystemExit
        return x

    def rank_main(rank):
        torch.set_num_threads(1)
        mine.rank = rank
        turn[rank].acquire()
        try:
            results[rank] = run()
        except BaseException as error:  # told by the main thread
            errors[rank] = error
        back.release()

    def all_gather_object(told, own):  # what is wrong, which nothing is here
        told[:] = [own] * len(told)

    monkeypatch.setattr(world, "size", size)
    monkeypatch.setattr(world, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    threads = [threading.Thread(target=rank_main, args=(i,), daemon=True) for i in range(size)]
    for thread in threads:
        thread.start()
    try:
        while len(results) < size:
            posted.clear()
            for rank in range(size):
                monkeypatch.setattr(world, "rank", rank)
                turn[rank].release()
                back.acquire()
                if rank in errors:
                    raise errors[rank]
            assert len(posted) in (0, size), f"ranks {sorted(posted)} wait for ranks that are done"
            kinds = {(tuple(x.shape), x.dtype, str(op).split(".")[-1]) for x, op in posted.values()}
            assert len(kinds) < 2, "ranks reduce different things"
            for _, dtype, op in kinds:
                whole = REDUCTIONS[op](torch.stack([x.clone() for x, _ in posted.values()]))
                for x, _ in posted.values():
                    x.copy_(whole.to(dtype))
    finally:
        over.set()
        for semaphore in turn:
            semaphore.release()
        for thread in threads:
            thread.join()
    return [results[rank] for rank in range(size)]
