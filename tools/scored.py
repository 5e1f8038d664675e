"""A text, or its first documents, and what each token of it cost: for plot.py and page.py, without
train_gpt.py.

Target i of a score file is token i + 1 of the text. It belongs to the document of the token before
it: the BOS behind a document is what its end costs, 0 bytes.
"""

import math
import sys
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH
from dataset import BOS, Text  # noqa: E402  (the path comes first)
from verify import read_scores  # noqa: E402


class Places(NamedTuple):
    """Intervals of places in a document; arrays [intervals]."""

    edges: np.ndarray  # int [intervals + 1]: first place of each, and the one behind the last
    bpb: np.ndarray
    error: np.ndarray  # standard error over documents, NaN for less than two


class Scored:
    """Raises: OSError, ValueError naming the file, if it cannot be read or is not of this text."""

    def __init__(self, text: Text, path: Path, *more: str):
        """more: what the file must have beside nats and bytes: "unlearned"."""
        scores, self.path, self.sp = read_scores(path, *more), path, text.sp
        n = len(scores.nats)
        self.ids = text.ids[: n + 1]
        self.bits = scores.nats.astype(np.float64) / math.log(2)  # [n]
        self.bytes = scores.bytes.astype(np.int64)  # [n]
        self.unlearned = None  # [n] bits, with the artifact as it was before it learned
        if "unlearned" in more:
            self.unlearned = scores.unlearned.astype(np.float64) / math.log(2)
        self.artifact = scores.artifact
        self.check(scores.position, len(text.ids))

    def check(self, position: np.ndarray, tokens: int) -> None:
        n = len(self.bits)
        if not 0 < n < tokens or not np.array_equal(position, np.arange(1, n + 1)):
            raise ValueError(f"{self.path}: {n} targets, not the first of {tokens} tokens in order")
        bits = np.concatenate((self.bits, [] if self.unlearned is None else self.unlearned))
        if not (np.isfinite(bits) & (bits >= 0)).all():
            raise ValueError(f"{self.path}: a score is negative or not finite")
        if self.bytes[self.ids[1:] == BOS].any() or not self.bytes.any():
            raise ValueError(f"{self.path}: its bytes are not those of this text")

    @cached_property
    def starts(self) -> np.ndarray:
        """Of documents, int [documents]; a last BOS that nothing follows begins none."""
        return np.flatnonzero(self.ids[:-1] == BOS)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Targets of each document."""
        return np.diff([*self.starts, len(self.bits)])

    @cached_property
    def document(self) -> np.ndarray:
        """Of each target the number of its document, from 0."""
        return np.repeat(np.arange(len(self.starts)), self.lengths)

    @cached_property
    def place(self) -> np.ndarray:
        """Of each target its place in its document: 1 is what follows BOS."""
        return np.arange(len(self.bits)) - self.starts[self.document] + 1

    def per_document(self, values: np.ndarray) -> np.ndarray:
        """Sums."""
        return np.add.reduceat(values, self.starts)

    @property
    def bpb(self) -> float:
        return float(self.bits.sum() / self.bytes.sum())

    def by_place(self, bits: np.ndarray) -> Places:
        """Bits per byte of places 1 to 15, 16 to 31, 32 to 63 and so on."""
        number = np.maximum(np.frexp(self.place)[1] - 4, 0)  # of each target's interval
        shape = len(self.starts), int(number.max()) + 1
        where = self.document * shape[1] + number
        sums = [np.bincount(where, x, math.prod(shape)).reshape(shape) for x in (bits, self.bytes)]
        total, size = (x.sum(0) for x in sums)
        bpb = total / np.maximum(size, 1)
        reached = np.maximum((sums[1] > 0).sum(0), 1)  # documents
        residual = np.square(sums[0] - bpb * sums[1]).sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.sqrt(residual * reached / (reached - 1)) / size
        error[reached < 2] = np.nan
        edges = np.array([1, *(16 << k for k in range(shape[1]))])
        return Places(edges, bpb, error)
