"""Scores with memory and scores that learn, against loops that do neither in batches.

stream            every document alone, in one forward without memory, in float64
TTT=sgd           window after window or document after document; the steps of SGD written out
TTT=lora          one row after the other, its adapters added to the weights; AdamW written out
causality         bit for bit, whatever the text is rewritten to
score first       no gradient reaches a target before it has its score
time              with a clock of our own

Ranks run in lockstep: each until it has something to reduce, then all get the result.
"""

import copy
import math
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from corpus import BOS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import GPT, Hyperparameters, Learner, Linear, reading_plan, score, scorer

SMALL = dict(layout="G S", model_dim=16, mlp_mult=1.0, gdn_head_dim=8, head_dim=8, ngram_dim=8, train_seq_len=16,
             eval_seq_len=32, eval_stride=8, window_size=12, eval_chunk=8, eval_rows=4, val_batch_size=32,
             eval_seconds=0.0, ttt_chunk_tokens=32, ttt_lr=0.05, ttt_epochs=2, ttt_freeze_blocks=1, ttt_lora_lr=0.01,
             ttt_lora_rank=2, ttt_lora_alpha=3.0)
MODES = {  # stride, ttt, phases
    "stream": (0, "", 0), "sliding_sgd": (8, "sgd", 0), "sliding_sgd_phases": (8, "sgd", 2),
    "stream_sgd": (0, "sgd", 0), "stream_sgd_phases": (0, "sgd", 2),
    "stream_lora": (0, "lora", 0), "stream_lora_phases": (0, "lora", 2),
}


@pytest.fixture
def small(tiny):
    """small(**overrides) -> Hyperparameters of a model of two blocks, with test-time training strong enough to see."""
    return lambda **overrides: tiny(**(SMALL | overrides))


def chunk_of(hp) -> int:
    """Tokens of a step of SGD: whole rows."""
    return hp.ttt_chunk_tokens // hp.train_seq_len * hp.train_seq_len


