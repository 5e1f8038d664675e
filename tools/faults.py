"""Kills a real run at random moments, looks at what is left, and goes on.

    python tools/faults.py                                    # the table of logs/faults.txt
    python tools/faults.py --moments 2 --stages pack,score    # a part of it

A tiny model is trained, packed and scored, with a checkpoint every EVERY seconds, where an older
run has left artifact, sample, scores, log and submission under the same names. In each stage it is
killed at so many random moments, by SIGKILL and by SIGTERM. Then, of each file, the older one or
the new one must be there, whole; no process, and no lock. RESUME=auto must do what the message at
SIGTERM said, and end with the files and figures of a run that nobody stopped, bit for bit. For the
stage `prepare` see tests/prepare_faults.py.

A run is a fork of this process, which has imported what it needs, and computes nothing itself; what
happens from there on is what `python tools/resumable.py train_gpt.py` does.
"""

import argparse
import collections
import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process that forks must have no threads
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]
import corpus  # noqa: E402  (the paths come first)
import prepare_faults  # noqa: E402
import record  # noqa: E402
import resumable  # noqa: E402

import train_gpt as t  # noqa: E402

STAGES = ("train", "hessians", "quantize", "pack", "score", "prepare")
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}
EVERY = 0.05  # seconds between two checkpoints
LIMIT = 120  # seconds in which a run must end
FILES = ("model.ptz", "model.ptz.sample.npz", "scores.npz")
OLDER = ("logs/older.txt", "submission.json")
CLOCKS = ("wallclock_seconds", "last_read_seconds", "eval_time_seconds", "resumed")
SETTINGS = dict(
    setting.split("=", 1)
    for setting in (
        "MODEL_DIM=64 MLP_MULT=2 GDN_HEADS=2 GDN_KEY_HEADS=1 GDN_HEAD_DIM=16 NUM_HEADS=2 "
        "NUM_KV_HEADS=1 HEAD_DIM=32 WINDOW_SIZE=40 TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=512 "
        "GRAD_ACCUM_STEPS=1 ITERATIONS=10 WARMUP_STEPS=1 MAX_WALLCLOCK_SECONDS=0 "
        "GPTQ_RESERVE_SECONDS=0 GPTQ_CALIBRATION_BATCHES=8 EVAL_SEQ_LEN=64 EVAL_STRIDE=32 "
        "EVAL_CHUNK=32 EVAL_ROWS=8 TTT_LORA_RANK=4 VAL_BATCH_SIZE=512 EVAL_SECONDS=0 "
        "ARTIFACT_TARGET_BYTES=0 SCORES=scores.npz ARTIFACT=model.ptz"
    ).split()
) | {"LAYOUT": "G S2", "CHECKPOINT_EVERY": str(EVERY)}


# --------------------------------------------------------------------------------------------------
# Processes


def fork(folder: Path, env: dict[str, str], job: Callable[[], object], out="out.txt") -> int:
    """The job in a process and session of its own, which prints to folder/out. Returns the process
    id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        sys.stdout = sys.stderr = open(out, "w", buffering=1)
        for standard in (1, 2):
            os.dup2(sys.stdout.fileno(), standard)
        os.environ.clear()
        os.environ.update(env)
        status = status_of(job)
    finally:
        os._exit(status)  # what this process has open is not the child's to close


def status_of(job: Callable[[], object]) -> int:
    """Its exit status, as the interpreter would have it."""
    try:
        code = job()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    return code if isinstance(code, int) else int(code is not None)


def wait(child: int) -> int | None:
    """Its exit status, -N for signal N; None if it had to be ended."""
    for _ in range(100 * LIMIT):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def is_alive(session: int) -> bool:
    """Whether a process of that session's first group is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, 0)
        return True
    return False


def start(folder: Path, env: dict[str, str], say: Callable[[str], None] | None = None) -> int:
    """A run in the folder; say: called in it when a stage begins. Returns the process id."""

    def job():
        if say:
            mark_stages(say)
        return resumable.main(["train_gpt.py"])

    return fork(folder, env, job)


def mark_stages(say: Callable[[str], None]) -> None:
    """Each stage begins with a call of the program."""
    calls = (
        ("train", t.TrainLoader, "__init__"),
        ("hessians", t.TrainLoader, "close"),
        ("quantize", t, "quantize"),
        ("pack", t, "save_artifact"),
        ("score", t, "finish"),
    )
    for stage, owner, name in calls:
        setattr(owner, name, announced(getattr(owner, name), stage, say))


def announced(call: Callable, stage: str, say: Callable[[str], None]) -> Callable:
    def announcing(*args, **kwargs):
        say(stage)
        return call(*args, **kwargs)

    return announcing


# --------------------------------------------------------------------------------------------------
# The scene


