"""Reads an artifact and the state that a run kept before it quantized, without train_gpt.py.

    python tools/packed.py final_model.int6.ptz    # each tensor's error over that of rounding

ARTIFACT: 8 bytes, sha256 of the rest, and compressed by brotli: length of a JSON text, this text,
int8 values of what is quantized, float16 of its scales (one a row) and of all other parameters,
each in the order of the parameters. ARTIFACT.trained.pt: their order, shapes and values before, and
the Hessian X^T X of the inputs of each tensor that is quantized.
"""

import argparse
import hashlib
import math
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import brotli
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


def unpack(path: Path) -> bytes:
    """Raises: OSError, ValueError naming the file."""
    raw = path.read_bytes()
    if len(raw) < 40 or hashlib.sha256(raw[40:]).digest() != raw[8:40]:
        raise ValueError(f"{path}: no artifact, or damaged: {len(raw)} bytes, starts {raw[:8]!r}")
    try:
        return brotli.decompress(raw[40:])
    except brotli.error as error:
        raise ValueError(f"{path}: no artifact: {error}") from None


def read_packed(path: Path, state: dict) -> dict[str, Packed]:
    """What is quantized in the artifact, by name. The rest, of which both have the same values if
    they are of one run, is compared. Raises: OSError, ValueError naming the file."""
    body = unpack(path)
    values = memoryview(body)[4 + int.from_bytes(body[:4], "little") :]
    weights = {name: w for name, w in state["weights"].items() if name in state["hessians"]}
    rest = sum(w.numel() for name, w in state["weights"].items() if name not in weights)
    size = sum(w.numel() + 2 * len(w) for w in weights.values()) + 2 * rest
    if len(values) != size:
        found = f"{len(values)} bytes of values, the trained model has {size}"
        raise ValueError(f"{path}: {found}: of two runs, or quantized without Hessians")
    packed, at, end = {}, 0, sum(w.numel() for w in weights.values())
    for name, w in state["weights"].items():
        if name not in weights:
            end += 2 * w.numel()
            if values[end - 2 * w.numel() : end] != w.detach().half().numpy().tobytes():
                raise ValueError(f"{path}: another {name} than was trained: they are of two runs")
            continue
        q = np.frombuffer(values, np.int8, w.numel(), at).reshape(w.shape)
        scale = np.frombuffer(values, np.float16, len(w), end).astype(np.float32)
        packed[name], at, end = Packed(q, scale), at + w.numel(), end + 2 * len(w)
    return packed


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


def main(argv: list[str] | None = None) -> int | str:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("artifact", type=Path)
    artifact = parser.parse_args(argv).artifact
    try:
        state = read_state(Path(f"{artifact}.trained.pt"))
        found = errors(read_packed(artifact, state), state)
    except (OSError, ValueError) as error:
        return f"packed: error: {error}"
    for name, (ours, nearest) in found.items():
        print(f"{ratio(ours, nearest):6.3f} of {nearest:10.4g}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
