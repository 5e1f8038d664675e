"""Whether the scores of some runs are lower than those of others, by the competition's measure.

A record is better by more than 0.005 nats at p < 0.01. Whether nats of a token or of a byte are
meant is disputed, so both are tested, with the same seeds, one-sided (Welch).
"""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH
import dialects  # noqa: E402  (the path comes first)
import rules  # noqa: E402
from significance import deviation, mean, one_sided  # noqa: E402


class Side(NamedTuple):
    """Of each run: name; nats a token, None if not stated; bits a byte; bytes of the text."""

    names: list[str]
    losses: list[float | None]
    bpbs: list[float]
    texts: list[float]

    @property
    def bytes_per_token(self) -> float | None:
        if None in self.losses:
            return None
        return mean(self.losses) / math.log(2) / mean(self.bpbs)


def text_of(report: dialects.Report) -> float:
    """Its bytes, as loss, score and targets imply them; the official split's where they are not
    stated."""
    targets, per_token = report.fact("targets"), report.final.bytes_per_token()
    implied = targets * per_token if targets and per_token else rules.CANONICAL_BYTES
    return report.figure("bytes", implied)


def of_log(path: Path) -> tuple[str, float | None, float, float]:
    report = dialects.read(path)
    if not report.final:
        raise ValueError(f"{path}: no score: expected a line with val_loss and val_bpb")
    final = report.final  # figures have more digits
    loss, bpb = report.figure("val_loss", final.loss), report.figure("val_bpb", final.bpb)
    return f"{path.name}, seed {report.seed}", loss, bpb, text_of(report)


def of_folder(folder: Path) -> list[tuple[str, float | None, float, float]]:
    """Its logs of trainings; without any, what submission.json says of each seed."""
    found = {path: dialects.read_if(path) for path in logs_of(folder)}
    rows = [of_log(path) for path, log in found.items() if log and log.is_training and log.final]
    if rows or not (folder / "submission.json").is_file():
        return rows
    results = json.loads((folder / "submission.json").read_text("utf-8")).get("seed_results") or {}
    named = [
        (f"seed {seed}", result) for seed, result in results.items() if isinstance(result, dict)
    ]
    named = [(name, result) for name, result in named if isinstance(result.get("val_bpb"), float)]
    text = rules.CANONICAL_BYTES
    return [(name, result.get("val_loss"), result["val_bpb"], text) for name, result in named]


def logs_of(folder: Path) -> list[Path]:
    """Files that may be logs, by name."""
    found = [*folder.glob("*.log"), *folder.glob("*.txt"), *folder.glob("logs/*.*")]
    return sorted(path for path in found if path.suffix in (".log", ".txt") and path.is_file())


def read_side(arguments: list[str]) -> Side:
    """Folders, logs, and means as numbers. Raises: OSError, ValueError naming what is wrong."""
    rows = []
    for argument in arguments:
        path = Path(argument)
        if not path.exists() and argument.replace(".", "", 1).isdigit():
            rows.append((argument, None, float(argument), rules.CANONICAL_BYTES))
        elif path.is_dir():
            found = of_folder(path)
            if not found:
                raise ValueError(f"{path}: no scores: neither logs nor seed_results")
            rows += found
        else:
            rows.append(of_log(path))
    return Side(*map(list, zip(*rows, strict=True)))


def describe(side: Side) -> list[str]:
    """A line a run, then mean and standard deviation."""
    lines = []
    for name, loss, bpb, _ in zip(*side, strict=True):
        lines.append(
            f"  {bpb:.5f} bpb  {'' if loss is None else f'{loss:.5f} nats a token'}  {name}"
        )
    spread = deviation(side.bpbs)
    spread = "of one" if spread is None else f"std {spread:.5f}"
    nats = "" if None in side.losses else f"; {mean(side.losses):.5f} nats a token"
    if nats and len(side.losses) > 1:
        nats += f", std {deviation(side.losses):.5f}"
    return [*lines, f"  mean {mean(side.bpbs):.5f} bpb, {spread}{nats}"]


def verdict(what: str, ours, theirs, margin: float, unit: str) -> str:
    """One line of one test."""
    test = one_sided(ours, theirs, margin)
    more = f"by more than {margin:.5f}" if margin else "at all"
    met = "yes" if test.p < rules.RECORD_P else "no"
    figures = f"lower by {test.lower_by:.5f}; t {test.t:.2f}, {test.df:.1f} degrees, p {test.p:.2g}"
    return f"{what}: {met}: {unit} lower {more}: {figures}"


def millions(values: list[float]) -> str:
    return ", ".join(dict.fromkeys(f"{value / 1e6:.2f}" for value in values))


def lines_of(ours: Side, theirs: Side) -> list[str]:
    lines = ["ours", *describe(ours), "against", *describe(theirs)]
    texts = [*ours.texts, *theirs.texts]
    if max(texts) > 1.001 * min(texts):
        found = f"ours {millions(ours.texts)}, theirs {millions(theirs.texts)}"
        return [*lines, f"no test: not the same text, in millions of bytes: {found}"]
    if len(ours.bpbs) < 2:
        return [*lines, f"no test: ours is one run, a record takes {rules.SEEDS}"]
    if len(theirs.bpbs) == 1:
        lines.append("theirs is one number, taken as exact")
    mine, other = ours.bytes_per_token, theirs.bytes_per_token
    limit, p = rules.RECORD_NATS, rules.RECORD_P
    lines.append(f"by {limit} nats at p < {p}?")
    if mine and other and abs(mine / other - 1) < 1e-3:
        lines.append(verdict("  of a token", ours.losses, theirs.losses, limit, "nats"))
    elif mine and other:
        lines.append(f"  tokens of {mine:.4f} and {other:.4f} bytes: their nats do not compare")
    if mine:
        margin = limit / math.log(2) / mine
        lines.append(verdict("  of a token, in bpb", ours.bpbs, theirs.bpbs, margin, "bpb"))
    margin = limit / math.log(2)
    lines.append(verdict("  of a byte", ours.bpbs, theirs.bpbs, margin, "bpb"))
    return [*lines, verdict("  by anything", ours.bpbs, theirs.bpbs, 0.0, "bpb")]
