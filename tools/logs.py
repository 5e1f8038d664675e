"""Reads logs/RUN.txt, as train_gpt.py writes it, without train_gpt.py.

A log is appended to, so that it may hold several runs: a training, refused or killed calls, one
that only scored. Each run is its source files, its versions ("Running Python" is their start) and
its lines, with a rule of 100 "=" between them and before the next run. The last line of a run that
came to its end is `figures: {...}`.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

RULE = "=" * 100
VERSIONS = "Running Python"
NUMBER = (int, float)
KINDS = (
    dict.fromkeys("run_id system preset layout data_path hardware pytorch_version".split(), str)
    | dict.fromkeys("val_bpb val_loss raw_val_bpb pre_quant_val_bpb".split(), NUMBER)
    | dict.fromkeys("wallclock_seconds last_read_seconds eval_time_seconds".split(), NUMBER)
    | dict.fromkeys("lr_multiplier_at_stop".split(), NUMBER)
    | dict.fromkeys("seed documents bytes step_stop tokens_read tokens_needed".split(), int)
    | dict.fromkeys("bytes_code bytes_model bytes_total".split(), int)
    | dict(official=bool, resumed=bool, checks=dict, artifact_sha256=str)
)  # of figures, by name


def as_figures(line: str) -> dict | None:
    """The object of a line `figures: {...}`, None if it is none or one of not only finite numbers.
    Raises: ValueError naming a figure of another kind than the program writes."""
    try:  # int() raises ValueError for NaN and Infinity, which are no JSON
        figures = json.loads(line.removeprefix("figures: "), parse_constant=int)
    except (ValueError, RecursionError):
        return None
    if not line.startswith("figures: ") or not isinstance(figures, dict):
        return None
    for name in figures.keys() & KINDS.keys():
        if not isinstance(figures[name], KINDS[name]):
            raise ValueError(f"its figure {name} is {figures[name]!r}: no log of this program")
    for name, check in figures.get("checks", {}).items():
        if not isinstance(check, dict) or "passed" not in check:
            raise ValueError(f"its check {name} is {check!r}: no log of this program")
    return figures


class Run(NamedTuple):
    sources: list[str]
    versions: str
    text: str  # its own lines
    figures: dict | None  # None: it did not come to its end

    @property
    def settings(self) -> dict[str, str]:
        """Hyperparameters, one `  name: value` a line."""
        return dict(re.findall(r"^  (\w+): ?(.*)$", self.text, re.M))

    @property
    def trained(self) -> bool:
        return "step_stop" in (self.figures or {})

    @property
    def resumed(self) -> bool:
        """Whether it went on from a checkpoint."""
        said = (self.figures or {}).get("resumed", False)
        return said or bool(re.search(r"^resumed: ", self.text, re.M))


def read_runs(path: Path) -> list[Run]:
    """One or more, in the order of the log. Raises: OSError, or ValueError naming the file."""
    return runs_of(path, path.read_text("utf-8", errors="replace"))


def runs_of(path: Path, text: str) -> list[Run]:
    """As read_runs, of the text of the file."""
    if not text.strip():
        raise ValueError(f"{path}: empty, expected the log of a run")
    parts = re.split(rf"^{RULE}\n", text, flags=re.M)
    ends = [i for i, part in enumerate(parts) if part.startswith(VERSIONS)]
    if not ends:
        expected = f"expected a line `{VERSIONS} ...` behind a rule of {len(RULE)} `=`"
        raise ValueError(f"{path}: no log of a run: {expected}")
    runs, start = [], 0
    for i in ends:
        lines = "".join(parts[i + 1 : i + 2])
        try:
            figures = as_figures(lines.rstrip().rpartition("\n")[2])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        runs.append(Run(parts[start:i], parts[i], lines, figures))
        start = i + 2
    return runs


def choose(path: Path, runs: list[Run]) -> tuple[Run, str]:
    """The last run that trained and came to its end, or else that came to its end, or else the
    last; and a line that tells which, if it is not the last thing in the log."""
    ended = [run for run in runs if run.figures is not None]
    trained = [run for run in ended if run.trained]
    run = (trained or ended or runs)[-1]
    number = next(i for i, other in enumerate(runs, 1) if other is run)
    what = "trained and came to its end" if run.trained else "came to its end"
    if run is runs[-1]:
        return run, ""
    return run, f"{path}: takes run {number} of {len(runs)}, the last that {what}"