def figures_of(log: Path) -> dict:
    """The last that it has, without what a clock has measured, or {}."""
    lines = (
        re.findall(r"^figures: (\{.*\})$", log.read_text("utf-8"), re.M) if log.is_file() else []
    )
    found = json.loads(lines[-1]) if lines else {}
    found.get("checks", {}).pop("time", None)
    return {name: value for name, value in found.items() if name not in CLOCKS}


def finish(folder: Path, job: Callable[[], object]) -> None:
    """The job, in a process of its own. Raises: RuntimeError with what it printed."""
    if wait(fork(folder, dict(os.environ), job)) != 0:
        raise RuntimeError((folder / "out.txt").read_text())


def make_data(folder: Path) -> dict[str, str]:
    """A small dataset below the folder. Returns the settings of a run."""
    texts = (json.dumps({"text": text}) + "\n" for text in corpus.prose())
    (folder / "docs.jsonl").write_text("".join(texts))
    options = "--num-val-docs 12 --vocab-size 384 --name own --output-root data --docs docs.jsonl"
    finish(folder, lambda: prepare_faults.prepare.main(options.split()))
    data, tokenizer = folder / "data/datasets/own", folder / "data/tokenizers/own_384_bpe.model"
    return {"DATA_PATH": str(data), "TOKENIZER_PATH": str(tokenizer), "VOCAB_SIZE": "384"}


class Outcome(NamedTuple):
    found: str  # "older", "between" or "new"
    went_on: str  # "checkpoint", "trained" or "anew"
    faults: list[str]


class Scene:
    """A folder with a finished run, in which another one is started, and what both have made."""

    def __init__(self, folder: Path):
        self.older, self.work = folder / "older", folder / "work"
        self.older.mkdir(parents=True)
        self.env = SETTINGS | make_data(folder)
        self.env |= {"PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1"}
        self.run(self.older, SEED="7", RUN_ID="older")
        finish(self.older, lambda: record.main(["logs/older.txt"]))
        self.restore()
        self.begins = self.run(self.work)
        self.whole = {name: (self.work / name).read_bytes() for name in FILES}
        self.figures = figures_of(self.work / "logs" / "run.txt")
        sha256 = hashlib.sha256(self.whole["model.ptz"]).hexdigest()
        assert self.figures["artifact_sha256"] == sha256
        assert not [n for n in FILES if self.whole[n] == (self.older / n).read_bytes()]

    def restore(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.older, self.work, symlinks=True)

    def run(self, folder: Path, **env: str) -> dict[str, float]:
        """To its end. Returns when each stage began, and "end": perf_counter. Raises: RuntimeError
        with what it printed."""
        begins = {}
        child, stages = self.start(folder, **env)
        with open(stages) as pipe:
            for line in pipe:
                begins[line.strip()] = time.perf_counter()
        begins["end"] = time.perf_counter()
        if wait(child) != 0:
            raise RuntimeError((folder / "out.txt").read_text())
        return begins

    def start(self, folder: Path, **env: str) -> tuple[int, int]:
        """Process id, and what to read the beginnings of stages from."""
        reader, writer = os.pipe()
        env = self.env | {"RUN_ID": "run"} | env
        child = start(folder, env, lambda stage: os.write(writer, f"{stage}\n".encode()))
        os.close(writer)
        return child, reader

    def seconds(self, stage: str) -> float:
        names = [*STAGES[:-1], "end"]
        return self.begins[names[names.index(stage) + 1]] - self.begins[stage]

    def kill(self, stage: str, number: int, share: float) -> Outcome:
        """share: of the stage, before the signal."""
        self.restore()
        child, stages = self.start(self.work)
        with open(stages) as pipe:
            any(line.strip() == stage for line in pipe)  # waits for it
            time.sleep(share * self.seconds(stage))
            os.kill(child, number)
            status = wait(child)
        said = (self.work / "out.txt").read_text("utf-8", errors="replace")
        found, faults = self.look()
        if status not in (0, STATUS[number]):
            faults.append(f"exit status {status}: {said.splitlines()[-1:]}")
        if is_alive(child):
            faults.append("a process is left")
            os.killpg(child, signal.SIGKILL)
        went_on, more = self.go_on()
        faults += more
        if status == STATUS[signal.SIGTERM] and promised(said) != went_on:
            faults.append(f"said {said.splitlines()[-1:]}, went on from {went_on}")
        return Outcome(found, went_on, faults)

    def look(self) -> tuple[str, list[str]]:
        """What is there, and what is wrong with it."""
        faults = []
        kinds = [self.kind_of(name) for name in FILES]
        faults += [
            f"{name} is neither the older nor the new one"
            for name, kind in zip(FILES, kinds, strict=True)
            if not kind
        ]
        for name in OLDER:
            if (self.work / name).read_bytes() != (self.older / name).read_bytes():
                faults.append(f"{name} has changed")
        has_ended = figures_of(self.work / "logs" / "run.txt") != {}
        if has_ended and set(kinds) != {"new"}:
            faults.append(f"figures are logged, files are {kinds}")
        if kinds != sorted(kinds, key=["new", "older", ""].index):
            faults.append(f"a later file is there before an earlier one: {kinds}")
        faults += [f"{path.name} is damaged" for path in self.work.glob("*.pt") if not whole(path)]
        if not is_free(self.work / ".model.ptz.lock"):
            faults.append("the lock is held")
        return "new" if has_ended else "older" if set(kinds) == {"older"} else "between", faults

    def kind_of(self, name: str) -> str:
        content = (self.work / name).read_bytes() if (self.work / name).is_file() else b""
        if content == self.whole[name]:
            return "new"
        return "older" if content == (self.older / name).read_bytes() else ""

    def go_on(self) -> tuple[str, list[str]]:
        """From where RESUME=auto went on, and what is wrong with what it made."""
        log, faults = self.work / "logs" / "run.txt", []
        before = log.stat().st_size if log.is_file() else 0
        child, stages = self.start(self.work, RESUME="auto")
        os.close(stages)
        if status := wait(child):
            last = (self.work / "out.txt").read_text().splitlines()[-1:]
            return "", [f"resumed: exit status {status}: {last}"]
        faults += [f"resumed: another {name}" for name in FILES if self.kind_of(name) != "new"]
        if (figures := figures_of(log)) != self.figures:
            other = [name for name in self.figures if figures.get(name) != self.figures[name]]
            faults.append(f"resumed: other figures: {other}")
        found = re.findall(r"^resumed: model\.ptz\.(\w+)\.pt", log.read_text()[before:], re.M)
        return found[-1] if found else "anew", faults


