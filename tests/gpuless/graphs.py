"""Runs the program on fake tensors as one of eight GPUs: its own training, calibration and
evaluation, in their order, at the real batch shapes.

    python tests/gpuless/graphs.py [--full] [--json] [SYSTEM...]

Prints the graphs that torch.compile makes on the way or, with --json, one line a system, all that
happened. Without --full the layout is a layer of each kind and of each way to pass through it.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import fake_cuda  # before torch
import traces

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from tracing import Watch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "systems")]

import train_gpt  # noqa: E402  (the paths come first)

SHORT = dict(
    train_gpt=dict(layout="G S"),
    baseline=dict(layout="A2"),
    gdn_hybrid=dict(layout="G S S=1"),
    kv_share=dict(layout="G2", ttt_freeze_blocks=1),
    pure_gdn=dict(layout="G S"),
    crawler=dict(layout="A (A G)x2"),
    transformer=dict(layout="A (A)x2 A", parallel_start_layer=2, ttt_freeze_blocks=1),
    hybrid_1895=dict(layout="G (A)x2 A", parallel_start_layer=2),
)
RANKS, RANK = 8, 1  # not the first, which also writes files
STEPS = 6  # of training
DOCUMENT = 150  # tokens of validation text: three chunks of a stream
TOKENS = 1024 * DOCUMENT  # two documents for each row of each rank's stream


def text(length: int) -> torch.Tensor:
    """Documents of DOCUMENT tokens, and somewhere many short ones: windows that overlap there have
    more documents than others."""
    i = torch.arange(length)
    begins = (i % DOCUMENT == 0) | (i // 2048 == 5) & (i % 20 == 0)
    return torch.where(begins, train_gpt.BOS_ID, 0)


class Stream:
    """Training data without end."""

    paths, shards = (), []

    def __len__(self) -> int:
        return 1 << 40

    def read(self, start: int, count: int) -> torch.Tensor:
        return text(count)

    def most_documents(self, span: int) -> int:
        return span // DOCUMENT


def copied(_, x: torch.Tensor, memo: dict) -> torch.Tensor:
    if id(x) not in memo:
        copy = x.detach().clone()
        memo[id(x)] = nn.Parameter(copy) if isinstance(x, nn.Parameter) else copy
    return memo[id(x)]


class Run:
    """One system, run on fake tensors; `watch` has what happened."""

    def __init__(self, name: str, full: bool):
        self.watch, self.module = Watch(), importlib.import_module(name)
        short = {} if full else SHORT[name]
        settings = dict(iterations=STEPS, warmup_steps=2, max_wallclock_seconds=0.0)
        self.hp = self.module.Hyperparameters(**settings, gptq_calibration_batches=1, **short)
        self.hp.validate()

    def replace(self, owner, name: str, function) -> None:
        """Until the run ends. function: gets the original, then its arguments."""
        original = getattr(owner, name)

        def instead(*args, **kwargs):
            return function(original, *args, **kwargs)

        self.patches.enter_context(mock.patch.object(owner, name, instead))

    def phase(self, owner, name: str, label=None) -> None:
        """Its calls are a phase of this name, or of the one that label(*args) gives."""

        def run(original, *args, **kwargs):
            with self.watch.phase(label(*args) if label else name):
                self.watch.note("mark", "begin")
                return original(*args, **kwargs)

        self.replace(owner, name, run)

    def mark(self, owner, name: str, label) -> None:
        def run(original, *args, **kwargs):
            self.watch.note("mark", label(*args, **kwargs))
            return original(*args, **kwargs)

        self.replace(owner, name, run)

    def compile(self, original, model, **settings) -> None:
        self.watch.note("mark", f"compile {settings}")
        original(model, backend=self.watch.compiler.backend, **settings)

    def new_model(self, *_, **changes) -> tuple[train_gpt.GPT, train_gpt.Hyperparameters]:
        with train_gpt.world.device:
            hp = dataclasses.replace(self.hp, **changes)
            return self.module.GPT(hp), hp

    def rounded(self, original, W, H, bits, clip_sigmas) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of GPTQ, which waits for each column."""
        scale = (clip_sigmas * W.std(dim=1) / 2 ** (bits - 1)).half()
        return (W / scale.float()[:, None]).round().to(torch.int8), scale

    def with_values(self, original, *args):
        """The function of a real text of that length."""
        with _disable_current_modes():
            real = [text(len(x)) if isinstance(x, FakeTensor) else x for x in args]
            return original(*real)

    def write_scores(self, _, hp, model, validation, nats) -> None:
        tokens = validation.tokens[: train_gpt.SAMPLE_TOKENS]
        if hp.ttt:  # as the original
            train_gpt.score(model, tokens, train_gpt.final_plan(tokens, hp))

    def prepare(self) -> None:
        """What takes the place of a GPU, of values and of files; and what is to be told apart."""
        watch, t, GPT = self.watch, train_gpt, self.module.GPT
        self.replace(nn.Module, "compile", self.compile)
        self.patches.enter_context(watch.tolists())
        self.replace(FakeTensor, "__deepcopy__", copied)  # the original corrupts the heap
        self.replace(torch.Tensor, "pin_memory", lambda _, x: x)
        self.replace(torch.cuda, "synchronize", lambda _: watch.note("wait", "synchronize"))
        self.replace(t, "fingerprint", lambda *_: "")
        self.replace(t, "load_artifact", self.new_model)
        self.replace(t, "gptq_quantize", self.rounded)
        self.replace(t, "stream_plan", self.with_values)
        self.replace(t, "reserve", self.with_values)
        self.replace(t, "write_scores", self.write_scores)
        if hasattr(GPT, "set_frequent"):  # counts values
            self.replace(GPT, "set_frequent", lambda *_: None)
        self.mark(GPT, "__call__", lambda *_: "forward")
        self.mark(GPT, "set_progress", lambda _, progress: f"progress {progress:.2f}")
        for name in "train", "warm_up", "collect_hessians", "evaluate", "write_scores":
            self.phase(t, name)
        self.phase(t, "validate", lambda model, validation, plan, label, *_: label)
        if hasattr(self.module, "parts"):
            self.phase(self.module.parts.SgdTTT, "learn")  # a chunk

    def go(self) -> None:
        """As main, from the model on. What needs a file or values is left out."""
        with contextlib.ExitStack() as self.patches:
            self.prepare()
            self.patches.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            self.patches.enter_context(self.watch)
            tokens = torch.zeros(TOKENS, dtype=torch.long, device=train_gpt.world.device)
            starts, one = [*range(0, TOKENS, DOCUMENT)], np.ones(1)
            validation = SimpleNamespace(
                tokens=tokens, starts=starts, paths=[], bytes=TOKENS, text_bytes=one
            )
            audit, hp, (model, _) = train_gpt.Audit(), self.hp, self.new_model()
            self.parameters = [
                (model.kinds[name], *p.shape) for name, p in model.named_parameters()
            ]
            train_gpt.train(hp, model, Stream(), validation, audit)
            plan = train_gpt.window_plan(tokens, hp, hp.eval_seq_len)
            train_gpt.validate(model, validation, plan, "behind training")  # as pack does
            train_gpt.evaluate(hp, self.module.GPT, validation, audit)
            with self.watch.phase("one row"):  # of a stream
                few, hp = tokens[: 2 * RANKS * DOCUMENT], dataclasses.replace(hp, eval_rows=1)
                train_gpt.score(model, few, train_gpt.stream_plan(few, hp))


def trace(name: str, full: bool) -> dict:
    """What happened, as `traces.trace` hands it on."""
    torch._dynamo.reset()
    run = Run(name, full)
    run.go()
    return dict(
        system=name,
        layout=run.hp.layout,
        parameters=run.parameters,
        events=[event._asdict() for event in run.watch.events],
    )


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("systems", nargs="*", default=traces.SYSTEMS)
    arguments.add_argument("--full", action="store_true")
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()
    fake_cuda.pretend(train_gpt.world, RANKS, RANK)
    dist.init_process_group("fake", rank=RANK, world_size=RANKS, store=FakeStore())
    if not options.json:
        print("\n".join(traces.HEAD))
    for name in options.systems:
        result = trace(name, options.full)
        rows = [json.dumps(result)] if options.json else traces.table(result)
        print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
