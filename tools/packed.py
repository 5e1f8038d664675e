"""Reads an artifact and the state that a run kept before it quantized, without train_gpt.py.

    python tools/packed.py final_model.int6.ptz    # a table by group, and each tensor's error

Of each group: tensors, values, the bits that its largest value needs, entropy in bits a value,
bytes, and the error of its outputs on the calibration's inputs, over the outputs and over the error
if each value were rounded to the nearest. A run logs of each attempt to pack, behind "pack:", the
step of rounding (times the RMS of the inputs, the same in all tensors), bytes with the code, and
target.

ARTIFACT: 8 bytes, sha256 of the rest, 4 bytes for the length of a part that brotli has packed, this
part, and a range code. The part: a line of JSON; float16 of all parameters in their order, but only
the scales, one a row, of what is quantized. The line's "counts" say how often each of 256 values
comes in each quantized tensor. The code: int8 values of these tensors, by constriction; the shares
that it takes are float64 quotients of a value's count and all of the tensor.
ARTIFACT.trained.pt: the parameters' order, shapes and values before, and the Hessian of each tensor
that is quantized: X^T X of its inputs, divided by tokens.
"""

import argparse
import hashlib
import json
import math
import re
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import brotli
import constriction
import numpy as np
import torch


class Packed(NamedTuple):
    q: np.ndarray  # int8 [rows, cols]
    scale: np.ndarray  # float32 [rows]


def read_state(path: Path, *more: str) -> dict:
    """weights and hessians, by name, and what else is asked for. Raises: OSError, ValueError naming
    the file."""
    with open(path, "rb"):
        pass  # what torch.load says of a folder or a file that may not be read is no OSError
    try:
        with zipfile.ZipFile(path) as file:  # torch.load compares no checksums
            if damaged := file.testzip():
                raise ValueError(f"damaged in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__}")
        if missing := [name for name in ("weights", "hessians", *more) if name not in state]:
            raise ValueError(f"it has no {', '.join(missing)}")
        check_hessians(state["weights"], state["hessians"])
    except Exception as error:  # of whatever kind torch.load makes of a damaged file
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: damaged, or not what a run keeps: {reason}") from None
    return state


def check_hessians(weights: dict, hessians: dict) -> None:
    """Raises: ValueError unless each is of a matrix that is there, [columns, columns], finite."""
    if not weights.keys() >= hessians.keys():
        raise ValueError("Hessians of tensors that it has not")
    for name, H in hessians.items():
        columns = weights[name].shape[1:]
        if H.shape != columns * 2 or len(columns) != 1:
            raise ValueError(f"the Hessian of {name}: {list(H.shape)} for {columns} columns")
        if not (H.isfinite().all() and weights[name].isfinite().all()):
            raise ValueError(f"{name} or its Hessian is not finite")


class Parts(NamedTuple):
    text: bytes  # the line of JSON
    counts: np.ndarray  # uint32 [tensors, 256]
    values: bytes  # float16
    code: bytes


