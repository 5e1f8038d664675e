"""From the logs of finished runs to a submission.

    python tools/record.py LOG --verified LOG.verify.txt --output submission.json
    python tools/record.py folder LOG [LOG ...] --title TITLE --against FOLDER
    python tools/record.py compare LOG|FOLDER [...] --against LOG|FOLDER|MEAN [...]
    python tools/record.py check FOLDER [--against LOG|FOLDER|MEAN ...]

The first writes the submission.json of one run, as ./run.sh does. All numbers come from `figures:
{...}`, the last line of the last run in the log that trained to its end; the artifact that it
names, if it is there, must be the one that it scored, by its sha256. AUTHOR and GITHUB_ID are
environment variables. A run that is refused leaves one line on stderr, exit status 1 and no output
file; an earlier one, which must not pass for this run's, is kept as submission.json.old. Seconds
are wall time, sizes bytes, bpb bits per byte, loss nats per token.

`folder` writes a record's folder from the logs of its seeds, each verified: LOG.verify.txt beside
logs/LOG.txt. What is wrong is a line each on stderr, exit status 1, and no folder. `compare` tests
whether scores are lower than others, in anybody's logs. `check` lists what a reviewer would ask of
a folder, whoever made it; exit status 1 if there is something.
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
import compare  # noqa: E402  (the path comes first)
import dialects  # noqa: E402
import folder  # noqa: E402
import review  # noqa: E402
from rules import OTHER_TRACK, RECORD_TRACK, SECONDS_LIMIT, SEEDS  # noqa: E402

import logs  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
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
    """Raises: Refused if the run did not train or failed its audit."""
    if run.settings["eval_only"] != "False":
        raise Refused(path, "a run with EVAL_ONLY", "give the log of the run that trained")
    if missing := [name for name in REQUIRED if name not in run.figures]:
        raise Refused(path, f"no figures for {', '.join(missing)}", "give the log of a whole run")
    checks = run.figures["checks"]
    failed = [name for name, check in checks.items() if check["passed"] is not True]
    if failed or not checks:
        found = f"failed in its audit: {', '.join(failed) or 'there are no checks'}"
        raise Refused(path, found, "remove the cause, then run again")


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
    record |= {"track": RECORD_TRACK} | {name: figures[name] for name in RUN}
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
    check_artifact(job.log, Path(run.settings["artifact"]), run.figures)
    figures = run.figures | ({"resumed": True} if run.resumed else {})
    sha256 = figures.get("artifact_sha256")
    verified = read_verified(job.verified, sha256) if job.verified else None
    date = datetime.fromtimestamp(job.log.stat().st_mtime, UTC).strftime("%Y-%m-%d")
    people = [os.environ.get(name) or None for name in ("AUTHOR", "GITHUB_ID")]
    write(job.output, submission(figures, date, *people, verified))
    if others := other_sources(run.sources, ROOT):
        found = f"{others} of {len(run.sources)} source files are no longer those of {ROOT}"
        print(f"record: warning: {job.log}: {found}", file=sys.stderr)


def submission_command(argv: list[str]) -> str | None:
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


# --------------------------------------------------------------------------------------------------
# A record's folder


def read_seed(log: Path) -> tuple[folder.Seed | None, list[str]]:
    """A run and its verification; and what is wrong with either, a line each."""
    wrong, verified = [], {}
    try:
        run = read_run(log)
        check_run(log, run)
    except OSError as error:
        return None, [f"{log}: {error.strerror}: give a log"]
    except (Refused, ValueError) as error:
        return None, [str(error)]
    sha256, beside = run.figures.get("artifact_sha256"), log.with_suffix(".verify.txt")
    try:
        verified = read_verified(beside, sha256)
        if sha256 is None or sha256 not in beside.read_text("utf-8", errors="replace"):
            wrong = [f"{beside}: names no artifact of {log}: verify it, and keep what is printed"]
    except OSError as error:
        wrong = [
            f"{log}: not verified: {beside}: {error.strerror}: run tools/verify.py, see run.sh"
        ]
    except Refused as error:
        wrong = [str(error)]
    runs = logs.read_runs(log)
    number = next(i for i, other in enumerate(runs, 1) if other.text == run.text)
    place = f"run {number} of the {len(runs)} that its log held" if len(runs) > 1 else ""
    report = dialects.Report(log, run.text, tuple(run.sources), run.versions, run.figures)
    return folder.Seed(log, run, report, verified, place), wrong


def wanted_of(job, seeds: list[folder.Seed]) -> folder.Wanted:
    """Title, date and track, as asked or as the runs have them."""
    figures = seeds[0].figures
    title = job.title or f"{figures['system']}, {figures['layout']}"
    slug = job.slug or re.sub(r"[^A-Za-z0-9.-]+", "_", title).strip("_.")
    latest = max(seed.log.stat().st_mtime for seed in seeds)
    date = job.date or datetime.fromtimestamp(latest, UTC).strftime("%Y-%m-%d")
    official = all(seed.figures["official"] for seed in seeds)
    track = job.track or (RECORD_TRACK if official else OTHER_TRACK)
    return folder.Wanted(title, slug, job.blurb, job.author, job.github_id, date, track)


def check_wanted(wanted: folder.Wanted, target: Path) -> list[str]:
    wrong = []
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", wanted.slug):
        wrong.append(f"--slug {wanted.slug!r}: expected letters, digits, and . _ -")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", wanted.date):
        wrong.append(f"--date {wanted.date!r}: expected YYYY-MM-DD")
    if target.exists():
        wrong.append(f"{target}: exists, and is never overwritten: give another --slug or --date")
    return wrong


def comparison_of(job, seeds: list[folder.Seed]) -> list[str]:
    """Lines of the comparison that is asked for. Raises: OSError, ValueError."""
    if not job.against:
        return []
    ours = [str(seed.log) for seed in seeds]
    return compare.lines_of(compare.read_side(ours), compare.read_side(job.against))


def refuse(wrong: list[str]) -> str | None:
    return "\n".join(f"record: {line}" for line in wrong) or None


def parse_folder(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="record.py folder")
    add, tracks = parser.add_argument, [RECORD_TRACK, OTHER_TRACK]
    add("logs", type=Path, nargs="+", metavar="LOG", help="logs/RUN.txt, a seed each")
    add("--title", help="of README and submission.json; else system and layout")
    add("--slug", help="of the folder's name; else from the title")
    add("--blurb", help="a sentence or two for README and submission.json")
    add("--author", default=os.environ.get("AUTHOR") or None, help="else AUTHOR")
    add("--github-id", default=os.environ.get("GITHUB_ID") or None, help="else GITHUB_ID")
    add("--date", help="YYYY-MM-DD; else the day of the last log, in UTC")
    add("--track", choices=tracks, help="else by whether the text is the official split")
    add("--against", nargs="+", metavar="LOG|FOLDER|MEAN", help="the record to beat")
    add("--requirements", type=Path, default=ROOT / "requirements.txt")
    add("--output", type=Path, default=Path("records"), help="where the tracks' folders are")
    return parser.parse_args(argv)


def attempt(wrong: list[str], make, *arguments):
    """What it makes; or None, and one more line of what is wrong."""
    try:
        return make(*arguments)
    except ValueError as error:
        wrong.append(str(error))
    except OSError as error:
        wrong.append(f"{error.filename}: {error.strerror}")


def folder_command(argv: list[str]) -> str | None:
    """None if the folder is written, or a line for each thing that is wrong."""
    job = parse_folder(argv)
    found = [read_seed(log) for log in job.logs]
    wrong, seeds = [line for _, lines in found for line in lines], [x for x, _ in found if x]
    if not seeds:
        return refuse(wrong)
    wanted = wanted_of(job, seeds)
    target = job.output / f"track_{wanted.track}" / f"{wanted.date}_{wanted.slug}"
    wrong += folder.complaints(seeds, wanted.track) + check_wanted(wanted, target)
    sources = attempt(wrong, folder.name_sources, seeds[0], ROOT)
    requirements = attempt(wrong, job.requirements.read_text, "utf-8")
    comparison = attempt(wrong, comparison_of, job, seeds)
    if wrong:
        return refuse(wrong)
    try:
        folder.write(target, folder.files_of(seeds, wanted, sources, requirements, comparison))
    except OSError as error:
        return f"record: {target}: cannot be written: {error.strerror}: give another --output"
    warn_of(seeds, wanted, sources)
    print(target)
    return None


def warn_of(seeds, wanted, sources) -> None:
    """What does not stand in the way of a folder, on stderr."""
    warnings = []
    if others := folder.changed(sources, ROOT):
        warnings.append(
            f"{', '.join(others)}: as they ran, from the log; no longer those of {ROOT}"
        )
    if len(seeds) < SEEDS and wanted.track == RECORD_TRACK:
        warnings.append(f"{len(seeds)} of the {SEEDS} seeds of which a leaderboard row is the mean")
    for line in warnings:
        print(f"record: warning: {line}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Comparison and review


def compare_command(argv: list[str]) -> str | None:
    parser = argparse.ArgumentParser(prog="record.py compare")
    parser.add_argument("ours", nargs="+", metavar="LOG|FOLDER")
    parser.add_argument("--against", nargs="+", required=True, metavar="LOG|FOLDER|MEAN")
    job = parser.parse_args(argv)
    try:
        sides = compare.read_side(job.ours), compare.read_side(job.against)
    except OSError as error:
        return f"record: {error.filename}: {error.strerror}: give a log, a folder or a mean"
    except ValueError as error:
        return f"record: {error}"
    print("\n".join(compare.lines_of(*sides)))
    return None


def check_command(argv: list[str]) -> str | int:
    """0 if there is nothing to ask, 1 if there is, or a line if there is no folder."""
    parser = argparse.ArgumentParser(prog="record.py check")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", nargs="+", default=[], metavar="LOG|FOLDER|MEAN")
    job = parser.parse_args(argv)
    try:
        lines, asked = review.lines_of(job.folder, job.against)
    except OSError as error:
        return f"record: {error.filename}: {error.strerror}: give the folder of a submission"
    except ValueError as error:
        return f"record: {error}"
    print("\n".join(lines))
    return int(asked)


COMMANDS = {"folder": folder_command, "compare": compare_command, "check": check_command}


def main(argv=None) -> str | int | None:
    """None or 0 if all is well, or what is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    return submission_command(argv)


if __name__ == "__main__":
    sys.exit(main())
