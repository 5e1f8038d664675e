"""What a log of the competition says, whoever wrote it, as one Report.

Known are the lines of this program, those of the competition's script (`step:1/20000
train_loss:...`), those of the records from April on (`1/20000 train_loss: ...`, hyperparameters one
a line) and those of the Gated DeltaNet submissions (`step 1/7000 | loss ...`). What a log does not
say is None or empty. Losses are nats a token, bpb bits a byte, seconds wall time.
"""

import math
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH
import logs  # noqa: E402  (the path comes first)

INT = r"(\d[\d,]*)"
FACTS = {  # the last line of a log counts, and in it the first group that matches
    "seed": rf"^ *seed: ?{INT}\b",
    "iterations": rf"\b(?:iterations: ?|^Seed: \d+, (?:Max )?steps: ){INT}",
    "targets": rf"^(?:val_loader:.*\btokens:|val_tokens: ?|Validation tokens: ){INT}",
    "shards": rf"\b(?:train_shards: ?|^Generated coprime .* across ){INT}",
    "bytes_model": rf"^(?:Serialized model [^:\n]+|Artifact): {INT} bytes",
    "bytes_code": rf"^Code size[^:\n]*: {INT} bytes",
    "bytes_total": rf"^Total submission size[^:\n]*: {INT} bytes",
    "parameters": rf"^(?:model_params: ?|Total params: ){INT}",
    "ranks": rf"\bworld[_ ]size: ?{INT}",
    "hessians": rf"\b(?:collected (?:hessians for )?|calibrated ){INT} (?:Hessians|layers)",
    "warmdown_steps": rf"\b(?:, Warmdown: |warmdown_iters: ?){INT}",
}
NUMBERS = {
    "stopped_ms": r"^stopping_early:.*\btrain_time: ?(\d+)ms",
    "clock_ms": r"\btrain_time: ?(\d+)ms",
    "finished_seconds": r"^Training complete in ([\d.]+)s",
    "average_ms": r"\bstep_avg: ?([\d.]+)ms",
    "lr_multiplier": r"\blr_mul ([\d.]+)",
    "hessian_seconds": r"\b(?:collected|calibrated) \d+ (?:Hessians|layers) in ([\d.]+)s",
    "eval_total": r"^total_eval_time: ?([\d.]+)s",
}
STEP = re.compile(
    rf"^(?:step[: ] *)?{INT}/{INT} [| ]*(?:train_loss: ?|loss )([\d.]+)"
    rf"|^step +{INT} \|.*? loss ([\d.]+)",
    re.M,
)
STOPS = (
    rf"^stopping_early:.*\bstep: ?{INT}",
    rf"^Stopping early at step {INT}",
    rf"^(?:step:)?{INT}/\d+ (?:train|val)_loss",
    rf"^step +{INT}\b",
)
SCORE = re.compile(
    r"^(?P<label>(?!step:|\d+/)[^\n]*?)\bval_loss[:=] ?(?P<loss>[\d.]+) .*?"
    r"\bval_bpb[:=] ?(?P<bpb>\d[\d.]*)(?P<rest>.*)$"
    r"|^\W*(?P<other>[A-Z]\w+ BPB[^:\n]*): +(?P<only>\d[\d.]*)(?P<after>.*)$",
    re.M,
)
QUANTIZED = r"^(?!.*(pre-?quant|sliding|stream|ttt)).*(roundtrip|quantized)"
TIME = re.compile(r"\b(?:eval_time:|elapsed=)([\d.]+)(ms|s)")
STAMP = re.compile(r"^\d{10}\.\d+ ", re.M)  # seconds since 1970 before each line


class Score(NamedTuple):
    label: str
    loss: float | None
    bpb: float
    seconds: float | None
    digits: tuple[int, int]  # behind the point, of loss and bpb

    def bytes_per_token(self) -> float | None:
        return self.loss / math.log(2) / self.bpb if self.loss and self.bpb else None

    def bytes_error(self) -> float:
        """By how much, relatively, rounding to these digits can change that."""
        return sum(0.5 * 10**-n / x for n, x in zip(self.digits, (self.loss, self.bpb)))  # noqa: B905