def unpack(path: Path) -> Parts:
    """Raises: OSError, ValueError naming the file."""
    raw = path.read_bytes()
    if len(raw) < 40 or hashlib.sha256(raw[40:]).digest() != raw[8:40]:
        raise ValueError(f"{path}: no artifact, or damaged: {len(raw)} bytes, starts {raw[:8]!r}")
    end = 44 + int.from_bytes(raw[40:44], "little")
    try:
        text, _, values = brotli.decompress(raw[44:end]).partition(b"\n")
        counts = np.array(json.loads(text)["counts"], np.uint32).reshape(-1, 256)
    except (brotli.error, LookupError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no artifact: {error}") from None
    return Parts(text, counts, values, raw[end:])


def shares_of(counts) -> np.ndarray:
    """Float64 [256], of the same sum on any machine. Raises: ValueError if nothing is counted."""
    counts = np.asarray(counts, np.float64)
    if not counts.sum():
        raise ValueError("counts of nothing")
    return counts / counts.sum()


def decode(path: Path, code: bytes, counts: np.ndarray, shapes: list) -> list[np.ndarray]:
    """int8 of each shape; counts: [tensors, 256], of the values 0 .. 127, -128 .. -1.
    Raises: ValueError naming the file."""
    try:
        coder = constriction.stream.queue.RangeDecoder(np.frombuffer(code, "<u4").astype(np.uint32))
        found = []
        for count, shape in zip(counts, shapes, strict=True):
            model = constriction.stream.model.Categorical(shares_of(count), perfect=False)
            found.append(coder.decode(model, math.prod(shape)).astype(np.int8).reshape(shape))
    except (ValueError, AssertionError) as error:  # of that library; no counts
        raise ValueError(f"{path}: its code is damaged: {error}") from None
    if not coder.maybe_exhausted():
        raise ValueError(f"{path}: more is coded than the trained model has")
    return found


def read_packed(path: Path, state: dict) -> dict[str, Packed]:
    """What is quantized in the artifact, by name. The rest, of which both have the same values if
    they are of one run, is compared. Raises: OSError, ValueError naming the file."""
    _, counts, values, code = unpack(path)
    weights = {name: w for name, w in state["weights"].items() if name in state["hessians"]}
    rest = sum(w.numel() for name, w in state["weights"].items() if name not in weights)
    size = sum(2 * len(w) for w in weights.values()) + 2 * rest
    if len(values) != size:
        found = f"{len(values)} bytes of values, the trained model has {size}"
        raise ValueError(f"{path}: {found}: of two runs, or quantized without Hessians")
    ints = iter(decode(path, code, counts, [w.shape for w in weights.values()]))
    packed, at = {}, 0
    for name, w in state["weights"].items():
        count = len(w) if name in weights else w.numel()
        half, at = np.frombuffer(values, np.float16, count, at), at + 2 * count
        if name in weights:
            packed[name] = Packed(next(ints), half.astype(np.float32))
        elif half.tobytes() != w.detach().half().numpy().tobytes():
            raise ValueError(f"{path}: another {name} than was trained: they are of two runs")
    return packed


def group_of(name: str, names: set[str]) -> str:
    """Of a quantized tensor, by its name."""
    if name.startswith("tok_emb"):
        return "embedding, also output"
    if match := re.search(r"mlp\.(up|down)_proj", name):
        return f"MLP, {match[1]}"
    if match := re.match(r"(.*\bmixer\.)", name):
        return "Gated DeltaNet" if f"{match[1]}A_log" in names else "attention"
    return "n-gram table" if name.startswith("ngram.") else "other matrices"


def entropy_bytes(raw: bytes) -> float:
    """Of bytes that know nothing of each other, which a range code takes."""
    counts = np.bincount(np.frombuffer(raw, np.uint8))
    counts = counts[counts > 0]
    return float(counts @ np.log2(len(raw) / counts)) / 8


def output_error(W: np.ndarray, q: np.ndarray, scale: np.ndarray, H: np.ndarray) -> float:
    """Squared error of the outputs on the inputs that H was collected from: tr(E H E^T)."""
    E = W.astype(np.float64) - q * scale[:, None].astype(np.float64)
    return float(((E @ H) * E).sum())


def errors(packed: dict[str, Packed], state: dict) -> dict[str, tuple[float, float]]:
    """Of each tensor: error as packed, and with each value rounded to the nearest of its row."""
    found = {}
    for name, (q, scale) in packed.items():
        W, H = (state[kind][name].detach().double().numpy() for kind in ("weights", "hessians"))
        largest = 2 ** int(np.abs(q.astype(int)).max()).bit_length() - 1  # in so many bits
        nearest = np.clip(np.round(W / scale[:, None]), -largest, largest)
        found[name] = output_error(W, q, scale, H), output_error(W, nearest, scale, H)
    return found


def ratio(ours: float, nearest: float) -> float:
    """Of two errors; NaN where rounding makes none."""
    return ours / nearest if nearest else math.nan


def correlated(H: torch.Tensor) -> bool:
    """Whether GPTQ can gain: with nearly uncorrelated inputs it is rounding to nearest."""
    return bool(H.norm() > 1.1 * H.diagonal().norm())


def check_gptq(artifact: Path, state_path: Path) -> tuple[bool, str]:
    """Each tensor that is quantized has a Hessian and, where inputs correlate, less output error
    than by rounding to nearest."""
    try:
        state = read_state(state_path)
        found = errors(read_packed(artifact, state), state)
    except (OSError, ValueError) as error:
        return False, f"{error} (state: {state_path})"
    worse = [name for name, (ours, nearest) in found.items() if not ours < nearest]
    worse = [name for name in worse if correlated(state["hessians"][name])]
    share = ratio(*(sum(kind) for kind in zip(*found.values(), strict=True))) if found else math.nan
    text = f"{len(found)} tensors, output error {share:.3f} of rounding to nearest"
    return bool(found) and not worse, "; no better: ".join(
        [text, *[", ".join(worse)] * bool(worse)]
    )


class Group(NamedTuple):
    """What is quantized, added up."""

    name: str
    tensors: int
    values: int
    bits: int  # for its largest value and the sign
    bytes: float
    error: float  # of its outputs, squared
    nearest: float  # as error, if each value were rounded to the nearest
    outputs: float  # squared, before


def groups_of(packed: dict[str, Packed], state: dict) -> list[Group]:
    """In the order of the parameters."""
    members, found = {}, errors(packed, state)
    for name in packed:
        members.setdefault(group_of(name, set(state["weights"])), []).append(name)
    groups = []
    for group, names in members.items():
        largest = max(int(np.abs(packed[name].q.astype(int)).max()) for name in names)
        size = sum(entropy_bytes(packed[name].q.tobytes()) for name in names)
        error, nearest = (sum(kind) for kind in zip(*(found[name] for name in names), strict=True))
        weights = {name: state["weights"][name].detach().double().numpy() for name in names}
        hessians = {name: state["hessians"][name].double().numpy() for name in names}
        outputs = sum(float(((W @ hessians[name]) * W).sum()) for name, W in weights.items())
        values = sum(W.size for W in weights.values())
        bits = largest.bit_length() + 1
        groups.append(Group(group, len(names), values, bits, size, error, nearest, outputs))
    return groups


def table_of(artifact: Path, groups: list[Group], state: dict) -> list[str]:
    """Lines; `rest` is all that has no range code: scales, what is not quantized, settings."""
    head = f"{'':<24}{'tensors':>8}{'values':>12}{'bits':>6}{'entropy':>9}{'bytes':>12}"
    lines = [f"{head}{'error':>11}{'of nearest':>12}"]
    for g in groups:
        lines.append(
            f"{g.name:<24}{g.tensors:>8}{g.values:>12,}{g.bits:>6}{8 * g.bytes / g.values:>9.3f}"
            f"{g.bytes:>12,.0f}{ratio(g.error, g.outputs):>11.3e}{ratio(g.error, g.nearest):>12.3f}"
        )
    size = artifact.stat().st_size
    count = sum(w.numel() for name, w in state["weights"].items() if name not in state["hessians"])
    rest = size - len(unpack(artifact).code)
    lines.append(f"{'rest, by brotli':<32}{count:>12,}{'16':>6}{'':>9}{rest:>12,}")
    lines.append(f"{'artifact':<59}{size:>12,}")
    return lines


def main(argv: list[str] | None = None) -> int | str:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("artifact", type=Path)
    artifact = parser.parse_args(argv).artifact
    try:
        state = read_state(Path(f"{artifact}.trained.pt"))
        packed = read_packed(artifact, state)
        found, lines = errors(packed, state), table_of(artifact, groups_of(packed, state), state)
    except (OSError, ValueError) as error:
        return f"packed: error: {error}"
    print("\n".join([*lines, "", "error of each tensor, of rounding to nearest"]))
    for name, (ours, nearest) in found.items():
        print(f"{ratio(ours, nearest):6.3f} of {nearest:10.4g}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
