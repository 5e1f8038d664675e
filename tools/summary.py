"""Sums up a finished run in at most 15 lines, as ./run.sh does at its end.

    python tools/summary.py logs/RUN.txt

Reads the log, logs/RUN.verify.txt and submission.json if they are there, and the validation text,
to compare it with general compressors. The seconds of the verifier and of what no line of the log
tells are known to run.sh only.
"""

import argparse
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]  # not there with PYTHONSAFEPATH
import dataset  # noqa: E402  (the paths come first)
import prepare  # noqa: E402
import record  # noqa: E402
from rules import SIZE_LIMIT  # noqa: E402

import logs  # noqa: E402

WIDTH, LABEL = 80, 14  # columns
SETTINGS = ("artifact", "data_path", "tokenizer_path")  # that are looked up
# bytes of text for the compressors: 4 s on one core, and 0.05 bits per byte above what 4 MB need
COMPRESSED = 2_000_000


class Job(NamedTuple):
    log: Path
    run: logs.Run
    program_took: float | None
    verifier_took: float | None

    @property
    def figures(self) -> dict:
        return self.run.figures

    @property
    def verifier_log(self) -> Path:
        return self.log.with_suffix(".verify.txt")

    def last(self, pattern: str) -> str | None:
        """What stands last in the log in place of the group."""
        found = re.findall(pattern, self.run.text, re.M)
        return found[-1] if found else None


def read_job(log: Path, program_took=None, verifier_took=None) -> Job:
    """Raises: OSError, ValueError naming the log if its run did not train to its end."""
    run, _ = logs.choose(log, logs.read_runs(log))
    missing = [name for name in record.REQUIRED if name not in (run.figures or {})]
    missing += [name for name in SETTINGS if name not in run.settings]
    if missing or not run.trained:
        raise ValueError(f"{log}: no run that trained and came to its end, so no summary")
    return Job(log, run, program_took, verifier_took)


# --------------------------------------------------------------------------------------------------
# What is said


def headline(job: Job) -> str:
    f = job.figures
    resumed = f | ({"resumed": True} if job.run.resumed else {})
    claimed = record.submission(resumed, "")["own_text"] is None
    if claimed:
        text = "Official validation split"
    elif f["official"]:
        text = "Official split, but no score to claim"
        text += " (resumed)" if job.run.resumed else " (over 600 s)"
    else:
        text = f"Own text of {f['bytes']:,} bytes, no official score"
    return f"{text}: {f['system']}, {f['step_stop']:,} steps, {f['hardware']}"


def scores(job: Job) -> Iterator[str]:
    f = job.figures
    name = job.last(r"^(final_int\d+_\S+)_exact ") or ""
    quantized = job.last(r"^final_int\d+_roundtrip .*val_bpb: ?(\S+)")
    text = f"{f['raw_val_bpb']:.4f} last weights, {f['pre_quant_val_bpb']:.4f} averaged"
    bits = f"int{job.run.settings.get('matrix_bits', '')}"
    yield text + (f", {float(quantized):.4f} quantized to {bits}" if quantized else "")
    how = "sliding windows" if "sliding_window" in name else "a stream"
    learning = re.search(r"_ttt_(\w+)", name)
    how += f", learning from what is scored ({learning[1]})" if learning else ", nothing learned"
    yield f"{f['val_bpb']:.4f} final pass: {how}"
    yield compressors(job)


def compressors(job: Job) -> str:
    """What brotli and xz need for the run's validation text, or its beginning."""
    settings = job.run.settings
    try:
        text = dataset.Text(*(Path(settings[name]) for name in ("data_path", "tokenizer_path")))
    except (OSError, ValueError):
        text = None
    if text is None or len(text.starts) != job.figures["documents"]:
        return f"brotli, xz: not tried, its text is not in {Path(settings['data_path'])}"
    data = beginning(text)
    found = prepare.compressor_bpb(data)
    part = "of the same text"
    if COMPRESSED <= len(data) < job.figures["bytes"]:
        part = f"of its first {len(data) / 1e6:.1f} of {job.figures['bytes'] / 1e6:.1f} MB"
    return f"{found['brotli-11']:.4f} brotli -11, {found['xz-9e']:.4f} xz -9e, {part}"


def beginning(text: dataset.Text) -> bytes:
    """The first COMPRESSED bytes of the decoded documents."""
    found, size = [], 0
    for start, end in pairwise([*text.starts.tolist(), len(text.ids)]):
        document = text.sp.decode(text.ids[start : min(end, start + COMPRESSED)].tolist())
        found.append((prepare.decode_case(document) if text.sidecar else document).encode())
        size += len(found[-1])
        if size >= COMPRESSED:
            break
    return b"".join(found)[:COMPRESSED]


def sizes(job: Job) -> str:
    f = job.figures
    share = f"{100 * f['bytes_total'] / SIZE_LIMIT:.1f} %"
    return (
        f"{f['bytes_total']:,} = artifact {f['bytes_model']:,} + code {f['bytes_code']:,}, "
        f"{share} of {SIZE_LIMIT / 1e6:g} MB"
    )


