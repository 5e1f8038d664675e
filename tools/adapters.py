"""What is learned while scoring: by adapters in the record's way and others, by phases of SGD.

    python tools/adapters.py ARTIFACT...
    python tools/adapters.py --phases ARTIFACT...  # of a text of 100,000 tokens and more

Each artifact is scored as a stream, with its settings or those of the environment, as DATA_PATH or
EVAL_ROWS. A line: bits per byte, what learning gains, and its time, in streams without learning.

A step of AdamW moves each entry of B by the rate, and so an output by about half of STEP, the rate
times alpha, whatever rank and width are: the entries of A are uniform up to the root of 1 / width.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "systems"), str(ROOT / "tools")]
import bench  # noqa: E402  (the paths come first)
import packed  # noqa: E402
import parts  # noqa: E402
import transformer  # noqa: E402

import train_gpt as t  # noqa: E402

STEP = t.Hyperparameters.ttt_lora_lr * t.Hyperparameters.ttt_lora_alpha


class TwiceTTT(t.LoraTTT):
    """A second step on each chunk."""

    def read(self, tokens: Tensor, plan: t.Plan):
        hook = self.model.register_forward_pre_hook(self.remember)
        result = super().read(tokens, plan)
        hook.remove()
        return result

    def remember(self, model, inputs: tuple) -> None:
        self.inputs = inputs

    def after_step(self, step: Tensor, nats: Tensor, scored: Tensor, share: float) -> None:
        self.scored = scored
        super().after_step(step, nats, scored, share)

    def update(self, optimizer) -> None:
        super().update(optimizer)
        nats, _ = self.model(*self.inputs)
        means = (nats * self.scored).sum(1) / self.scored.sum(1).clamp(min=1)  # [rows]
        means.sum().backward()
        super().update(optimizer)


class ColdTTT(t.LoraTTT):
    """A and the moments start again with each document, as B does; their count of steps goes on, so
    that a document's first steps are up to ten times as large."""

    def new_adapters(self, rows: int) -> dict:
        adapters = super().new_adapters(rows)
        self.starts = {A: A.detach().clone() for A, _, _ in adapters.values()}
        return adapters

    @torch.no_grad()
    def after_step(self, step: Tensor, nats: Tensor, scored: Tensor, share: float) -> None:
        super().after_step(step, nats, scored, share)
        ended = self.tokens[step[:, 1]] == t.BOS_ID
        for A, start in self.starts.items():
            A[ended] = start[ended]
        for state in self.adamw.state.values():
            state["exp_avg"][ended] = state["exp_avg_sq"][ended] = 0.0


class SomeTTT(t.LoraTTT):
    """Adapters on some of the matrices."""

    part = ""  # of their names

    def new_adapters(self, rows: int) -> dict:
        names = {module: name for name, module in self.model.named_modules()}
        adapters = super().new_adapters(rows).items()
        return {linear: own for linear, own in adapters if self.part in names[linear]}


class MlpTTT(SomeTTT):
    part = ".mlp."


class MixerTTT(SomeTTT):
    part = ".mixer."


class SgdPhases(transformer.PhasedTTT):
    """Without adapters."""

    read_segment = parts.SgdTTT.read_segment


class Orthogonal:
    """#1148: the gradient of a matrix is orthogonalised before SGD."""

    def update(self, optimizer) -> None:
        for p in self.weights if optimizer is self.sgd else ():
            if p.ndim == 2:
                p.grad = t.polar_express(p.grad).float()
        super().update(optimizer)


class OrthogonalPhases(Orthogonal, SgdPhases):
    pass


class OrthogonalPhasedTTT(Orthogonal, transformer.PhasedTTT):
    pass


WAYS = {  # the step, in STEP; other hyperparameters; the learner
    "as the record": (1, {}, t.LoraTTT),
    "step x3": (3, {}, t.LoraTTT),
    "step x10": (10, {}, t.LoraTTT),
    "step x30": (30, {}, t.LoraTTT),
    "step x10, rank 8": (10, dict(ttt_lora_rank=8), t.LoraTTT),
    "step x10, alpha 16": (10, dict(ttt_lora_alpha=16.0), t.LoraTTT),
    "step x10, chunks of 32": (10, dict(eval_chunk=32), t.LoraTTT),
    "step x10, chunks of 128": (10, dict(eval_chunk=128), t.LoraTTT),
    "step x10, two a chunk": (10, {}, TwiceTTT),
    "step x10, MLPs alone": (10, {}, MlpTTT),
    "step x10, mixers alone": (10, {}, MixerTTT),
    "step x10, A starts again": (10, {}, ColdTTT),
}
PHASED = dict(ttt_phases=3, ttt_freeze_blocks=0)
SGD = PHASED | dict(ttt_lr=0.003)  # the best of 0.001 to 0.1
ORTHOGONAL = PHASED | dict(ttt_lr=0.0003)  # the best of 0.0001 to 0.01
PHASES = {
    "adapters": (10, {}, t.LoraTTT),
    "SGD": (0, SGD, SgdPhases),
    "orthogonal SGD": (0, ORTHOGONAL, OrthogonalPhases),
    "adapters, SGD": (10, SGD, transformer.PhasedTTT),
    "adapters, orthogonal SGD": (10, ORTHOGONAL, OrthogonalPhasedTTT),
}


class Scored:
    """An artifact and its text. Raises: ValueError, of which Refused is one, OSError."""

    def __init__(self, path: Path):
        self.module = bench.module_of(json.loads(packed.unpack(path).text)["system"])
        classes = self.module.Hyperparameters, self.module.GPT
        self.model, self.saved = t.load_artifact(path, "cpu", *classes)
        self.validation = getattr(self.module, "Validation", t.Validation)(self.settings())

    def settings(self, **changes):
        """Those of the artifact, then of the environment, then changes, which may be a system's."""
        hp = self.module.Hyperparameters.from_env(os.environ, self.saved)
        vars(hp).update(dict(eval_mode="stream", eval_seconds=0.0) | changes)
        return hp

    def score(self, hp, learner=None) -> tuple[float, float]:
        """Bits per byte, seconds."""
        tokens = self.validation.tokens
        plan = t.reserve(self.model, tokens, t.final_plan(tokens, hp))
        found = t.validate(self.model, self.validation, plan, "adapters", learner)
        return found["val_bpb"], found["seconds"]

    def learned(self, step: float, changes: dict, learner) -> tuple[float, float]:
        hp = self.settings(ttt="lora", **changes)
        hp.ttt_lora_lr = step * STEP / hp.ttt_lora_alpha
        hp.ttt_chunk_tokens = 2 * hp.train_seq_len  # of a step of SGD
        return self.score(hp, learner(self.model, hp))


def measure(path: Path, ways: dict) -> None:
    """A line for each way. Raises: as Scored."""
    scored = Scored(path)
    plain, seconds = scored.score(scored.settings())
    print(path.name)
    print(f"  {'without learning':<28}{plain:>10.5f}{0:>10.5f}{1:>8.1f}", flush=True)
    for way, how in ways.items():
        bpb, took = scored.learned(*how)
        print(f"  {way:<28}{bpb:>10.5f}{plain - bpb:>10.5f}{took / seconds:>8.1f}", flush=True)


def main() -> int | str:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT")
    parser.add_argument("--phases", action="store_true")
    args = parser.parse_args()
    print(f"{'':<30}{'bits/byte':>10}{'gain':>10}{'time':>8}")
    try:
        for path in args.artifacts:
            measure(path, PHASES if args.phases else WAYS)
    except (OSError, ValueError) as error:
        return f"adapters: error: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