def promised(said: str) -> str:
    """By the message at SIGTERM."""
    told = r"RESUME=auto (?:goes on from model\.ptz\.(\w+)\.pt|starts (anew))"
    found = re.findall(told, said)
    return "".join(found[-1]) if found else ""


def whole(path: Path) -> bool:
    """Whether each part of a file of torch has its checksum."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except zipfile.BadZipFile:
        return False


def is_free(lock: Path) -> bool:
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


# --------------------------------------------------------------------------------------------------
# The table

COLUMNS = "stage signal moments older between new checkpoint trained anew equal faults".split()


def row(stage: str, number: int, outcomes: list[Outcome]) -> list[str]:
    found = collections.Counter(outcome.found for outcome in outcomes)
    went_on = collections.Counter(outcome.went_on for outcome in outcomes)
    bad = sum(bool(outcome.faults) for outcome in outcomes)
    counts = [len(outcomes), *(found[kind] for kind in ("older", "between", "new"))]
    counts += [went_on[kind] for kind in ("checkpoint", "trained", "anew")]
    counts += [len(outcomes) - bad, bad]
    return [stage, signal.Signals(number).name, *map(str, counts)]


def prepared(folder: Path, moments: int, seed: int) -> dict[int, list[Outcome]]:
    """Of data/prepare.py, by signal: it always goes on from what it finds."""
    outcomes = {number: [] for number in STATUS}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        found = prepare_faults.prepare_faults(folder, len(STATUS) * moments, seed)
    for one in found:
        left = {"old": "older", "none": "between", "new": "new"}.get(one["left"], "")
        faults = [] if left else [f"left {one['left']}"]
        faults += [] if one["finished"] == "new" else [f"the next call left {one['finished']}"]
        number = signal.Signals[one["signal"]]
        outcomes[number].append(Outcome(left, "anew", faults))
    return outcomes


def table(folder: Path, stages: list[str], moments: int, seed: int) -> bool:
    """Prints it, row by row. Returns whether there are no faults."""
    widths = [max(8, len(name)) for name in COLUMNS]
    rng, faults = random.Random(seed), []
    scene = Scene(folder / "run") if set(stages) - {"prepare"} else None
    print("  ".join(map(str.ljust, COLUMNS, widths)), flush=True)
    for stage in stages:
        outcomes = prepared(folder / "prepare", moments, seed) if stage == "prepare" else {}
        for number in STATUS:
            shares = [rng.random() for _ in range(moments)]
            killed = outcomes.get(number) or [scene.kill(stage, number, x) for x in shares]
            print("  ".join(map(str.ljust, row(stage, number, killed), widths)), flush=True)
            name = signal.Signals(number).name
            faults += [f"{stage} {name}: {fault}" for one in killed for fault in one.faults]
    print("\n".join(["", f"faults: {len(faults)}", *faults]))
    return not faults


def main(argv: list[str] | None = None) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--moments", type=int, default=20, help="in each stage, of each signal")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="empty or new; kept")
    args = parser.parse_args(argv)
    stages = args.stages.split(",")
    if other := set(stages) - set(STAGES):
        parser.error(f"--stages {', '.join(other)}: expected some of {', '.join(STAGES)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        return 0 if table(folder, stages, args.moments, args.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
