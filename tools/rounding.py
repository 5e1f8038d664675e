"""What rounding loses at equal bytes: the record's way of it, and others.

    python tools/rounding.py ARTIFACT... [--bytes N]

Of each artifact ARTIFACT.trained.pt is read, packed in every way into as many bytes, by default
those of the artifact, and scored in windows that do not overlap, on the text of the run or of
DATA_PATH and TOKENIZER_PATH. A line: bytes reached, bits per byte before and after, and the loss.
"""

import argparse
import copy
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "systems"), str(ROOT / "tools")]
import bench  # noqa: E402  (the paths come first)
import hybrid_1895  # noqa: E402
import packed  # noqa: E402
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
    step = (clip_sigmas * deviation).median()  # which most rows have, those that are not clipped
    return gptq_quantize(W, H, bits, (step / deviation.square().mean().sqrt()).clamp(min=6.0))


TEXT = "data_path", "tokenizer_path"


class Trained:
    """A model before rounding, its Hessians and its text."""

    def __init__(self, path: Path):
        state = packed.read_state(Path(f"{path}.trained.pt"), "system", "config", "figures")
        self.module = bench.module_of(state["system"])
        known = self.module.Hyperparameters.__dataclass_fields__
        config = {key: value for key, value in state["config"].items() if key in known}
        config |= {key: os.environ.get(key.upper(), config[key]) for key in TEXT}
        self.hp = self.module.Hyperparameters(**config)
        self.model = self.module.GPT(self.hp)
        repack.restore(self.model, state["weights"], path)
        self.hessians, self.figures = state["hessians"], state["figures"]
        self.validation = getattr(self.module, "Validation", t.Validation)(self.hp)

    def bits_per_byte(self, model: t.GPT) -> float:
        tokens, hp = self.validation.tokens, self.hp
        plan = t.reserve(model, tokens, t.window_plan(tokens, hp, hp.eval_seq_len))
        with torch.no_grad():
            return t.validate(model, self.validation, plan, "rounding")["val_bpb"]

    def batches(self, count: int) -> list:
        """Of the text behind the training, as the run's own calibration."""
        hp = self.hp
        calibrated = hp.gptq_calibration_batches * hp.train_batch_tokens
        stream = t.TokenStream(hp.data_path, "train", hp.vocab_size)
        loader = t.TrainLoader(stream, hp, self.figures["tokens_read"] - calibrated)
        return [loader.next() for _ in range(count * hp.micro_steps())]

    def packed(self, size: int, hessians=None, model=None, gptq=gptq_quantize, **changes) -> t.GPT:
        """The model of an artifact of so many bytes."""
        model, hessians = model or self.model, hessians or self.hessians
        with tempfile.TemporaryDirectory() as folder:
            code = sum(path.stat().st_size for path in t.code_files())  # of this process
            own = dict(artifact=f"{folder}/a.ptz", artifact_target_bytes=size + code)
            model.hp = hp = replace(self.hp, **own, **changes)
            with mock.patch.object(t, "gptq_quantize", gptq):
                t.fit(hp, model, hessians)
            self.reached = Path(hp.artifact).stat().st_size
            classes = self.module.Hyperparameters, self.module.GPT
            return t.load_artifact(hp.artifact, "cpu", *classes)[0]


# --- Ways: each gives the rounded model of so many bytes ------------------------------------------


def with_hessians(change):
    """change: name and Hessian to another Hessian."""

    def way(x: Trained, size: int) -> t.GPT:
        return x.packed(size, {name: change(name, H) for name, H in x.hessians.items()})

    return way


def calibrated_longer(x: Trained, size: int) -> t.GPT:
    batches = x.batches(4 * x.hp.gptq_calibration_batches)
    return x.packed(size, t.collect_hessians(x.model, batches))


def calibrated_rounded(x: Trained, size: int) -> t.GPT:
    """By the inputs that each matrix has in the rounded model, as when block after block is rounded
    and calibrated (arXiv:2210.17323)."""
    batches = x.batches(x.hp.gptq_calibration_batches)
    return x.packed(size, t.collect_hessians(x.packed(size), batches))


@torch.no_grad()
def values_rotated(x: Trained, size: int) -> t.GPT:
    """By a Hadamard matrix in each head of attention, undone in its output projection (#1895)."""
    model, hessians = copy.deepcopy(x.model), dict(x.hessians)
    with mock.patch.object(hybrid_1895.layers, "SinkAttention", t.Attention):
        hybrid_1895.GPT.rotate_values(model)
    for name, mixer in model.named_modules():
        if isinstance(mixer, t.Attention):
            o = f"{name}.o_proj.weight"
            R = hybrid_1895.hadamard(mixer.head_dim)
            R = torch.kron(torch.eye(len(hessians[o]) // len(R)), R)
            hessians[o] = R @ hessians[o] @ R
    return x.packed(size, hessians, model)


@torch.no_grad()
def low_rank(x: Trained, size: int, rank: int = 4) -> t.GPT:
    """What rounding takes from the outputs of each matrix is given back up to a rank (LQER,
    arXiv:2402.02446), at one byte a number, though the numbers are not rounded."""
    matrices = {n: W for n, W in x.model.named_parameters() if x.model.kinds[n] == t.MATRIX}
    numbers = rank * sum(sum(W.shape) for W in matrices.values())
    rounded = x.packed(size - numbers)
    x.reached += numbers
    for name, W in matrices.items():
        own, H = rounded.get_parameter(name), x.hessians[name]
        root = torch.linalg.cholesky(H + 0.01 * H.diagonal().mean() * torch.eye(len(H)))
        U, S, V = torch.linalg.svd((W - own) @ root, full_matrices=False)
        best = U[:, :rank] * S[:rank] @ V[:rank]
        own += torch.linalg.solve_triangular(root, best, upper=False, left=False)
    return rounded


WAYS = {
    "as the record": Trained.packed,
    "to the nearest": with_hessians(uncorrelated),
    "a step for each row": lambda x, size: x.packed(size, gptq=by_row),
    "the embedding counted once": with_hessians(read_once),
    "8 bits for all": lambda x, size: x.packed(size, matrix_bits=8, embed_bits=8),
    "four times the calibration": calibrated_longer,
    "calibrated by rounded inputs": calibrated_rounded,
    "value heads rotated": values_rotated,
    "errors of rank 4 given back": low_rank,
}


def measure(path: Path, size: int | None) -> None:
    """A line for each way. Raises: OSError, ValueError naming the file."""
    trained = Trained(path)
    before = trained.bits_per_byte(trained.model)
    size = size or path.stat().st_size
    print(path.name)
    for way in WAYS:
        after = trained.bits_per_byte(WAYS[way](trained, size))
        figures = f"{trained.reached:>10,}{before:>9.4f}{after:>9.4f}{after - before:>10.5f}"
        print(f"  {way:<28}{figures}", flush=True)


def main() -> int | str:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT")
    parser.add_argument("--bytes", type=int, help="of each artifact, without code")
    args = parser.parse_args()
    print(f"{'':<30}{'bytes':>10}{'before':>9}{'after':>9}{'loss':>10}")
    try:
        for path in args.artifacts:
            measure(path, args.bytes)
    except (OSError, ValueError) as error:
        return f"rounding: error: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
