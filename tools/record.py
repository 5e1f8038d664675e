"""Write submission.json from the log of a finished run.

    python tools/record.py logs/RUN.txt --verified logs/RUN.verify.txt --output submission.json

All numbers come from `figures: {...}`, the last line of the last run in the log that trained to its
end; the artifact that it names, if it is there, must be the one that it scored, by its sha256.
AUTHOR and GITHUB_ID are environment variables. A run that is refused leaves one line on stderr,
exit status 1 and no output file; an earlier one, which must not pass for this run's, is kept as
submission.json.old. Seconds are wall time, sizes bytes, bpb bits per byte, loss nats per token.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH
import logs  # noqa: E402  (the path comes first)

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

    def __init__(self, file: Path | str, found: str, advice: str):
        super().__init__(f"{file}: {found}: {advice}")


def read_run(path: Path) -> logs.Run:
    """The run that is submitted; warns if others follow it. Raises: Refused, OSError, ValueError
    naming the file."""
    run, note = logs.choose(path, logs.read_runs(path))
    if run.figures is None:
        found = "no `figures:` of finite numbers in the last line of a run"
        raise Refused(path, found, "run to the end")
    if missing := [name for name in ("artifact", "eval_only") if name not in run.settings]:
        raise Refused(path, f"no line for {', '.join(missing)}", "give the log as the run wrote it")
    if note:
        print(f"record: warning: {note}", file=sys.stderr)
    return run


def check_run(path: Path, run: logs.Run) -> None:
    """Raises: Refused if the run did not train, failed its audit, or the artifact is another."""
    if run.settings["eval_only"] != "False":
        raise Refused(path, "a run with EVAL_ONLY", "give the log of the run that trained")
    if missing := [name for name in REQUIRED if name not in run.figures]:
        raise Refused(path, f"no figures for {', '.join(missing)}", "give the log of a whole run")
    checks = run.figures["checks"]
    failed = [name for name, check in checks.items() if check["passed"] is not True]
    if failed or not checks:
        found = f"failed in its audit: {', '.join(failed) or 'there are no checks'}"
        raise Refused(path, found, "remove the cause, then run again")
    check_artifact(path, Path(run.settings["artifact"]), run.figures)


def check_artifact(path: Path, artifact: Path, figures: dict) -> None:
    """Raises: Refused if there is one, and it is not what the log says."""
    if not artifact.is_file():
        return
    data, logged = artifact.read_bytes(), figures["bytes_model"]
    if len(data) != logged:
        raise Refused(artifact, f"{len(data)} bytes, {logged} in {path}", "give the log of its run")
    found, logged = hashlib.sha256(data).hexdigest(), figures.get("artifact_sha256")
    if logged not in (None, found):
        raise Refused(artifact, f"sha256 {found}, {logged} in {path}", "give the log of its run")


def other_sources(sources: list[str], root: Path) -> int:
    """How many of the logged sources are no file of the program below root."""
    paths = [root / "train_gpt.py", *(root / "systems").glob("*.py")]
    there = {path.read_text("utf-8").rstrip() for path in paths if path.is_file()}
    return sum(source.rstrip() not in there for source in sources)


def read_verified(path: Path, artifact_sha256: str | None) -> dict[str, bool]:
    """The verifier's checks. Raises: Refused if one failed, it did not finish, or it looked at
    another artifact; OSError."""
    text = path.read_text("utf-8", errors="replace")
    checks = re.findall(r"^verify: (\S+) (passed|FAILED)\b", text, re.MULTILINE)
    if failed := [name for name, result in checks if result == "FAILED"]:
        raise Refused(path, f"failed: {', '.join(failed)}", "remove the cause, then run again")
    closing = re.findall(r"^verify: all (\d+) passed$", text, re.MULTILINE)
    if not checks or closing != [str(len(checks))]:
        found = f"{len(checks)} checks, closed by `verify: all {'/'.join(closing) or '?'} passed`"
        raise Refused(path, found, "verify again and keep all that is printed")
    seen = re.search(r"^verify: size passed .*; sha256 ([0-9a-f]{64})\b", text, re.MULTILINE)
    if seen and artifact_sha256 not in (None, seen[1]):
        found = f"of the artifact with sha256 {seen[1]}, not {artifact_sha256}"
        raise Refused(path, found, "verify the artifact of this log")
    return {name: True for name, _ in checks}


def submission(figures: dict, date: str, author=None, github_id=None, verified=None) -> dict:
    """What submission.json says. Scores of the official validation split, trained in one go, with
    training and evaluation within the limit each, stand at the top; any other in `own_text`, with
    its text."""
    in_time = max(figures["wallclock_seconds"], figures["eval_time_seconds"]) <= SECONDS_LIMIT
    resumed = figures.get("resumed", False)
    claimed = in_time and figures["official"] and not resumed
    compliance = {"within_600_seconds_each": in_time, "full_validation_split": figures["official"]}
    compliance |= {"not_resumed": False} if resumed else {}
    compliance |= {name: check["passed"] for name, check in figures["checks"].items()}
    compliance |= {} if verified is None else {"verified": verified}
    name = f"{figures['system']}: {figures['layout']}"
    record = {"author": author, "github_id": github_id, "name": name, "date": date}
    record |= {"track": "10min_16mb"} | {name: figures[name] for name in RUN}
    record |= {name: figures[name] if claimed else None for name in SCORES}
    record["own_text"] = None if claimed else {name: figures[name] for name in TEXT + SCORES}
    record |= {name: figures[name] for name in COSTS + SIZES}
    record["artifact_sha256"] = figures.get("artifact_sha256")
    return record | {"compliance": compliance}


def write(path: Path, record: dict) -> None:
    """The whole file or none. Raises: Refused."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with_what = error.strerror or str(error)
        raise Refused(path, f"cannot be written: {with_what}", "give another path") from None
    finally:
        if temporary.is_file():
            temporary.unlink()