@pytest.fixture
def exact(monkeypatch):
    """All arithmetic in float64: what differs from the truth by more than its rounding is wrong."""
    monkeypatch.setattr(train_gpt, "COMPUTE_DTYPE", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def text_of(*lengths: int, seed: int = 0, end: bool = False) -> torch.Tensor:
    """Documents of random tokens, of these lengths with their BOS; `end`: and the BOS of one that is not there."""
    tokens = torch.randint(2, 64, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    tokens[[sum(lengths[:i]) for i in range(len(lengths))]] = BOS
    return torch.cat((tokens, torch.tensor([BOS]))) if end else tokens


def documents_of(tokens: torch.Tensor) -> list[tuple[int, int]]:
    """(first, end) of the targets of each document: target i is token i + 1, so its BOS is in none but the last's."""
    n = len(tokens) - 1
    starts = [i for i in range(n) if i == 0 or tokens[i] == BOS]
    return list(zip(starts, [*starts[1:], n], strict=True))


def windows_of(n: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, first): reads start .. end-1, scores first .. end-1."""
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
    return torch.cat([nats_by_hand(model, tokens[a:b], tokens[a + 1 : b + 1]) for a, b in documents_of(tokens)])


def spied(model, before=lambda *_: None, after=lambda *_: None):
    """The scorer of a model; before(x, y) and after(x, y, nats) see every call."""
    nats_of = scorer(model)

    def spy(x, y, *memory):
        before(x, y)
        out = nats_of(x, y, *memory)
        after(x, y, out)
        return out

    spy.model = model
    return spy


def fields_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


REDUCTIONS = dict(SUM=lambda x: x.sum(0), MIN=lambda x: x.amin(0), MAX=lambda x: x.amax(0))


def in_lockstep(monkeypatch, world_size: int, run) -> list:
    """[run() of each rank]: one rank at a time runs to its next all_reduce; when all are there, all get the sum.

    run() must not share weights with another rank's.
    """
    turn, back = [threading.Semaphore(0) for _ in range(world_size)], threading.Semaphore(0)
    posted, results, errors, over = {}, {}, {}, threading.Event()
    mine = threading.local()

    def all_reduce(x, op=train_gpt.dist.ReduceOp.SUM):
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

    monkeypatch.setattr(train_gpt, "WORLD_SIZE", world_size)
    monkeypatch.setattr(train_gpt, "all_reduce", all_reduce)
    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    try:
        while len(results) < world_size:
            posted.clear()
            for rank in range(world_size):
                monkeypatch.setattr(train_gpt, "RANK", rank)
                turn[rank].release()
                back.acquire()
                if rank in errors:
                    raise errors[rank]
            assert len(posted) in (0, world_size), f"ranks {sorted(posted)} wait for ranks that are done"
            kinds = {(tuple(x.shape), x.dtype, str(op).split(".")[-1]) for x, op in posted.values()}
            assert len(kinds) < 2, "ranks reduce different things"
            for _, dtype, op in kinds:
                whole = REDUCTIONS[op](torch.stack([x.clone() for x, _ in posted.values()])).to(dtype)
                for x, _ in posted.values():
                    x.copy_(whole)
    finally:
        over.set()
        for semaphore in turn:
            semaphore.release()
        for thread in threads:
            thread.join()
    return [results[rank] for rank in range(world_size)]


# -----------------------------------------------------------------------------
# stream: memory


LENGTHS = (1, 2, 1, 7, 8, 3, 4, 41, 2, 64, 5)  # 7 and 8, 3 and 4: a chunk and one more; the last ends inside a chunk


def check_stream(hp, model, tokens) -> torch.Tensor:
    nats, count = score(scorer(model), tokens, hp, 0)
    assert nats.dtype == torch.float64 and count.dtype == torch.int32
    assert count.tolist() == [1] * (len(tokens) - 1)
    torch.testing.assert_close(nats, each_document_alone(model, tokens), rtol=0, atol=1e-9)
    return nats


@pytest.mark.parametrize("chunk", [1, 3, 7, 64, 300], ids="chunk_{}".format)
@pytest.mark.parametrize("layout", ["G2 S G S=2", "G S", "S2", "G4", "A G"])
def test_a_stream_is_each_document_alone(tiny, lively, exact, layout, chunk):
    """And so the forward over the whole text, in which BOS keeps documents apart."""
    hp = tiny(layout=layout, eval_chunk=chunk, eval_rows=3)
    model, tokens = lively(GPT(hp)), text_of(*LENGTHS)
    nats = check_stream(hp, model, tokens)
    with torch.no_grad():
        whole = nats_by_hand(model, tokens[:-1], tokens[1:])
    torch.testing.assert_close(nats, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("parts", [
    dict(ngram_vocab_size=0), dict(smear_dims=0), dict(ngram_vocab_size=0, smear_dims=0), dict(window_size=1),
    dict(window_size=1, layout="S2"),
    dict(layout="G (S g)x2 S", unet_skips=True, inst_dim=4), dict(layout="S G S~0 G~1 A", attn_gate_dims=4, xsa=False),
    dict(layout="A S G", parallel_start_layer=1, ln_scale=True, allow_neg_eigval=True),
], ids=lambda parts: "_".join(parts))
def test_every_part_has_its_memory(tiny, lively, exact, parts):
    hp = tiny(eval_chunk=3, eval_rows=4, **parts)
    check_stream(hp, lively(GPT(hp)), text_of(*LENGTHS))


@pytest.mark.parametrize("rows", [1, 2, 5, 40], ids="rows_{}".format)
@pytest.mark.parametrize("cut", [0, 1, 3, 5], ids="cut_{}".format)
def test_a_stream_of_any_rows_ends_anywhere(small, lively, exact, rows, cut):
    """In a chunk, behind one, in a document of one token, in the BOS of the next document."""
    hp = small(eval_chunk=4, eval_rows=rows)
    tokens = text_of(*LENGTHS, end=True)
    check_stream(hp, lively(GPT(hp)), tokens[: len(tokens) - cut])


@pytest.mark.parametrize("tokens", [[5, 6], [BOS, 6], [BOS, BOS], [5, BOS], [BOS] * 9, [5, 6, 7, BOS, 5, 6, 7, 8, 9]],
                         ids=str)
def test_streams_of_few_tokens(small, lively, exact, tokens):
    """The first token begins a document, whatever it is; the last begins none."""
    hp = small(eval_chunk=3, eval_rows=2)
    check_stream(hp, lively(GPT(hp)), torch.tensor(tokens))


@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_streams_of_any_documents(small, lively, exact, data):
    chunk, rows = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, 3 * chunk + 1), min_size=2, max_size=9))
    tokens = text_of(*lengths, seed=chunk, end=data.draw(st.booleans()))
    tokens = tokens if data.draw(st.booleans()) else torch.cat((torch.tensor([7]), tokens))
    torch.manual_seed(1)
    hp = small(eval_chunk=chunk, eval_rows=rows)
    check_stream(hp, lively(GPT(hp)), tokens)


def test_full_attention_remembers_the_context_of_training(small, lively, exact):
    """EVAL_SEQ_LEN - 1 tokens before each chunk: without the parts that look back further, what can be seen is what a
    forward over just these tokens sees."""
    hp = small(layout="A", ngram_vocab_size=0, smear_dims=0, eval_seq_len=10, eval_chunk=4)
    model, tokens = lively(GPT(hp)), text_of(23, 9, 17)
    expected = []
    for a, b in documents_of(tokens):
        for t in range(a, b):
            seen = tokens[max(a, t - (t - a) % 4 - 9) : t + 1]
            with torch.no_grad():
                expected.append(nats_by_hand(model, seen, torch.cat((seen[1:], tokens[t + 1 : t + 2])))[-1])
    torch.testing.assert_close(score(scorer(model), tokens, hp, 0)[0], torch.stack(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("world_size", [2, 3, 8], ids="ranks_{}".format)
def test_ranks_share_the_documents(small, lively, exact, monkeypatch, world_size):
    """On 8 ranks of 2 rows some rows have none. All ranks make equally many steps: a forward may reduce."""
    hp = small(eval_chunk=4, eval_rows=2)
    model, tokens, calls = lively(GPT(hp)), text_of(*LENGTHS), []

    def run():
        calls.append(0)
        rank = train_gpt.RANK

        def call(x, y):
            assert x.shape == y.shape == (2, 4)
            calls[rank] += 1

        return score(spied(copy.deepcopy(model), call), tokens, hp, 0)

    for nats, count in in_lockstep(monkeypatch, world_size, run):
        assert count.tolist() == [1] * (len(tokens) - 1)
        torch.testing.assert_close(nats, each_document_alone(model, tokens), rtol=0, atol=1e-9)
    assert len(set(calls)) == 1
    least = max(-(-64 // 4), math.ceil(sum(-(-n // 4) for n in LENGTHS) / (2 * world_size)))
    assert least <= calls[0] <= least + 64 // 4, "rows are not balanced"


# -----------------------------------------------------------------------------
# the order of reading


def check_plan(plans: list[list], tokens, hp, segment: int) -> None:
    """plans: of each rank."""
    docs, scored = documents_of(tokens), []
    spans = sorted({a // segment for a, _ in docs})
    assert len({len(plan) for plan in plans}) == 1
    busy = [i for i in range(len(plans[0])) if any((torch.as_tensor(plan[i][0]) > 0).any() for plan in plans)]
    for index, span in zip(busy, spans, strict=True):  # there may be plans for spans in which nothing begins
        inside = [(a, b) for a, b in docs if a // segment == span]
        steps = torch.cat([torch.as_tensor(plan[index][0]) for plan in plans], 1).tolist()
        assert {plan[index][1] for plan in plans} == {inside[-1][1]}
        assert len({len(plan[index][0]) for plan in plans}) == 1
        owner = {}
        for row, reads in enumerate(zip(*steps, strict=True)):
            reads = [tuple(read) for read in reads]
            busy = [read for read in reads if read != (0, 0, 0)]
            assert reads[: len(busy)] == busy, "a row pauses"
            rest = list(busy)
            for a, b in inside:
                parts = [(c, min(c + hp.eval_chunk, b), c) for c in range(a, b, hp.eval_chunk)]
                if parts[0] in rest:
                    assert rest[: len(parts)] == parts, "a document is not read from left to right, in chunks"
                    rest, owner[a] = rest[len(parts) :], row
            assert not rest
            scored += [target for a, b, _ in busy for target in range(a, b)]
        load = [0] * len(steps[0])
        for a, b in inside:
            assert load[owner[a]] == min(load), "not the row that has least to read"
            load[owner[a]] += -(-(b - a) // hp.eval_chunk)
        assert len(steps) == max(load), "steps in which nobody reads"
    assert sorted(scored) == list(range(len(tokens) - 1))


@pytest.mark.parametrize("segment", [1000, 50, 9], ids="segment_{}".format)
@pytest.mark.parametrize("world_size", [1, 2, 3], ids="ranks_{}".format)
@pytest.mark.parametrize("chunk", [1, 4, 500], ids="chunk_{}".format)
def test_documents_go_to_the_row_with_least_to_read(small, monkeypatch, chunk, world_size, segment):
    hp, tokens, plans = small(eval_chunk=chunk, eval_rows=2), text_of(*LENGTHS, *LENGTHS[::-1]), []
    monkeypatch.setattr(train_gpt, "WORLD_SIZE", world_size)
    for rank in range(world_size):
        monkeypatch.setattr(train_gpt, "RANK", rank)
        plans.append(list(reading_plan(tokens, hp, 0, segment)))
    check_plan(plans, tokens, hp, segment)


# -----------------------------------------------------------------------------
# TTT=sgd


class SlowSGD:
    """The steps of #1734 on the weights of `model`, in place: for each row, then for each parameter."""

    def __init__(self, model, tokens, hp):
        self.model, self.tokens, self.hp, self.steps = model, tokens, hp, 0
        frozen = tuple(f"blocks.{i}." for i in range(hp.ttt_freeze_blocks))
        self.trained = [p for name, p in model.named_parameters() if not name.startswith(frozen)]
        self.momentum = [torch.zeros_like(p) for p in self.trained]

    def learn(self, chunk: int, horizon: int, epochs: int) -> None:
        C, L = chunk_of(self.hp), self.hp.train_seq_len
        for _ in range(epochs):
            loss = 0.0
            for start in range(chunk * C, (chunk + 1) * C, L):
                x, y = self.tokens[start : start + L], self.tokens[start + 1 : start + L + 1]
                loss = loss + nats_by_hand(self.model, x, y).sum() / C
            grads = torch.autograd.grad(loss, self.trained)
            norm = math.sqrt(sum((grad**2).sum().item() for grad in grads))
            lr = self.hp.ttt_lr * (1 + math.cos(math.pi * chunk * C / horizon)) / 2
            with torch.no_grad():
                for p, grad, buffer in zip(self.trained, grads, self.momentum, strict=True):
                    buffer.mul_(0.9).add_(grad * min(1.0, 1.0 / (norm + 1e-6)))
                    p.sub_(lr * buffer)
            self.steps += 1


def passes(before: int, after: int, n: int, phases: int) -> bool:
    """Is there a k/(P+1) of the text that `after` targets reach and `before` did not?"""
    return any(before * (phases + 1) < k * n <= after * (phases + 1) for k in range(1, phases + 1))


def learn_slowly(model, tokens, hp, stride: int) -> tuple[torch.Tensor, int]:
    """The scores with TTT=sgd, and how many steps were made."""
    sgd, n, C = SlowSGD(copy.deepcopy(model), tokens, hp), len(tokens) - 1, chunk_of(hp)
    pieces = windows_of(n, hp.eval_seq_len, stride) if stride else [(a, b, a) for a, b in documents_of(tokens)]
    nats, scored, trained = torch.zeros(n), 0, 0
    spans = sorted({first // hp.ttt_chunk_tokens for _, _, first in pieces})
    for span in spans:
        before = scored
        for start, scored, first in [piece for piece in pieces if piece[2] // hp.ttt_chunk_tokens == span]:
            with torch.no_grad():
                out = nats_by_hand(sgd.model, tokens[start:scored], tokens[start + 1 : scored + 1])
            nats[first:scored] = out[first - start :]
        if span == spans[-1]:
            break
        while (trained + 1) * C <= scored:
            sgd.learn(trained, n, hp.ttt_epochs)
            trained += 1
        if passes(before, scored, n, hp.ttt_phases):
            for chunk in range(scored // C):
                sgd.learn(chunk, scored, 1)
    return nats, sgd.steps


TEXT = (3, 40, 1, 9, 30, 22, 12, 2, 25, 8)  # 152 tokens


def check_sgd(hp, model, tokens, stride: int) -> None:
    before, counted = fields_of(model), []
    nats, count = score(spied(model, lambda *_: counted.append(torch.is_grad_enabled())), tokens, hp, stride, "sgd")
    expected, steps = learn_slowly(model, tokens, hp, stride)
    assert count.tolist() == [1] * (len(tokens) - 1)
    torch.testing.assert_close(nats, expected, rtol=0, atol=1e-9)
    plain, _ = score(scorer(model), tokens, hp, stride)
    assert steps == 0 or (nats - plain).abs().max() > 1e-2, "learning changes too little to be compared"
    assert not counted[-1], "something is learned that nothing is scored with"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.lora is None for module in model.modules() if isinstance(module, Linear))


@pytest.mark.parametrize("phases", [0, 1, 2], ids="phases_{}".format)
@pytest.mark.parametrize("stride", [32, 8, 5, 0], ids="stride_{}".format)
def test_sgd_learns_from_each_chunk_that_is_scored(small, lively, exact, stride, phases):
    hp = small(ttt_phases=phases, eval_mode="sliding" if stride else "stream", ttt="sgd")
    check_sgd(hp, lively(GPT(hp)), text_of(*TEXT), stride)


@pytest.mark.parametrize("overrides", [
    dict(ttt_epochs=1), dict(ttt_epochs=3), dict(ttt_freeze_blocks=0), dict(ttt_freeze_blocks=3, layout="G2 S G S=2"),
    dict(ttt_freeze_blocks=2), dict(ttt_lr=0.5), dict(ttt_chunk_tokens=16), dict(ttt_chunk_tokens=47),
    dict(train_seq_len=4), dict(train_seq_len=32), dict(ttt_chunk_tokens=128), dict(ttt_chunk_tokens=512),
    dict(eval_chunk=1), dict(val_batch_size=8, eval_rows=1), dict(layout="s9 g S", ttt_freeze_blocks=2, ttt_epochs=1),
], ids=lambda overrides: "_".join(f"{k}_{v}" for k, v in overrides.items()))
@pytest.mark.parametrize("stride", [8, 0], ids=["sliding", "stream"])
def test_sgd_of_any_size(small, lively, exact, stride, overrides):
    """ttt_chunk_tokens_128, 512: one chunk, none. A frozen mixer that a later block uses too stays as it is; blocks 0
    and 1 are not block 10."""
    hp = small(**overrides)
    check_sgd(hp, lively(GPT(hp)), text_of(*TEXT), stride)


@pytest.mark.parametrize("lengths", [(150,), (1, 120, 30), (32, 32, 32, 32), (33, 31, 33, 31), (31, 1, 32, 1, 64, 3)],
                         ids=str)
def test_sgd_where_documents_end_at_or_span_several_chunks(small, lively, exact, lengths):
    """With three quarters of the text at once, and with quarters of exactly a chunk."""
    hp = small(ttt_phases=3)
    check_sgd(hp, lively(GPT(hp)), text_of(*lengths), 0)
    check_sgd(hp, lively(GPT(hp)), text_of(*lengths, end=True), 0)


@pytest.mark.parametrize("mode", ["sliding_sgd", "sliding_sgd_phases", "stream_sgd", "stream_sgd_phases"])
@pytest.mark.parametrize("world_size", [2, 3], ids="ranks_{}".format)
def test_ranks_average_their_gradients(small, lively, exact, monkeypatch, world_size, mode):
    stride, ttt, phases = MODES[mode]
    hp = small(ttt_phases=phases, train_seq_len=8, ttt_chunk_tokens=48)
    model, tokens = lively(GPT(hp)), text_of(*TEXT)
    expected, _ = learn_slowly(model, tokens, hp, stride)
    for nats, count in in_lockstep(monkeypatch, world_size,
                                   lambda: score(scorer(copy.deepcopy(model)), tokens, hp, stride, ttt)):
        assert count.tolist() == [1] * (len(tokens) - 1)
        torch.testing.assert_close(nats, expected, rtol=0, atol=1e-9)


# -----------------------------------------------------------------------------
# TTT=lora


def test_an_adapter_belongs_to_its_row():
    layer, x = Linear(5, 3), torch.randn(4, 6, 5)
    torch.nn.init.normal_(layer.weight)
    A, B = torch.randn(4, 2, 5), torch.randn(4, 3, 2)
    layer.lora = (A, B, 0.7)
    for b in range(4):
        for t in range(6):
            own = layer.weight @ x[b, t]
            torch.testing.assert_close(layer(x)[b, t], own + 0.7 * (B[b] @ (A[b] @ x[b, t])), rtol=1e-5, atol=1e-5)
    layer.lora = None
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


def adapters_at_the_start(model, run) -> dict[str, tuple]:
    """run(nats_of); lora of every Linear as the first forward finds it, by name."""
    found = {}

    def look(*_):
        for name, module in model.named_modules():
            if isinstance(module, Linear) and name not in found:
                A, B, scale = module.lora
                found[name] = (A.detach().clone(), B.detach().clone(), float(scale))

    return run(spied(model, look)), found


class SlowRow:
    """One row of documents with adapters of its own: AdamW written out, the adapters added to the weights."""

    def __init__(self, model, hp, A: dict[str, torch.Tensor], scale: float):
        self.model, self.hp, self.scale, self.t = model, hp, scale, 0
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
        self.params = {(name, "A"): A[name].clone() for name in layers}
        self.params |= {(name, "B"): torch.zeros(m.weight.shape[0], hp.ttt_lora_rank) for name, m in layers.items()}
        self.squares = {key: torch.zeros_like(p) for key, p in self.params.items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """Of each module its own: the embedding shares the matrix of the head, not its adapter."""
        found = {f"{name}.{key}".lstrip("."): p.detach() for name, module in self.model.named_modules()
                 for key, p in module.named_parameters(recurse=False)}
        for name, which in self.params:
            if which == "A":
                update = self.params[name, "B"] @ self.params[name, "A"]
                found[f"{name}.weight"] = found[f"{name}.weight"] + self.scale * update
        return found

    def read(self, x, y, memory) -> torch.Tensor:
        """Scores a chunk with the adapters as they are, then one step on its mean."""
        for p in self.params.values():
            p.requires_grad_()
        logits = torch.func.functional_call(self.model, self.weights(), (x[None], memory), tie_weights=False)[0]
        nats = logits.logsumexp(-1) - logits[torch.arange(len(y)), y]
        self.update(dict(zip(self.params, torch.autograd.grad(nats.mean(), list(self.params.values())), strict=True)))
        return nats.detach()

    def update(self, grads: dict) -> None:
        """No gradients: a step in which this row has nothing to read."""
        self.t += 1
        lr, wd = self.hp.ttt_lora_lr, self.hp.ttt_lora_wd
        for key, p in self.params.items():
            grad, p = grads.get(key, torch.zeros_like(p)), p.detach()
            self.squares[key] = 0.99 * self.squares[key] + 0.01 * grad**2
            root = (self.squares[key] / (1 - 0.99**self.t)).sqrt()
            self.params[key] = p * (1 - lr * wd) - lr * grad / (root + 1e-10)

    def restart(self) -> None:
        """A segment has ended: AdamW begins anew."""
        self.t, self.squares = 0, {key: torch.zeros_like(p) for key, p in self.squares.items()}

    def forget(self) -> None:
        """A document has ended. A and what AdamW knows stay."""
        for name, which in self.params:
            if which == "B":
                self.params[name, which] = torch.zeros_like(self.params[name, which])


def learn_row_by_row(model, tokens, hp, adapters: list[dict], plans: list[list]) -> torch.Tensor:
    """The scores with TTT=lora. adapters, plans: of each rank; see test_documents_go_to_the_row_with_least_to_read."""
    model, n, C = copy.deepcopy(model), len(tokens) - 1, chunk_of(hp)
    sgd, nats, scored, docs = SlowSGD(model, tokens, hp), torch.full((n,), torch.nan), 0, dict(documents_of(tokens))
    ends = set(docs.values())
    rows = [(rank, row, SlowRow(model, hp, {name: A[row] for name, (A, _, _) in found.items()},
                                hp.ttt_lora_alpha / hp.ttt_lora_rank))
            for rank, found in enumerate(adapters) for row in range(len(next(iter(found.values()))[0]))]
    for segment in range(len(plans[0])):
        before, scored = scored, plans[0][segment][1]
        for rank, row, slow in rows:
            memory = None
            for start, end, _ in torch.as_tensor(plans[rank][segment][0])[:, row].tolist():
                if end > start:
                    memory = model.new_memory(1) if start in docs else memory
                    nats[start:end] = slow.read(tokens[start:end], tokens[start + 1 : end + 1], memory)
                    if end in ends:
                        slow.forget()
                else:
                    slow.update({})
            slow.restart()
        if scored < n and passes(before, scored, n, hp.ttt_phases):
            for chunk in range(scored // C):
                sgd.learn(chunk, scored, 1)
    return nats


def plan_of(tokens, hp) -> list:
    """In P + 1 segments."""
    return list(reading_plan(tokens, hp, 0, -(-(len(tokens) - 1) // (hp.ttt_phases + 1))))


def check_lora(hp, model, tokens) -> None:
    before = fields_of(model)
    (nats, count), found = adapters_at_the_start(model, lambda nats_of: score(nats_of, tokens, hp, 0, "lora"))
    assert count.tolist() == [1] * (len(tokens) - 1)
    expected = learn_row_by_row(model, tokens, hp, [found], [plan_of(tokens, hp)])
    torch.testing.assert_close(nats, expected, rtol=0, atol=1e-6)
    plain = score(scorer(model), tokens, hp, 0)[0]
    assert (nats - plain).abs().max() > 1e-2, "learning changes too little to be compared"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.lora is None for module in model.modules() if isinstance(module, Linear))


@pytest.mark.parametrize("overrides", [
    {}, dict(layout="G2 S G S=2", eval_rows=2), dict(layout="A G G~1"), dict(eval_chunk=3, eval_rows=3),
    dict(eval_rows=1), dict(eval_rows=20), dict(ttt_lora_wd=0.0), dict(ttt_lora_wd=20.0),
    dict(ttt_lora_rank=1), dict(ttt_lora_alpha=0.5), dict(seed=5), dict(ttt_phases=1), dict(ttt_phases=2),
    dict(ttt_phases=3, ttt_chunk_tokens=16, ttt_lora_wd=20.0, eval_rows=8),
], ids=lambda overrides: "_".join(f"{k}_{v}" for k, v in overrides.items()) or "default")
def test_lora_is_a_row_of_documents_after_the_other(small, lively, exact, overrides):
    hp = small(ttt="lora", eval_mode="stream", **overrides)
    check_lora(hp, lively(GPT(hp)), text_of(*TEXT))


@pytest.mark.parametrize("phases", [0, 2], ids="phases_{}".format)
@pytest.mark.parametrize("world_size", [2, 3], ids="ranks_{}".format)
def test_ranks_have_rows_of_their_own(small, lively, exact, monkeypatch, world_size, phases):
    hp = small(ttt_phases=phases, train_seq_len=8, ttt_chunk_tokens=48, eval_rows=2)
    model, tokens = lively(GPT(hp)), text_of(*TEXT)

    def run():
        own = copy.deepcopy(model)
        (nats, count), found = adapters_at_the_start(own, lambda nats_of: score(nats_of, tokens, hp, 0, "lora"))
        return nats, count, found, plan_of(tokens, hp)

    results = in_lockstep(monkeypatch, world_size, run)
    expected = learn_row_by_row(model, tokens, hp, [found for _, _, found, _ in results],
                                [plan for _, _, _, plan in results])
    for nats, count, _, _ in results:
        assert count.tolist() == [1] * (len(tokens) - 1)
        torch.testing.assert_close(nats, expected, rtol=0, atol=1e-6)


def test_adapters_start_as_nothing_on_every_linear(small, lively):
    """Also on one that two blocks share, once. Seeded, and not by what torch happens to be at."""
    hp = small(layout="G2 S G S=2", ttt_lora_rank=4, ttt_lora_alpha=6.0, eval_rows=3)
    model, tokens = lively(GPT(hp)), text_of(20, 20, 20, 20)

    def start(hp):
        torch.rand(3)
        return adapters_at_the_start(model, lambda nats_of: score(nats_of, tokens, hp, 0, "lora"))[1]

    found = start(hp)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    assert set(found) == set(layers) and "blocks.4.mixer.q_proj" not in found
    for name, (A, B, scale) in found.items():
        n_out, n_in = layers[name].weight.shape
        assert A.shape == (3, 4, n_in) and B.shape == (3, n_out, 4) and scale == 1.5
        assert not B.any()
        bound = n_in**-0.5
        assert A.abs().max() <= bound and A.max() > 0.8 * bound and A.min() < -0.8 * bound
        assert abs(A.std() / (bound / 3**0.5) - 1) < 0.2
    again, other = start(hp), start(small(**{**vars(hp), "seed": 2}))
    assert all(torch.equal(found[name][0], again[name][0]) for name in found)
    assert not any(torch.equal(found[name][0], other[name][0]) for name in found)


@pytest.mark.parametrize("chunk, rows", [(8, 1), (8, 4), (3, 2)], ids=str)
def test_the_first_chunk_of_a_document_is_scored_as_without_learning(small, lively, chunk, rows):
    """To the last bit: adapters of the document before have no part in it. The second chunk is another matter."""
    hp = small(eval_chunk=chunk, eval_rows=rows, ttt_lora_lr=0.05)
    model, tokens = lively(GPT(hp)), text_of(*TEXT)
    plain, nats = (score(scorer(model), tokens, hp, 0, ttt)[0] for ttt in ("", "lora"))
    for a, b in documents_of(tokens):
        assert torch.equal(plain[a : min(b, a + chunk)], nats[a : min(b, a + chunk)])
        assert b <= a + chunk or (plain != nats)[a + chunk : b].any()


def test_a_row_learns_nothing_from_another(small, lively):
    """Rewrite all documents of the other rows: not a bit of this one's scores changes."""
    hp = small()
    model, tokens = lively(GPT(hp)), text_of(*TEXT)
    (steps, _), = plan_of(tokens, hp)
    nats = score(scorer(model), tokens, hp, 0, "lora")[0]
    for row in range(4):
        own = [t for start, end, _ in torch.as_tensor(steps)[:, row].tolist() for t in range(start, end)]
        other = text_of(*TEXT, seed=1)
        other[[*own, -1]] = tokens[[*own, -1]]
        rewritten = score(scorer(model), other, hp, 0, "lora")[0]
        assert len(own) > 20 and torch.equal(nats[own], rewritten[own])
        assert (nats != rewritten).sum() > 50


# -----------------------------------------------------------------------------
# causality


def rewritten(tokens, k: int, how: str, generator) -> torch.Tensor:
    """Other tokens from k on: of other words, without documents, or of many."""
    other = tokens.clone()
    words = torch.randint(2, 64, (len(tokens) - k,), generator=generator)
    if how == "words":
        words[tokens[k:] == BOS] = BOS
    elif how == "documents":
        words[torch.rand(len(words), generator=generator) < 0.3] = BOS
    other[k:] = words
    if how == "documents":
        other[k] = BOS
    return other


@pytest.mark.parametrize("rows", [1, 4], ids="rows_{}".format)
@pytest.mark.parametrize("mode", MODES)
def test_no_score_depends_on_what_follows(small, lively, mode, rows):
    """To the last bit, at the borders of chunks, windows, documents and segments and beside them."""
    stride, ttt, phases = MODES[mode]
    hp = small(ttt_phases=phases, val_batch_size=32 * rows, eval_rows=rows, ttt_epochs=1, ngram_vocab_size=0)
    model, tokens = lively(GPT(hp)), text_of(5, 27, 33, 1, 21, 9, 12)
    nats, generator = score(scorer(model), tokens, hp, stride, ttt)[0], torch.Generator().manual_seed(1)
    ks = [1, 6, 32, 33, 36, 37, 65, 66, 72, 97, 107]
    for i, k in enumerate(ks):
        how = ("words", "none", "documents")[(i + rows) % 3]
        other = score(scorer(model), rewritten(tokens, k, how, generator), hp, stride, ttt)[0]
        assert torch.equal(nats[: k - 1], other[: k - 1]), (k, how)
        assert (nats[k - 1 :] != other[k - 1 :]).any()


@given(data=st.data(), mode=st.sampled_from([*MODES]), how=st.sampled_from(
    ["words", "none", "documents"]))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_score_depends_on_what_follows_in_any_text(small, lively, mode, how, data):
    stride, ttt, phases = MODES[mode]
    chunk, rows = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    hp = small(ttt_phases=phases, eval_chunk=chunk, val_batch_size=16 * rows, eval_rows=rows, eval_seq_len=16,
               ttt_epochs=1, train_seq_len=8, ttt_chunk_tokens=data.draw(st.sampled_from([8, 16, 24])))
    tokens = text_of(*data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=6)), seed=chunk, end=True)
    torch.manual_seed(1)
    model, k = lively(GPT(hp)), data.draw(st.integers(1, len(tokens) - 1))
    other = rewritten(tokens, k, how, torch.Generator().manual_seed(k))
    nats, others = (score(scorer(model), text, hp, stride, ttt)[0] for text in (tokens, other))
    assert torch.equal(nats[: k - 1], others[: k - 1])


# -----------------------------------------------------------------------------
# score first


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "stream"])
def test_no_gradient_reaches_a_target_before_it_has_its_score(small, lively, mode):
    """Each score is one that a forward gave before the first gradient on its target. No two tokens are equal."""
    stride, ttt, phases = MODES[mode]
    hp = small(ttt_phases=phases, vocab_size=300)
    model, tokens = lively(GPT(hp)), 2 + torch.randperm(250)
    tokens[[0, 3, 50, 61, 120, 130, 190]] = BOS
    place, seen, trained = {t: i for i, t in enumerate(tokens.tolist())}, {}, set()

    def target(x, y) -> int:
        return place[y] - 1 if y != BOS else place[x]

    def after(x, y, out):
        targets = [target(*pair) for pair in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)
                   if pair != (BOS, BOS)]
        assert len(targets) == out.numel()
        for t, value in zip(targets, out.detach().flatten().double().tolist(), strict=True):
            if t not in trained:
                seen.setdefault(t, set()).add(value)
        if out.requires_grad:
            out.register_hook(lambda grad: trained.update(
                t for t, g in zip(targets, grad.flatten().tolist(), strict=True) if g))

    nats, _ = score(spied(model, after=after), tokens, hp, stride, ttt)
    assert len(trained) > 100, "something was learned"
    for t, value in enumerate(nats.tolist()):
        assert value in seen[t], f"target {t} was learned before it had its score"


@pytest.mark.parametrize("mode", [mode for mode in MODES if "sgd" in mode or mode == "stream_lora_phases"])
def test_learning_what_is_not_scored_is_an_error(small, lively, monkeypatch, mode):
    stride, ttt, phases = MODES[mode]
    hp, end_segment = small(ttt_phases=phases), Learner.end_segment
    model, tokens = lively(GPT(hp)), text_of(*TEXT)
    monkeypatch.setattr(Learner, "end_segment", lambda self, end: end_segment(self, min(end + 96, len(tokens) - 2)))
    with pytest.raises(RuntimeError, match="scored"):
        score(scorer(model), tokens, hp, stride, ttt)


# -----------------------------------------------------------------------------
# time


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(**vars(time) | dict(perf_counter=lambda: clock.now)))
    return clock


def slow_scorer(model, clock, forward: float, backward: float):
    """Each forward and each backward pass takes its time."""

    def after(x, y, out):
        clock.now += forward
        if out.requires_grad:
            out.register_hook(lambda grad: setattr(clock, "now", clock.now + backward))

    return spied(model, after=after)


TTT_MODES = [mode for mode in MODES if mode != "stream"]


@pytest.mark.parametrize("rows", [1, 4], ids="rows_{}".format)
@pytest.mark.parametrize("mode", TTT_MODES)
def test_without_time_nothing_is_learned(small, lively, mode, rows):
    """To the last bit. In a segment rows begin anew: of several, other ones read, which costs some rounding."""
    stride, ttt, phases = MODES[mode]
    hp = small(ttt_phases=phases, eval_seconds=1e-9, val_batch_size=32 * rows, eval_rows=rows)
    model, tokens = lively(GPT(hp)), text_of(*TEXT)
    nats, count = score(scorer(model), tokens, hp, stride, ttt)
    plain, _ = score(scorer(model), tokens, hp, stride)
    if rows > 1 and mode != "stream_lora":
        torch.testing.assert_close(nats, plain, rtol=0, atol=1e-5)
    else:
        assert torch.equal(nats, plain)
    assert count.tolist() == [1] * (len(tokens) - 1)


@pytest.mark.parametrize("backward", [3.0, 20.0], ids="backward_{:g}".format)
@pytest.mark.parametrize("mode", TTT_MODES)
def test_learning_leaves_time_to_score_the_rest(small, lively, clock, mode, backward):
    """Half of what learning everything takes, and more than scoring alone."""
    stride, ttt, phases = MODES[mode]
    hp = small(ttt_phases=phases, eval_rows=1)
    model, tokens = lively(GPT(hp)), text_of(*TEXT)

    def run(eval_seconds, ttt):
        start, hp.eval_seconds = clock.now, eval_seconds
        nats, count = score(slow_scorer(model, clock, 1.0, backward), tokens, hp, stride, ttt)
        assert count.tolist() == [1] * (len(tokens) - 1)
        return nats, clock.now - start

    plain, least = run(0.0, "")
    everything, most = run(0.0, ttt)
    budget = (least + most) / 2
    nats, seconds = run(budget, ttt)
    assert least < seconds <= budget < most
    assert (nats != plain).any() and (nats != everything).any()
    for a, b in documents_of(tokens) if mode == "stream_lora" else ():  # also where no time is left to learn
        assert torch.equal(plain[a : min(b, a + 8)], nats[a : min(b, a + 8)])


def learn_on_ranks(monkeypatch, model, tokens, hp, mode: str, speeds: list[float]) -> tuple[list[int], list[float]]:
    """How often each rank learned and how long it took, on clocks of their own: a forward takes a rank `speed`
    seconds, a backward pass twice that."""
    (stride, ttt, _), learned, times = MODES[mode], [0] * len(speeds), [0.0] * len(speeds)
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: times[train_gpt.RANK])

    def run():
        rank = train_gpt.RANK

        def learn(_):
            learned[rank] += 1
            times[rank] += 2 * speeds[rank]

        def after(x, y, out):
            times[rank] += speeds[rank]
            if out.requires_grad:
                out.register_hook(learn)

        return score(spied(copy.deepcopy(model), after=after), tokens, hp, stride, ttt)

    results = in_lockstep(monkeypatch, len(speeds), run)
    for nats, count in results:
        assert torch.equal(nats, results[0][0]) and count.tolist() == [1] * (len(tokens) - 1)
    return learned, times


@pytest.mark.parametrize("mode", TTT_MODES)
def test_ranks_stop_learning_together(small, lively, clock, monkeypatch, mode):
    """Each has a clock of its own: if one went by its own, the others would wait for its gradients."""
    hp = small(ttt_phases=MODES[mode][2], train_seq_len=8, eval_seconds=100.0, val_batch_size=8, eval_rows=1)
    learned, times = learn_on_ranks(monkeypatch, lively(GPT(hp)), text_of(*TEXT), hp, mode, [0.1, 2.0])
    assert learned[0] == learned[1] > 0
    assert times[1] <= hp.eval_seconds


@pytest.mark.parametrize("mode", ["sliding_sgd", "stream_lora"])
def test_ranks_go_by_the_slowest_and_not_by_their_sum(small, lively, clock, monkeypatch, mode):
    """In two and a half times what four ranks take for everything, they learn everything."""
    hp = small(train_seq_len=8, val_batch_size=8, eval_rows=1)
    model, tokens = lively(GPT(hp)), text_of(*TEXT)
    everything, times = learn_on_ranks(monkeypatch, model, tokens, hp, mode, [1.0] * 4)
    hp.eval_seconds = 2.5 * max(times)
    assert learn_on_ranks(monkeypatch, model, tokens, hp, mode, [1.0] * 4) == (everything, times)


# -----------------------------------------------------------------------------
# it learns


def test_repetitive_documents_are_learned(small, lively):
    """Each document repeats words of its own (for the adapters), all of them use a quarter of the vocabulary (SGD)."""
    hp = small(eval_chunk=16, eval_rows=2, ttt_epochs=2, ttt_lr=0.1)
    generator = torch.Generator().manual_seed(0)
    docs = []
    for _ in range(6):
        words = torch.randint(2, 18, (8,), generator=generator)
        docs += [torch.tensor([BOS]), words[torch.randint(0, 8, (99,), generator=generator)]]
    model, tokens = lively(GPT(hp)), torch.cat(docs)
    plain, sgd, lora = (score(scorer(model), tokens, hp, 0, ttt)[0].mean() for ttt in ("", "sgd", "lora"))
    assert sgd < plain - 0.1 and lora < plain - 0.1


# -----------------------------------------------------------------------------
# hyperparameters


@pytest.mark.parametrize("env, name", [
    (dict(EVAL_MODE="streaming"), "EVAL_MODE"), (dict(EVAL_MODE=""), "EVAL_MODE"), (dict(TTT="adam"), "TTT"),
    (dict(TTT="SGD"), "TTT"), (dict(EVAL_MODE="sliding"), "TTT"), (dict(TTT="lora", EVAL_MODE="sliding"), "TTT"),
    (dict(EVAL_CHUNK="0"), "EVAL_CHUNK"), (dict(EVAL_ROWS="0"), "EVAL_ROWS"),
    (dict(TTT="sgd", TTT_CHUNK_TOKENS="0"), "TTT_CHUNK_TOKENS"), (dict(TTT="sgd", TTT_EPOCHS="0"), "TTT_EPOCHS"),
], ids=str)
def test_what_cannot_be_scored_so_is_refused(env, name):
    with pytest.raises(ValueError, match=f"^{name}="):
        Hyperparameters.from_env(env)


@pytest.mark.parametrize("env", [
    {}, dict(EVAL_MODE="stream"), dict(TTT=""), dict(TTT="sgd", EVAL_MODE="sliding"), dict(TTT="", EVAL_MODE="sliding"),
], ids=str)
def test_what_can_be_scored_is_not_refused(env):
    Hyperparameters.from_env(env)


# -----------------------------------------------------------------------------
# the audit's probes on ranks


@pytest.mark.parametrize("stride", [0, 8], ids=["stream", "sliding"])
@pytest.mark.parametrize("world_size", [1, 2, 3], ids="ranks_{}".format)
@pytest.mark.parametrize("leaks", [False, True], ids=["isolated", "leaking"])
def test_a_document_that_runs_into_the_next_is_seen_on_all_ranks(small, lively, monkeypatch, world_size, stride, leaks):
    """Documents that follow each other lie on different ranks: each rank needs two of its own."""
    hp = small(layout="G", ngram_vocab_size=0, smear_dims=0)
    model, tokens = lively(GPT(hp)), text_of(*TEXT)
    if leaks:
        monkeypatch.setattr(train_gpt, "RESET_LOG_DECAY", 0.0)

    def run():
        own, found = copy.deepcopy(model), {}
        audit = SimpleNamespace(check=lambda name, passed, **_: found.setdefault(name, bool(passed)))
        nats = score(scorer(own), tokens, hp, stride)[0]
        train_gpt.probe(audit, hp, tokens, own, scorer(own), nats, stride)
        return found["isolation"]

    assert in_lockstep(monkeypatch, world_size, run) == [not leaks] * world_size
