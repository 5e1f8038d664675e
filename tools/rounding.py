"""What rounding loses at equal bytes: the record's way of it, and others.

    python tools/rounding.py ARTIFACT... [--bytes N]

Of each artifact ARTIFACT.trained.pt is read, packed in every way until artifact and code have as
many bytes, by default those that they have, and scored in windows that do not overlap, on the text
of the run or of DATA_PATH and TOKENIZER_PATH. A line: bits per byte more than before rounding.
"""

import argparse
import importlib
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "systems"), str(ROOT / "tools")]
import packed  # noqa: E402  (the paths come first)
import repack  # noqa: E402

import train_gpt as t  # noqa: E402
from train_gpt import gptq_quantize  # noqa: E402


def uncorrelated(name: str, H: torch.Tensor) -> torch.Tensor:
    """With it GPTQ rounds each value to the nearest."""
    return torch.eye(len(H)) * H.diagonal().mean()


def read_once(name: str, H: torch.Tensor) -> torch.Tensor:
    return H / 2 if name == "tok_emb.weight" else H


def by_row(W: torch.Tensor, H: torch.Tensor, bits, clip_sigmas: torch.Tensor):
    """Steps in proportion to the deviation of each row, instead of one for the tensor."""
    deviation = W.std(1)
    step = (clip_sigmas * deviation).min()  # of rows that are not clipped
    return gptq_quantize(W, H, bits, (step / deviation.square().mean().sqrt()).clamp(min=6.0))


WAYS = {  # what becomes of the Hessians, of gptq_quantize, of the hyperparameters
    "as the record": (lambda name, H: H, gptq_quantize, {}),
    "to the nearest": (uncorrelated, gptq_quantize, {}),
    "a step for each row": (lambda name, H: H, by_row, {}),
    "the embedding counted once": (read_once, gptq_quantize, {}),
    "8 bits for all": (lambda name, H: H, gptq_quantize, dict(matrix_bits=8, embed_bits=8)),
}


TEXT = "data_path", "tokenizer_path"


class Trained:
    """A model before rounding, its Hessians and its text."""

    def __init__(self, path: Path):
        state = packed.read_state(Path(f"{path}.trained.pt"))
        name = state["system"]
        self.module = t if name == "record" else importlib.import_module(name)
        known = self.module.Hyperparameters.__dataclass_fields__
        config = {key: value for key, value in state["config"].items() if key in known}
        config |= {key: os.environ.get(key.upper(), config[key]) for key in TEXT}
        self.hp = self.module.Hyperparameters(**config)
        self.model = self.module.GPT(self.hp)
        repack.restore(self.model, state["weights"], path)
        self.hessians, self.validation = state["hessians"], t.Validation(self.hp)

    def bits_per_byte(self, model: t.GPT) -> float:
        tokens, hp = self.validation.tokens, self.hp
        plan = t.reserve(model, tokens, t.window_plan(tokens, hp, hp.eval_seq_len))
        with torch.no_grad():
            return t.validate(model, self.validation, plan, "rounding")["val_bpb"]

    def loss_of(self, way: str, size: int) -> float:
        """Bits per byte of what is packed so, in a total of so many bytes."""
        hessian, gptq, changes = WAYS[way]
        hessians = {name: hessian(name, H) for name, H in self.hessians.items()}
        with tempfile.TemporaryDirectory() as folder:
            own = dict(artifact=f"{folder}/a.ptz", artifact_target_bytes=size)
            self.model.hp = hp = replace(self.hp, **own, **changes)
            with mock.patch.object(t, "gptq_quantize", gptq):
                t.fit(hp, self.model, hessians)
            classes = self.module.Hyperparameters, self.module.GPT
            return self.bits_per_byte(t.load_artifact(hp.artifact, "cpu", *classes)[0])


def measure(path: Path, size: int | None) -> None:
    """A line for each way. Raises: OSError, ValueError naming the file, ImportError."""
    trained = Trained(path)
    before = trained.bits_per_byte(trained.model)
    size = size or path.stat().st_size + sum(x.stat().st_size for x in t.code_files())
    print(path.name)
    for way in WAYS:
        after = trained.loss_of(way, size)
        figures = f"{size:>10,}{before:>9.4f}{after:>9.4f}{after - before:>10.5f}"
        print(f"  {way:<28}{figures}", flush=True)


def main() -> int | str:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT")
    parser.add_argument("--bytes", type=int, help="of each artifact with the code")
    args = parser.parse_args()
    print(f"{'':<30}{'bytes':>10}{'before':>9}{'after':>9}{'loss':>10}")
    try:
        for path in args.artifacts:
            measure(path, args.bytes)
    except (OSError, ValueError, ImportError) as error:
        return f"rounding: error: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
