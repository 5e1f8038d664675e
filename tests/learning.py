"""Test-time training at a small size, and written out: one document, one row, one parameter after
the other."""

import copy
import math
import re
from dataclasses import fields
from typing import NamedTuple

import torch
from conftest import TINY
from streams import documents_of, nats_by_hand, read_by_ranks, windows_of
from toys import is_plain, system

from train_gpt import Linear, final_plan, score

# strong enough to see
SMALL = dict(
    layout="G S",
    model_dim=16,
    mlp_mult=1.0,
    gdn_head_dim=8,
    head_dim=8,
    train_seq_len=16,
    window_size=12,
    eval_seq_len=32,
    eval_stride=8,
    eval_chunk=8,
    eval_rows=4,
    val_batch_size=32,
    eval_seconds=0.0,
    ttt_lora_lr=0.01,
    ttt_lora_rank=2,
    ttt_lora_alpha=3.0,
    ttt_lr=0.05,
    ttt_epochs=2,
    ttt_chunk_tokens=32,
    ttt_freeze_blocks=1,
    ttt_phases=2,
    ngram_vocab_size=64,
    ngram_dim=8,
    attn_gate_dims=4,
    parallel_start_layer=1,
)
TEXT = (3, 40, 1, 9, 30, 22, 12, 2, 25, 8)  # lengths of documents, 152 tokens


def small(name: str, **overrides):
    """Hyperparameters of a system with a model of two blocks; those of kv_share may have a layout
    that only the record's model, or that of systems/layouts.py, can have."""
    cls, richer = system(name).Hyperparameters, system("layouts").Hyperparameters
    own = {f.name for f in fields(cls)}
    settings = TINY | {k: v for k, v in SMALL.items() if k in own} | overrides
    if not is_plain(settings["layout"]) and not issubclass(cls, richer):
        cls = richer if issubclass(richer, cls) else type(cls.__name__, (cls, richer), {})
    return cls(**settings)


class Mode(NamedTuple):
    """A way of scoring: whose hyperparameters and whose model, the learner and its module."""

    hyperparameters: str
    model: str
    module: str
    learner: str | None
    settings: dict

    def small(self, **overrides):
        return small(self.hyperparameters, **(self.settings | overrides))

    def new_model(self, hp):
        plain = is_plain(hp.layout) or self.model != "train_gpt"
        return system(self.model if plain else "layouts").GPT(hp)

    def new_learner(self, model, hp):
        return self.learner and getattr(system(self.module), self.learner)(model, hp)

    def score(self, model, tokens, hp, learn: bool = True):
        learner, plan = self.new_learner(model, hp) if learn else None, final_plan(tokens, hp)
        return learner.score(tokens, plan) if learner else score(model, tokens, plan)


def plainly(mode: Mode, model, tokens, hp):
    """The scores without learning, to compare bits with: by the kernels that torch takes for
    weights that need no gradient, as those under adapters do not."""
    model.requires_grad_(mode.learner == "SgdTTT")
    try:
        return mode.score(model, tokens, hp, learn=False)
    finally:
        model.requires_grad_(True)


STREAM, SLIDING = dict(eval_mode="stream"), dict(eval_mode="sliding")
RECORD, SGD = ("train_gpt", "train_gpt", "train_gpt"), ("kv_share", "train_gpt", "parts")
MODES = {
    "sliding": Mode(*RECORD, None, SLIDING),
    "stream": Mode(*RECORD, None, STREAM),
    "stream_lora": Mode(*RECORD, "LoraTTT", STREAM | dict(ttt="lora")),
    "stream_lora_phases": Mode(
        "transformer", "transformer", "transformer", "PhasedTTT", STREAM | dict(ttt="lora")
    ),
    "sliding_sgd": Mode(*SGD, "SgdTTT", SLIDING | dict(ttt="sgd")),
    "stream_sgd": Mode(*SGD, "SgdTTT", STREAM | dict(ttt="sgd")),
    "sliding_sgd_shared": Mode(
        "kv_share", "kv_share", "parts", "SgdTTT", SLIDING | dict(ttt="sgd", layout="G2")
    ),
}
MLPS = Mode(  # full attention sees whole documents
    *("hybrid_1895", "hybrid_1895", "hybrid_1895", "MlpTTT"),
    STREAM
    | dict(ttt="sgd", layout="G A2", eval_seq_len=64, rope_dims=4)
    | dict(parallel_start_layer=2),
)
LEARNING = [mode for mode in MODES if MODES[mode].learner]


