"""Write submission.json from the log of a finished run.

    python tools/record.py logs/RUN.txt --verified logs/RUN.verify.txt --output submission.json

All numbers come from the log's last line, `figures: {...}`; the artifact that the log names, if it
is there, must have the size it says. AUTHOR and GITHUB_ID are environment variables. A run that is
refused leaves one line on stderr, exit status 1 and no output file: an earlier one is removed.
Seconds are wall time, sizes bytes, bpb bits per byte, loss nats per token.
"""

import argparse
import json
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS_LIMIT = 600  # for training and for evaluation, each
SCORES = ("val_bpb", "val_loss", "raw_val_bpb", "pre_quant_val_bpb")
TEXT = ("data_path", "documents", "bytes")
RUN = ("preset", "system", "run_id", "seed", "hardware", "pytorch_version")
COSTS = ("step_stop", "wallclock_seconds", "last_read_seconds", "eval_time_seconds")
SIZES = ("bytes_code", "bytes_model", "bytes_total")
REQUIRED = (*RUN, "layout", "official", *TEXT, *SCORES, *COSTS, *SIZES, "checks")


class Refused(Exception):
    """No submission is written; one line says why."""

    def __init__(self, file: Path, found: str, advice: str):
        super().__init__(f"{file}: {found}: {advice}")


def parse_figures(path: Path, line: str) -> dict:
    """The object in a log's last line. Raises: Refused if there is none of finite numbers."""
    try:  # int() raises ValueError for NaN and Infinity, which are no JSON
        figures = json.loads(line.removeprefix("figures: "), parse_constant=int)
    except ValueError:
        figures = None
    if not line.startswith("figures: ") or not isinstance(figures, dict):
        raise Refused(path, "no `figures:` of finite numbers in its last line", "run to the end")
    return figures


def parse_settings(path: Path, run: str) -> dict[str, str]:
    """Hyperparameters, one `  name: value` a line. Raises: Refused if those needed are missing."""
    settings = dict(re.findall(r"^  (\w+): (.*)$", run, re.MULTILINE))
    if missing := [name for name in ("artifact", "eval_only") if name not in settings]:
        raise Refused(path, f"no line for {', '.join(missing)}", "give the log as the run wrote it")
    return settings


def read_log(path: Path) -> tuple[dict, dict[str, str], list[str]]:
    """Figures, settings and source texts. Raises: Refused if the run did not finish, OSError."""
    text = path.read_text("utf-8", errors="replace")
    *heads, run = re.split(r"^={100}\n", text, flags=re.MULTILINE)
    figures = parse_figures(path, run.rstrip().rpartition("\n")[2])
    return figures, parse_settings(path, run), heads[:-1]  # the last head: versions


def check_run(path: Path, figures: dict, settings: dict[str, str]) -> None:
    """Raises: Refused if the run did not train, failed its audit, or the artifact is another."""
    if settings["eval_only"] != "False":
        raise Refused(path, "a run with EVAL_ONLY", "give the log of the run that trained")
    if missing := [name for name in REQUIRED if name not in figures]:
        raise Refused(path, f"no figures for {', '.join(missing)}", "give the log of a whole run")
    failed = [name for name, check in figures["checks"].items() if check["passed"] is not True]
    if failed or not figures["checks"]:
        found = f"failed in its audit: {', '.join(failed) or 'there are no checks'}"
        raise Refused(path, found, "remove the cause, then run again")
    artifact, logged = Path(settings["artifact"]), figures["bytes_model"]
    if artifact.is_file() and (size := artifact.stat().st_size) != logged:
        raise Refused(artifact, f"{size} bytes, {logged} in {path}", "give the log of its run")


def other_sources(sources: list[str], root: Path) -> int:
    """How many of the logged sources are no file of the program below root."""
    paths = [root / "train_gpt.py", *(root / "systems").glob("*.py")]
    there = {path.read_text("utf-8").rstrip() for path in paths if path.is_file()}
    return sum(source.rstrip() not in there for source in sources)


def read_verified(path: Path) -> dict[str, bool]:
    """The verifier's checks. Raises: Refused if one failed or it did not finish, OSError."""
    text = path.read_text("utf-8", errors="replace")
    checks = re.findall(r"^verify: (\S+) (passed|FAILED)\b", text, re.MULTILINE)
    if failed := [name for name, result in checks if result == "FAILED"]:
        raise Refused(path, f"failed: {', '.join(failed)}", "remove the cause, then run again")
    closing = re.findall(r"^verify: all (\d+) passed$", text, re.MULTILINE)
    if not checks or closing != [str(len(checks))]:
        found = f"{len(checks)} checks, closed by `verify: all {'/'.join(closing) or '?'} passed`"
        raise Refused(path, found, "verify again and keep all that is printed")
    return {name: True for name, _ in checks}


def submission(figures: dict, date: str, author=None, github_id=None, verified=None) -> dict:
    """What submission.json says. Scores of the official validation split, with training and
    evaluation within the limit each, stand at the top; any other in `own_text`, with its text."""
    in_time = max(figures["wallclock_seconds"], figures["eval_time_seconds"]) <= SECONDS_LIMIT
    claimed = in_time and figures["official"]
    compliance = {"within_600_seconds_each": in_time, "full_validation_split": figures["official"]}
    compliance |= {name: check["passed"] for name, check in figures["checks"].items()}
    compliance |= {} if verified is None else {"verified": verified}
    name = f"{figures['system']}: {figures['layout']}"
    record = {"author": author, "github_id": github_id, "name": name, "date": date}
    record |= {"track": "10min_16mb"} | {name: figures[name] for name in RUN}
    record |= {name: figures[name] if claimed else None for name in SCORES}
    record["own_text"] = None if claimed else {name: figures[name] for name in TEXT + SCORES}
    return record | {name: figures[name] for name in COSTS + SIZES} | {"compliance": compliance}


def write(path: Path, record: dict) -> None:
    """The whole file or none. Raises: OSError."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    os.replace(temporary, path)


def main(argv=None) -> str | None:
    """None if the file is written, or the line that says why not."""
    parser = argparse.ArgumentParser(description="Write submission.json from a run's log.")
    parser.add_argument("log", type=Path, help="logs/RUN.txt")
    parser.add_argument("--verified", type=Path, help="what tools/verify.py printed of the run")
    parser.add_argument("--output", type=Path, default=Path("submission.json"))
    job = parser.parse_args(argv)
    if job.output.resolve() in [path.resolve() for path in (job.log, job.verified) if path]:
        parser.error(f"--output {job.output}: would replace what is read")
    try:
        job.output.unlink(missing_ok=True)  # an earlier run's must not pass for this one's
        figures, settings, sources = read_log(job.log)
        check_run(job.log, figures, settings)
        verified = read_verified(job.verified) if job.verified else None
        date = datetime.fromtimestamp(job.log.stat().st_mtime, UTC).strftime("%Y-%m-%d")
        people = [os.environ.get(name) or None for name in ("AUTHOR", "GITHUB_ID")]
        write(job.output, submission(figures, date, *people, verified))
    except Refused as error:
        return f"record: {error}"
    except OSError as error:
        return f"record: {error.filename}: {error.strerror}: give another path"
    if others := other_sources(sources, ROOT):
        found = f"{others} of {len(sources)} source files are no longer those of {ROOT}"
        print(f"record: warning: {job.log}: {found}", file=sys.stderr)
    return None


if __name__ == "__main__":
    sys.exit(main())