@dataclass(frozen=True)
class Report:
    path: Path
    text: str  # lines of the run, its source left out
    sources: tuple[str, ...] = ()
    versions: str = ""
    figures: dict | None = None  # of this program only

    def fact(self, name: str) -> int | None:
        found = re.findall(FACTS[name], self.text, re.M | re.I)
        return int(found[-1].replace(",", "")) if found else None

    def number(self, name: str) -> float | None:
        found = re.findall(NUMBERS[name], self.text, re.M | re.I)
        return float(found[-1]) if found else None

    def figure(self, name: str, otherwise):
        return (self.figures or {}).get(name, otherwise)

    @property
    def seed(self) -> int | None:
        return self.figure("seed", self.fact("seed"))

    @cached_property
    def settings(self) -> dict[str, str]:
        return dict(re.findall(r"^  ([a-z]\w*): ?(.*)$", self.text, re.M))

    @cached_property
    def losses(self) -> dict[int, float]:
        """Of training, by step."""
        rows = STEP.findall(self.text)
        return {int((a or b).replace(",", "")): float(x or y) for a, _, x, b, y in rows}

    @cached_property
    def iterations(self) -> int | None:
        """Asked for, however many were made."""
        of = [int(row[1].replace(",", "")) for row in STEP.findall(self.text) if row[1]]
        return self.fact("iterations") or (of[-1] if of else None)

    @cached_property
    def steps(self) -> int | None:
        for pattern in STOPS:
            if found := re.findall(pattern, self.text, re.M):
                return self.figure("step_stop", int(found[-1].replace(",", "")))
        return self.figure("step_stop", None)

    @cached_property
    def train_seconds(self) -> float | None:
        ms = self.number("stopped_ms") or self.number("clock_ms")
        otherwise = self.number("finished_seconds") if ms is None else ms / 1000
        return self.figure("wallclock_seconds", otherwise)

    @cached_property
    def step_ms(self) -> float | None:
        if average := self.number("average_ms"):
            return average
        seconds = self.train_seconds
        return 1000 * seconds / self.steps if seconds and self.steps else None

    @cached_property
    def lr_multiplier(self) -> float | None:
        return self.figure("lr_multiplier_at_stop", self.number("lr_multiplier"))

    @cached_property
    def scores(self) -> list[Score]:
        """In the order of the log, those while it trains left out."""
        return [as_score(found) for found in SCORE.finditer(self.text)]

    @property
    def final(self) -> Score | None:
        return self.scores[-1] if self.scores else None

    def last(self, pattern: str) -> Score | None:
        """The last score whose label the pattern matches."""
        found = [score for score in self.scores if re.search(pattern, score.label, re.I)]
        return found[-1] if found else None

    @property
    def averaged(self) -> Score | None:
        """Before quantization."""
        return self.last(r"pre-?quant|post[-_]ema|^EMA BPB")

    @property
    def quantized(self) -> Score | None:
        """As quantized, in windows that do not overlap and without learning. Some logs give their
        final score under this label once more."""
        better = [s.bpb for s in self.scores if re.search("sliding|stream|ttt", s.label, re.I)]
        found = [s for s in self.scores if re.search(QUANTIZED, s.label, re.I)]
        found = [s for s in found if all(abs(s.bpb - bpb) > 6e-5 for bpb in better)] or found
        return found[-1] if found else None

    @cached_property
    def raw_bpb(self) -> float | None:
        """Of the weights as they were after the last step, neither averaged nor quantized."""
        found = re.findall(r"^(?:step:)?\d+/\d+ val_loss:.*\bval_bpb: ?([\d.]+)", self.text, re.M)
        return float(found[-1]) if found else None

    @property
    def eval_seconds(self) -> float | None:
        otherwise = self.number("eval_total") or self.timed_final
        return self.figure("eval_time_seconds", otherwise)

    @property
    def timed_final(self) -> float | None:
        """Of the final score, or of the last line above it that says the same."""
        final = self.final
        if not final:
            return None
        same = [score for score in self.scores if abs(score.bpb - final.bpb) < 6e-5]
        times = [score.seconds for score in same if score.seconds is not None]
        return times[-1] if times else None

    @property
    def bytes_model(self) -> int | None:
        return self.figure("bytes_model", self.fact("bytes_model"))

    @property
    def bytes_code(self) -> int | None:
        return self.figure("bytes_code", self.fact("bytes_code"))

    @property
    def bytes_total(self) -> int | None:
        return self.figure("bytes_total", self.fact("bytes_total"))

    @property
    def is_training(self) -> bool:
        return bool(self.losses or self.train_seconds)

    @property
    def hardware(self) -> str | None:
        """Ranks and GPU, as far as it says so."""
        gpu = re.search(r"NVIDIA (?:GeForce )?((?:RTX )?[A-Z]+\d+\w*)", self.versions)
        ranks = self.fact("ranks")
        found = f"{ranks or '?'}x{gpu[1] if gpu else '?'}" if ranks or gpu else None
        return self.figure("hardware", found)


def as_score(found: re.Match) -> Score:
    """Of a match of SCORE. Settings in the label, as `stride:64`, are no part of its name."""
    label, loss, bpb, rest, other, only, after = found.groups()
    time = TIME.search(rest or after or "")
    seconds = float(time[1]) / (1000 if time[2] == "ms" else 1) if time else None
    label, bpb = label or other, bpb or only
    words = [word for word in label.split() if not re.search(":.", word)]
    digits = tuple(len(x.partition(".")[2]) for x in (loss or "", bpb))
    return Score(" ".join(words), float(loss) if loss else None, float(bpb), seconds, digits)


def read(path: Path) -> Report:
    """Raises: OSError, or ValueError naming the file, if it is no log."""
    text = STAMP.sub("", path.read_text("utf-8", errors="replace"))
    try:
        run, _ = logs.choose(path, logs.runs_of(path, text))
        settings = [part for part in run.sources if part.startswith("Hyperparameters:\n")]
        sources = tuple(part for part in run.sources if part.strip() and part not in settings)
        lines = "".join([*settings, run.text])
        report = Report(path, lines, sources, run.versions, run.figures)
    except ValueError:  # no source before the lines
        report = Report(path, text)
    if not report.scores and report.steps is None:
        raise ValueError(f"{path}: no log that is known: neither steps nor scores")
    return report


def read_if(path: Path) -> Report | None:
    """None if it is no log."""
    try:
        return read(path)
    except ValueError:
        return None