def seconds(job: Job) -> str:
    """By stage; no line of the log tells set-up, packing and comparisons: `rest`."""
    f = job.figures
    training = int(job.last(r"\btrain_time: ?(\d+)ms") or 0) / 1000
    stages = dict(training=training, Hessians=f["wallclock_seconds"] - training)
    stages |= {"final pass": f["eval_time_seconds"]}
    rest = (job.program_took or 0) - sum(stages.values())
    if rest > 0 and not job.run.resumed:
        stages["rest"] = rest
    if job.verifier_took is not None:
        stages["verifier"] = job.verifier_took
    return ", ".join(f"{name} {amount:.0f}" for name, amount in stages.items())


def checks(job: Job) -> str:
    audit = {name: check["passed"] is True for name, check in job.figures["checks"].items()}
    return f"audit {counted(audit)}; verifier {verified(job)}"


def counted(results: dict[str, bool]) -> str:
    failed = [name for name, passed in results.items() if not passed]
    text = f"{len(results) - len(failed)} of {len(results)} passed"
    return text + (f", FAILED: {', '.join(failed)}" if failed else "")


def verified(job: Job) -> str:
    path = job.verifier_log
    if not path.is_file():
        return "not run"
    text = path.read_text("utf-8", errors="replace")
    sha256 = job.figures.get("artifact_sha256")
    if sha256 and f"sha256 {sha256}" not in text:
        return f"not run on this artifact ({path} is of another)"
    found = re.findall(r"^verify: (\S+) (passed|FAILED)\b", text, re.M)
    ended = re.search(r"^verify: (all \d+ passed|\d+ checks, FAILED: .*)$", text, re.M)
    results = counted({name: result == "passed" for name, result in found})
    return results + ("" if ended else ", did not come to its end")


def files(job: Job) -> str:
    """Those that are there; NAME{,.a,.b} is NAME, NAME.a and NAME.b, as in a shell."""
    settings = job.run.settings
    artifact = Path(settings["artifact"])
    added = [x for x in (".sample.npz", ".trained.pt") if Path(f"{artifact}{x}").is_file()]
    found = [str(artifact) + braced(added)] if artifact.is_file() else []
    found += ["submission.json"] if is_submitted(job) else []
    logged = [".verify"] if job.verifier_log.is_file() else []
    found += [str(job.log.with_suffix("")) + braced(logged) + job.log.suffix]
    found += [path for path in [settings.get("scores", "")] if path and Path(path).is_file()]
    found += [f"plots/{job.log.stem}.*"] if any(Path("plots").glob(f"{job.log.stem}.*")) else []
    return " ".join(found)


def braced(added: list[str]) -> str:
    return f"{{,{','.join(added)}}}" if added else ""


def is_submitted(job: Job) -> bool:
    """Whether there is a submission.json, and of this run."""
    try:
        found = {**json.loads(Path("submission.json").read_text("utf-8"))}
    except (OSError, TypeError, ValueError):
        return False
    return found.get("artifact_sha256") == job.figures.get("artifact_sha256") is not None


def next_steps(job: Job) -> dict[str, list[str]]:
    """A command each, in words."""
    python, log, f = relative(sys.executable), str(job.log), job.figures
    submit = ["AUTHOR=NAME", "GITHUB_ID=ID", python, "tools/record.py", "folder", log]
    elsewhere = ["./run.sh", "# on 8 H100, where it takes the official text"]
    return {
        "submit": submit if f["official"] else elsewhere,
        "verify again": [python, "tools/verify.py", "--log", log],
        "change": [f"SYSTEM={f['system']}"] * (f["system"] != "record")
        + ["MATRIX_LR=0.03", "./run.sh", "# see HELP=1 ./run.sh"],
    }


def relative(path: str) -> str:
    here = os.path.relpath(path)
    return path if here.startswith("..") else here


# --------------------------------------------------------------------------------------------------
# How it stands there


def row(label: str, text: str) -> list[str]:
    options = dict(break_long_words=False, break_on_hyphens=False)
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{label:{LABEL}}", subsequent_indent=" " * LABEL, **options
    )


def command(label: str, words: list[str]) -> list[str]:
    """It may be copied: quoted, and a line that goes on ends in a backslash."""
    lines = [""]
    for word in (word if word[0] == "#" else shlex.quote(word) for word in words):
        if lines[-1] and LABEL + len(f"{lines[-1]} {word}") > WIDTH - 2:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".lstrip()
    labels = [label, *[""] * len(lines)]
    ends = [" \\"] * (len(lines) - 1) + [""]
    return [f"{a:{LABEL}}{b}{c}" for a, b, c in zip(labels, lines, ends, strict=False)]


def page(job: Job) -> list[str]:
    lines = textwrap.wrap(headline(job), WIDTH)
    for i, text in enumerate(filter(None, scores(job))):
        lines += row("" if i else "bits per byte", text)
    lines += row("bytes", sizes(job))
    lines += row("seconds", seconds(job))
    lines += row("checks", checks(job))
    lines += row("files", files(job))
    for label, words in next_steps(job).items():
        lines += command(label, words)
    return lines


def main(argv: list[str] | None = None) -> str | None:
    parser = argparse.ArgumentParser(description="Sums up a finished run.")
    parser.add_argument("log", type=Path, help="logs/RUN.txt")
    parser.add_argument("--program-took", type=float, help="seconds, from its start to its end")
    parser.add_argument("--verifier-took", type=float, help="seconds")
    args = parser.parse_args(argv)
    try:
        print("\n".join(page(read_job(args.log, args.program_took, args.verifier_took))))
    except (OSError, ValueError) as error:
        return f"summary: {error}"
    return None


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files, on any terminal
    sys.exit(main())