def chunk_of(hp) -> int:
    """Tokens of a step of SGD: whole rows, and one at least."""
    return max(1, hp.ttt_chunk_tokens // hp.train_seq_len) * hp.train_seq_len


def learns(name: str, hp) -> bool:
    """Whether SGD trains this parameter: of hybrid_1895 MLPs, else all but the first blocks."""
    if hp.system == "hybrid_1895":
        return bool(re.fullmatch(r"blocks\.\d+\.mlp(_scale|\.(up|down)_proj\.weight)", name))
    return not name.startswith(tuple(f"blocks.{i}." for i in range(hp.ttt_freeze_blocks)))


class SlowSGD:
    """The steps of #1734 on the weights of `model`, in place: for each row, then for each
    parameter."""

    def __init__(self, model, tokens, hp):
        self.model, self.tokens, self.hp, self.steps = model, tokens, hp, 0
        self.trained = [p for name, p in model.named_parameters() if learns(name, hp)]
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
                    buffer.mul_(0.9).add_(self.direction(grad * min(1.0, 1.0 / (norm + 1e-6))))
                    p.sub_(lr * buffer)
            self.steps += 1

    def direction(self, grad):
        return grad


def learn_slowly(model, tokens, hp) -> tuple[torch.Tensor, int]:
    """The scores with SgdTTT, and how many steps were made: whenever another TTT_CHUNK_TOKENS
    targets are scored, on the whole chunks that nothing was learned from yet."""
    sgd, n, C = SlowSGD(copy.deepcopy(model), tokens, hp), len(tokens) - 1, chunk_of(hp)
    pieces = [(a, b, a) for a, b in documents_of(tokens)]
    if hp.eval_mode == "sliding":
        pieces = windows_of(n, hp.eval_seq_len, hp.eval_stride)
    nats, trained = torch.zeros(n), 0
    spans = sorted({first // hp.ttt_chunk_tokens for _, _, first in pieces})
    for span in spans:
        for start, end, first in pieces:
            if first // hp.ttt_chunk_tokens == span:
                with torch.no_grad():
                    out = nats_by_hand(sgd.model, tokens[start:end], tokens[start + 1 : end + 1])
                nats[first:end], scored = out[first - start :], end
        while span != spans[-1] and (trained + 1) * C <= scored:
            sgd.learn(trained, n, hp.ttt_epochs)
            trained += 1
    return nats, sgd.steps


class SlowRow:
    """One row of documents with adapters of its own: AdamW written out, the adapters added to the
    weights."""

    def __init__(self, model, hp, A: dict[str, torch.Tensor]):
        self.model, self.hp, self.t = model, hp, 0
        layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
        self.params = {(name, "A"): A[name].clone() for name in layers}
        for name, m in layers.items():
            self.params[name, "B"] = torch.zeros(m.weight.shape[0], hp.ttt_lora_rank)
        self.squares = {key: torch.zeros_like(p) for key, p in self.params.items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """Of each module its own: the embedding shares the matrix of the head, not its adapter."""
        found = {
            f"{name}.{key}".lstrip("."): p.detach()
            for name, module in self.model.named_modules()
            for key, p in module.named_parameters(recurse=False)
        }
        scale = self.hp.ttt_lora_alpha / self.hp.ttt_lora_rank
        for name, which in self.params:
            if which == "A":
                update = self.params[name, "B"] @ self.params[name, "A"]
                found[f"{name}.weight"] = found[f"{name}.weight"] + scale * update
        return found

    def read(self, x, y, cache):
        """Scores a chunk with the adapters as they are, then one step on its mean. Returns the nats
        and the cache behind the chunk."""
        for p in self.params.values():
            p.requires_grad_()
        logits, cache = torch.func.functional_call(
            self.model, self.weights(), (x[None], None, cache), tie_weights=False
        )
        nats = logits[0].logsumexp(-1) - logits[0][torch.arange(len(y)), y]
        grads = torch.autograd.grad(nats.mean(), list(self.params.values()))
        self.update(dict(zip(self.params, grads, strict=True)))
        return nats.detach(), cache

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


def segments_of(tokens, hp, size: int = 1) -> list:
    """The documents that begin in the same of TTT_PHASES + 1 equal parts of the text, or in all of
    it: what each rank's rows read, and where their targets end."""
    n, phases = len(tokens) - 1, getattr(hp, "ttt_phases", 0)
    part, found = math.ceil(n / (phases + 1)), []
    for number in range(phases + 1):
        docs = [(a, b) for a, b in documents_of(tokens) if a // part == number]
        if docs:
            found.append((read_by_ranks(docs, hp.eval_chunk, hp.eval_rows, size), docs[-1][1]))
    return found


def learn_row_by_row(model, tokens, hp, adapters: list[dict]):
    """The scores with LoraTTT; or with PhasedTTT: after each segment but the last, a step of SGD on
    each whole chunk of all that is scored; and how many steps of SGD that were. adapters: A of each
    Linear for the rows of each rank."""
    model, n, docs = copy.deepcopy(model), len(tokens) - 1, dict(documents_of(tokens))
    sgd = SlowSGD(model, tokens, hp) if hasattr(hp, "ttt_phases") else None
    nats, ends = torch.full((n,), torch.nan), set(docs.values())
    rows = [
        (rank, row, SlowRow(model, hp, {name: A[row] for name, A in found.items()}))
        for rank, found in enumerate(adapters)
        for row in range(len(next(iter(found.values()))))
    ]
    for ranks, scored in segments_of(tokens, hp, len(adapters)):
        for rank, row, slow in rows:
            cache = None
            for start, end in ranks[rank][row]:
                if end > start:
                    cache = model.new_cache(1) if start in docs else cache
                    x, y = tokens[start:end], tokens[start + 1 : end + 1]
                    nats[start:end], cache = slow.read(x, y, cache)
                    if end in ends:
                        slow.forget()
                else:
                    slow.update({})
            slow.restart()
        for chunk in range(scored // chunk_of(hp) if sgd and scored < n else 0):
            sgd.learn(chunk, scored, 1)
    return nats, sgd.steps if sgd else 0