def check_output(path: Path) -> None:
    """Raises: Refused if what stands there is no submission: it is neither replaced nor renamed."""
    if not path.exists():
        return
    try:
        is_submission = "val_bpb" in {**json.loads(path.read_text("utf-8"))}
    except (OSError, TypeError, ValueError, RecursionError):
        is_submission = False
    if not is_submission:
        raise Refused(path, "exists and is no submission", "give another --output")


def set_aside(path: Path) -> str:
    """Renames an earlier run's output, if there is one. Returns what became of it."""
    if not path.exists():
        return ""
    names = (f"{path.name}.old{n or ''}" for n in itertools.count())
    other = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    try:
        path.rename(other)
    except OSError as error:
        return f"; an earlier {path} is still there: {error.strerror}"
    return f"; an earlier {path} is now {other}"


def record(job) -> None:
    """Writes the submission; job: as parsed. Raises: Refused, OSError, ValueError."""
    run = read_run(job.log)
    check_run(job.log, run)
    figures = run.figures | ({"resumed": True} if run.resumed else {})
    sha256 = figures.get("artifact_sha256")
    verified = read_verified(job.verified, sha256) if job.verified else None
    date = datetime.fromtimestamp(job.log.stat().st_mtime, UTC).strftime("%Y-%m-%d")
    people = [os.environ.get(name) or None for name in ("AUTHOR", "GITHUB_ID")]
    write(job.output, submission(figures, date, *people, verified))
    if others := other_sources(run.sources, ROOT):
        found = f"{others} of {len(run.sources)} source files are no longer those of {ROOT}"
        print(f"record: warning: {job.log}: {found}", file=sys.stderr)


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
        check_output(job.output)
    except Refused as error:
        return f"record: {error}"
    try:
        record(job)
    except OSError as error:
        reason = f"{error.filename or job.log}: {error.strerror}: give another path"
    except (Refused, ValueError) as error:
        reason = str(error)
    else:
        return None
    return f"record: {reason}{set_aside(job.output)}"


if __name__ == "__main__":
    sys.exit(main())
