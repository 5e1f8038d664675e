"""Verify a packed artifact from outside: the program runs as a process, nothing of it is imported
or believed.

    python tools/verify.py --log logs/RUN.txt    # the artifact, text and system of this run
    python tools/verify.py final_model.int6.ptz --data FOLDER --tokenizer MODEL
    python tools/verify.py ... --log logs/RUN.txt --submission submission.json --scores scores.npz
    python tools/verify.py ... --train-script systems/NAME.py    # takes along what it imports
    python tools/verify.py ... --full    # scores the whole text again

Scored again is a sample: the first whole documents of the validation text, whose scores the run
left beside the artifact. Then texts are rewritten in ways that must not move a score. Each process
runs on the CPU with EVAL_ONLY=1, in a new folder that holds copies of the code, the artifact, the
tokenizer and the tokens to score, and sees no variable of the caller but INHERITED. Libraries are
imported once for all processes, by tools/forks.py.

One line a check, `verify: <name> passed|FAILED <figures>`; exit status 0 only if all pass. If the
data are not what they should be, nothing is run. nats are of one target, the next token; sizes are
bytes.
"""

import argparse
import ast
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH
import packed  # noqa: E402  (the path comes first)
from dataset import (  # noqa: E402
    BOS,
    HEADER_BYTES,
    Text,
    check_data,
    check_overlap,
    one_line,
    read_file,
    read_json,
    read_shard,
    read_stats,
    sha256,
    using,
    write_shard,
)
from forks import Forks, end  # noqa: E402
from rules import SIZE_LIMIT  # noqa: E402

import logs  # noqa: E402

PROBE_TOKENS = 4096

# A GPU computes in bf16. What that does to nats was measured on a CPU, bf16 against float32, 5,428
# targets of an older demo's text: G2 S G2 S=2 after 120 steps, G5 S G5 S=5 of 192 dimensions after
# 150, A3 (A3)x3 A5 after 120. The means moved by 2.5e-4, 7.7e-4 and 0.9e-4 (standard errors about
# 2e-4), scores by 0.0105, 0.0130 and 0.0124 in the mean, by 0.07, 0.14 and 0.12 at most. Allowed,
# in nats, is some 2.5 times the largest mean of either kind.
CUDA_MEAN, CUDA_SIZE = 2e-3, 0.03

# lengths of contexts, those of one process together
CONTEXTS = [[63], *(list(range(*ends)) for ends in pairwise((1, 4, 6, 8, 12, 18, 26, 33, 41)))]

STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

INHERITED = re.compile(  # the last three change speed alone, see run.sh
    "PATH|HOME|TMPDIR|LANG|USER|LD_LIBRARY_PATH|(OMP|MKL)_NUM_THREADS|GOMP_SPINCOUNT"
    "|MALLOC_(MMAP_MAX|TRIM_THRESHOLD)_"
)
SETTINGS = dict(
    setting.split("=")
    for setting in (
        "EVAL_ONLY=1 EVAL_SECONDS=0 RUN_ID=verify ARTIFACT=artifact.ptz SCORES=scores.npz "
        "DATA_PATH=data TOKENIZER_PATH=tokenizer.model"
    ).split()
)
# for GNU OpenMP: threads wait briefly, then sleep, where another process holds one of them up
WAITS = {"GOMP_SPINCOUNT": "1000"}
# rows with nothing to read are computed all the same: few of them for short texts
FEW_ROWS = {"EVAL_ROWS": "4", "VAL_BATCH_SIZE": "8192"}
# a stream reads, and adapters learn from, one document after another; windows are read alone
ONE_ROW = {"nproc": 1, "EVAL_ROWS": "1", "VAL_BATCH_SIZE": "1"}
# the least that shows how the artifact is scored
LEAST = ONE_ROW | {"EVAL_SEQ_LEN": "64", "EVAL_STRIDE": "64"}
# SGD runs and stands still; adapters are small, since nothing that they learn is looked at; a chunk
# of a stream ends before its document does, where adapters are forgotten
STILL = {"TTT_LR": "0", "TTT_EPOCHS": "1", "TTT_LORA_RANK": "4", "EVAL_CHUNK": "4"}
MANY_ROWS = {"EVAL_ROWS": "64"}  # for many short documents

NOT_CHECKED = """verify: not checked:
  that training and evaluation took at most 600 s each, and on which hardware:
    the log says so
  that training read no validation text and all its shards; seeds, and how many
    runs there were
  that tokenizer and validation shards are the official ones, beyond documents
    and bytes, and what stats.json says of them
  without --full: scores beyond the sample. The score of the whole text is the
    log's word, or that of the run's score file
  without --full: scores made while learning. They are not repeated; `future`
    shows no use of a target before its score, not the order of updates inside
    the process
  what a clock left unlearned: EVAL_SECONDS=0 stops no learning
  with TTT: isolation and truncation (they run without), and probabilities after
    a step of learning (normalisation sees none)
  what only a GPU or only several ranks do, beyond the sample and inside its
    tolerances
  probes beyond their places: a few cuts, one border, the contexts that
    normalisation names (all but that of 63 end in the first window or chunk of
    a document)
  that the script does not notice that it is probed, and behave differently then
  what the script reads outside its folder: files at absolute paths, the
    network, Python packages"""


# --------------------------------------------------------------------------------------------------
# Files


def read_scores(path: Path, *more: str) -> SimpleNamespace:
    """nats, bytes, position and what else is asked for, [n] each; device, "cpu" if it says none;
    artifact, the sha256 of the one that was scored, "" if it says none."""
    names = ("nats", "bytes", "position", *more)
    with using(path, "a score file"), np.load(path) as file:
        scores, device = {name: file[name] for name in names}, str(file.get("device", "cpu"))
        artifact = str(file.get("artifact", ""))
        if len({x.shape for x in scores.values()}) > 1 or scores["nats"].ndim != 1:
            raise ValueError(f"{', '.join(names)} are not rows of one length")
        if bad := [name for name, x in scores.items() if x.dtype.kind not in "iuf"]:
            raise ValueError(f"{', '.join(bad)} are no numbers")
        return SimpleNamespace(**scores, device=device, artifact=artifact)


def read_log(path: Path) -> SimpleNamespace:
    """Of the last run in a log that trained to its end, or else came to its end: code, settings,
    tokens of its training shards, `figures`, (loss, bpb) of its last `_exact` line, whether it was
    resumed; note: which it is, if others follow it."""
    with using(path, "the log of a run that came to its end"):
        run, note = logs.choose(path, logs.read_runs(path))
        if run.figures is None:
            raise ValueError("no `figures:` of finite numbers in the last line of a run")
        exact = re.findall(r"^final_\w+_exact val_loss:(\S+) val_bpb:(\S+)$", run.text, re.M)
        own = dict(figures=run.figures, exact=exact[-1:], settings=run.settings, note=note)
        own["tokens"] = re.findall(r"^train_loader:.* tokens:(\d+)", run.text, re.M)
        return SimpleNamespace(**own, code=logs.RULE.join(run.sources), resumed=run.resumed)


def read_submission(path: Path) -> dict:
    submission = read_json(path)
    with using(path, "a submission"):
        {**(submission.get("own_text") or {})}
        for name, value in (submission | (submission.get("own_text") or {})).items():
            if name in logs.KINDS and not isinstance(value, (logs.KINDS[name], type(None))):
                raise ValueError(f"{name} is {value!r}")
    return submission


def code_of(script: Path) -> dict[str, Path]:
    """The script, then the files that it imports from its folder and, if that is `systems`, from
    the one above; by the names they have below the upper one. Raises: OSError."""
    root = script.parent.parent if script.parent.name == "systems" else script.parent
    files = [script]
    for path in files:
        with using(path, "a Python script"):
            source = path.read_text("utf-8")
            ast.parse(source, path.name)
        names = re.findall(r"^\s*(?:import|from) (\w+)", source, re.M)
        near = [folder / f"{name}.py" for name in names for folder in {root, script.parent}]
        files += [path for path in dict.fromkeys(near) if path.is_file() and path not in files]
    return {str(path.relative_to(root)): path for path in files}


# --------------------------------------------------------------------------------------------------
# The program


class Stopped(BaseException):
    """By a signal; its number."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A signal to end raises Stopped, so that what was started is ended and folders are removed."""

    def stop(number: int, _frame) -> None:
        for other in handlers:  # once is enough
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    handlers = {number: signal.getsignal(number) for number in STOPS}
    handlers = {
        number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN
    }
    for number in handlers:  # not SIGHUP under nohup
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports as it starts."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def libraries(job) -> list[str]:
    """What the program imports at its start that is none of its own files."""
    own = {Path(name).stem for name in job.code}
    names = dict.fromkeys(name for path in job.code.values() for name in imports(path))
    return [name for name in names if name.partition(".")[0] not in own]


def launch(job, folder: Path, env: dict, nproc: int) -> SimpleNamespace:
    """Runs the program in the folder, with this environment, on so many ranks. Returns: returncode,
    stdout, stderr, seconds. The tests put a function in its place that starts no interpreter."""
    if nproc == 1 and not job.gpu:
        job.forks = job.forks or job.ends.enter_context(Forks(libraries(job), env))
        return job.forks.run(next(iter(job.code)), folder, env)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    ranks = [*torchrun, f"--nproc_per_node={nproc}"] if nproc > 1 else []
    command = [sys.executable, *ranks, next(iter(job.code))]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **pipes)
    try:
        out, error = process.communicate()
    except BaseException:
        end(process)
        raise
    returned = dict(returncode=process.returncode, stdout=out, stderr=error)
    return SimpleNamespace(seconds=time.perf_counter() - start, **returned)


def describe(folder: Path, tokenizer: Path) -> None:
    """stats.json, so that the program takes rewritten text as it is: it is no language, which
    encoded again is other tokens."""
    files = {}
    for path in sorted(folder.glob("fineweb_*.bin")):
        raw = path.read_bytes()
        files[path.name] = {"tokens": (len(raw) - HEADER_BYTES) // 2, "sha256": sha256(raw)}
    stats = {"tokenizer_sha256": sha256(tokenizer.read_bytes()), "files": files}
    (folder / "stats.json").write_text(json.dumps(stats), "utf-8")


def fill(job, folder: Path, ids: np.ndarray | None) -> None:
    """Lays all that the program may see into the folder; ids None = the shards as they are."""
    text, data = job.text, folder / "data"
    copies = job.code | {"artifact.ptz": job.artifact, "tokenizer.model": job.tokenizer}
    copies |= {f"data/{path.name}": path for path in text.shards + text.sidecar if ids is None}
    data.mkdir()
    for name, source in copies.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, folder / name)
    if ids is not None:
        write_shard(data / "fineweb_val_000000.bin", ids)
    if ids is not None and text.sidecar:
        # rewritten text has bytes that nobody knows; of it only nats are compared
        same = np.array_equal(ids, text.ids[: len(ids)])
        sizes = np.concatenate([read_shard(path) for path in text.sidecar])[: len(ids)]
        write_shard(data / "fineweb_val_bytes_000000.bin", sizes if same else np.ones_like(ids))
    describe(data, job.tokenizer)


def execute(job, ids: np.ndarray | None = None, nproc: int = 0, **settings) -> SimpleNamespace:
    """Scores these tokens, int [n], in new processes: nats, bytes, position [n - 1], log, status,
    error, seconds. Raises: RuntimeError with the last line of its errors if it wrote no scores."""
    env = WAITS | {name: text for name, text in os.environ.items() if INHERITED.fullmatch(name)}
    # float32 on a CPU is what a GPU is measured by
    env |= {"CUDA_VISIBLE_DEVICES": ""} if not job.gpu else {}
    with tempfile.TemporaryDirectory() as folder:
        fill(job, Path(folder), ids)
        result = launch(job, Path(folder), env | SETTINGS | settings, nproc or job.nproc)
        path = Path(folder, SETTINGS["SCORES"])
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"(?<!ChildFailed)Error\b", line)]
        error, status = (errors or lines or [""])[-1], result.returncode
        if not path.is_file():
            raise RuntimeError(f"exit status {status}, no scores: {error or 'and no error'}")
        scores = vars(read_scores(path))
    own = {"log": result.stdout, "status": status, "error": error, "seconds": result.seconds}
    return SimpleNamespace(**scores, **own)


class Reading:
    """How the artifact is scored, and what the probes make of that. found: hyperparameters."""

    def __init__(self, found: dict[str, str], nproc: int):
        self.stream, self.ttt = found["eval_mode"] == "stream", found["ttt"]
        names = ("eval_chunk", "eval_chunk") if self.stream else ("eval_seq_len", "eval_stride")
        # tokens of a window, or of a chunk of a stream, and from one to the next
        self.T, self.stride = (int(found[name]) for name in names)
        self.window = int(found["eval_seq_len"])
        self.phases = int(found.get("ttt_phases", 0)) if self.ttt else 0
        self.learns_after = int(found.get("ttt_chunk_tokens", 0))  # targets, before SGD
        sgd = self.ttt == "sgd" or self.phases > 0
        # targets of a step of SGD in a probe, 0 without, and tokens in which all of learning is
        self.sgd_tokens = found["train_seq_len"]
        self.sgd = sgd * nproc * int(self.sgd_tokens)
        self.document = 2 * self.T + self.T // 2 if self.stream else self.T  # of a text laid out
        self.needed = 4 * self.document * (self.phases + 1) + 3 * self.sgd
        # of probes: as much as a window is read before the text, in a stream for nothing
        short = {"EVAL_SEQ_LEN": str(8 * self.T), "EVAL_STRIDE": str(self.T)}
        self.still = {"TTT": ""} | (short if self.stream else {})
        self.learning = {"TTT_CHUNK_TOKENS": self.sgd_tokens}
        wide = {"EVAL_STRIDE": str(max(self.stride, self.T // 4))}
        self.learning |= short if self.stream else wide

    def alike(self, n: int) -> int:
        """How many of the first n targets are scored as if the text ended there. The last of the
        windows starts elsewhere; a stream loses nothing."""
        if self.stream or n <= self.T:
            return n
        return self.T + (n - self.T) // self.stride * self.stride

    def cost(self, ids: np.ndarray, **how) -> int:
        """Tokens that the program computes to score these, about. It reads noise first, then the
        text in windows that do not overlap; to learn takes three times as long as to score."""
        rows, window = int(how.get("EVAL_ROWS", 4)), int(how.get("EVAL_SEQ_LEN", self.window))
        longest = int(np.diff([*np.flatnonzero(ids == BOS), len(ids)]).max())
        tokens = max(longest * rows, len(ids)) + window * rows
        if not self.stream:
            windows = 1 + max(0, len(ids) - window) // int(how.get("EVAL_STRIDE", self.stride))
            tokens = (windows + 1) * window
        return tokens * (4 if self.ttt and how.get("TTT") != "" else 1) + len(ids)


def settings_in(run) -> dict[str, str]:
    """Hyperparameters, as the program logs them."""
    return dict(re.findall(r"^  (\w+): ?(.*)$", run.log, re.M))


def nats_of(job, ids: np.ndarray, **how) -> np.ndarray:
    """nats [n - 1] of these tokens, scored once for all that compare with them; how: as of
    `execute`. In a rehearsal nothing is scored, and its cost is noted."""
    key = ids.astype("<u2").tobytes(), *sorted(how.items())
    if job.costs is not None:
        job.costs[key] = job.reading.cost(ids, **how)
        return np.zeros(len(ids) - 1)
    if key not in job.known:
        job.known[key] = execute(job, ids, **(FEW_ROWS | how)).nats
    return job.known[key]


# --------------------------------------------------------------------------------------------------
# Checks of files


def disagreements(job, own: dict, known: dict) -> list[str]:
    """What the log says and is not so in `own`; what submission.json says and is not in `known`."""
    text = job.submission.get("own_text") or {}
    claims = text | {k: v for k, v in job.submission.items() if v is not None}
    pairs = ("log", job.log.figures, own), ("submission.json", claims, known)
    return [
        f"{source}: {name} {said[name]!r}, not {right[name]!r}"
        for source, said, right in pairs
        for name in sorted(said.keys() & right.keys())
        if said[name] != right[name]
    ]


def check_size(job) -> tuple[bool, str]:
    """The cap, and what log and submission say."""
    code = sum(path.stat().st_size for path in job.code.values())
    model = job.artifact.stat().st_size
    own = {"bytes_code": code, "bytes_model": model, "bytes_total": code + model}
    own["artifact_sha256"] = job.sha256
    text = f"artifact {model} + code {code} = {code + model} of {SIZE_LIMIT} bytes"
    text += f"; sha256 {job.sha256}"
    wrong = disagreements(job, own, own)
    return code + model <= SIZE_LIMIT and not wrong, "; ".join([text, *wrong])


def check_claims(job) -> tuple[bool, str]:
    """Log, submission.json, code, text and sample say the same."""
    text, figures, size = job.text, job.log.figures, int(job.text.sizes.sum())
    own = {"documents": len(text.starts), "bytes": size, "official": text.official}
    wrong = disagreements(job, own, figures | own)
    claimed = [name for name in ("val_bpb", "val_loss") if job.submission.get(name) is not None]
    if claimed and not text.official:
        wrong.append("submission.json claims a score of the official split")
    if claimed and figures and job.log.resumed:
        wrong.append("submission.json claims a score of a run that was resumed")
    wrong += [name for name, right in log_rules(job, size) if not right] if figures else []
    return not wrong, "; ".join(wrong) or f"{len(figures)} figures of the log, nothing disagrees"


def log_rules(job, size: int) -> Iterator[tuple[str, bool]]:
    """(what is wrong with the log, whether all is well). size: bytes of the decoded text."""
    figures, code = job.log.figures, job.code.values()
    loss, bpb = (figures.get(name, math.nan) for name in ("val_loss", "val_bpb"))
    exact = [(f"{loss:.8f}", f"{bpb:.8f}")]
    yield f"figures say {exact}, the _exact line {job.log.exact}", exact == job.log.exact
    implied = loss / math.log(2) * (len(job.text.ids) - 1) / bpb
    yield f"the score implies {implied:.1f} bytes, there are {size}", abs(implied - size) < 1
    checks = figures.get("checks") or {}
    failed = [name for name, check in checks.items() if check["passed"] is not True]
    yield f"checks of the run: {len(checks)}, failed: {failed}", bool(checks) and not failed
    same = [path.read_text("utf-8").strip() in job.log.code for path in code]
    yield "another source ran", all(same)
    said = figures.get("resumed", False)
    yield "it was resumed, its figures do not say so", said or not job.log.resumed
    if "step_stop" in figures:
        yield from training_rules(job.log)
        there = sum(path.stat().st_size - HEADER_BYTES for path in job.training) // 2
        had = not job.training or job.log.tokens in ([], [str(there)])
        yield f"training had shards of {', '.join(job.log.tokens)} tokens, there are {there}", had
    device = "cpu" if str(figures.get("hardware")).endswith("CPU") else "cuda"
    yield f"the sample is not of {device}", not job.sample or job.sample.device == device


def training_rules(log) -> Iterator[tuple[str, bool]]:
    """A rule that a sound training keeps, in words, and whether this one does."""
    figures, settings = log.figures, log.settings
    needed = {"ema_decay", "min_lr", "warmdown_frac"} - settings.keys()
    yield f"its log has no line for {', '.join(sorted(needed))}", not needed
    if needed:
        return
    read, needed = figures["tokens_read"], figures["tokens_needed"]
    yield f"steps and calibration need {needed} tokens, {read} were read", read == needed
    trained, scored = figures["trained_order"], figures["scored_order"]
    yield f"passes through blocks {trained} were trained, {scored} scored", trained == scored
    averaged = figures["raw_val_bpb"] != figures["pre_quant_val_bpb"]
    decay = float(settings["ema_decay"])
    yield f"ema_decay {decay:g}, weights averaged: {averaged}", averaged == (decay > 0)
    # linear to 0 over the last warmdown_frac, but not below min_lr: the last step had at most what
    # is due two steps before the end, or 0.05 more
    floor, frac = float(settings["min_lr"]), max(float(settings["warmdown_frac"]), 1e-9)
    due = min(1.0, max(floor, 2 / max(figures["step_stop"], 1) / frac))
    last = figures["lr_multiplier_at_stop"]
    yield f"the learning rate ended at {last:.3f} of its peak, {due:.3f} is due", last <= due + 0.05


def of_another(job, scores) -> bool:
    """Whether a score file says that it is of another artifact."""
    return scores.artifact not in ("", job.sha256)


def check_positions(job, scores, n: int) -> tuple[bool, str]:
    """Every target of n once and in order, each score finite and not negative."""
    if of_another(job, scores):
        found = f"of another artifact, sha256 {scores.artifact}, not {job.sha256}"
        return False, f"{found}: score this one with EVAL_ONLY=1"
    complete = np.array_equal(scores.position, np.arange(1, n + 1))
    nats = np.concatenate((scores.nats, getattr(scores, "unlearned", [])))
    bad = int((~(np.isfinite(nats) & (nats >= 0))).sum())
    different = f"{len(scores.position)} positions, {len(np.unique(scores.position))} different"
    text = f"{different}, expected 1 to {n} in order; {bad} nats negative or not finite"
    return complete and not bad, text


def check_bytes(job, scores, end: int) -> tuple[bool, str]:
    """The bytes of each document before token `end` against its decoded text; the first BOS is no
    target."""
    sizes = job.text.sizes if end == len(job.text.ids) else job.text.decoded(end)
    starts = job.text.starts[: len(sizes)]
    counted = np.add.reduceat(np.concatenate(([0], scores.bytes)), starts)
    wrong, total = np.flatnonzero(counted != sizes), sizes.sum()
    text = f"counted {counted.sum()}, decoded {total}, {total / (end - 1):.4f} per token"
    text += f", {len(wrong)} of {len(sizes)} documents differ"
    if len(wrong):
        first = wrong[0]
        text += f"; {job.text.told(first)}: counted {counted[first]}, decoded {sizes[first]}"
    return not len(wrong), text


def check_score(job, scores, spread: float) -> tuple[bool, str]:
    """Bits per byte from nats and decoded text, in float64, against the claim of log or submission;
    spread: nats a target by which they may differ, of two processes."""
    bits, size = math.fsum(scores.nats) / math.log(2), int(job.text.sizes.sum())
    own_text = job.submission.get("own_text") or {}
    claims = job.log.figures.get("val_bpb"), job.submission.get("val_bpb"), own_text.get("val_bpb")
    claims = [claim for claim in claims if claim is not None]
    allowed = 1e-9 + spread / math.log(2) * len(scores.nats) / size
    off = max((abs(bits / size - claim) for claim in claims), default=math.nan)
    text = f"bpb {bits / size!r} = {bits:.3f} bits / {size} bytes"
    claimed = f"claimed {claims} (differs by {off:.1e}, {allowed:.1e} allowed)"
    return not off > allowed, f"{text}; {claimed if claims else 'no claim'}"


# --------------------------------------------------------------------------------------------------
# Checks of the program


def check_run(job) -> tuple[bool, str]:
    """The sample is scored without learning; of windows, which overlap, fewer."""
    least = execute(job, job.text.ids[:64], **LEAST)
    found, job.starting = settings_in(least), least.seconds
    stream = found["eval_mode"] == "stream"
    job.ids = job.text.ids[: job.text.end if stream else job.text.first_documents(PROBE_TOKENS)]
    job.run = execute(job, job.ids, TTT="", **FEW_ROWS)
    job.reading = r = Reading(settings_in(job.run) | {"ttt": found["ttt"]}, job.nproc)
    job.rate = r.cost(job.ids, TTT="") / max(job.run.seconds - job.starting, 0.1)
    status = f"exit status {job.run.status} {job.run.error * (job.run.status != 0)}".strip()
    reads = f"a stream in chunks of {r.T}" if r.stream else f"windows of {r.T}, stride {r.stride}"
    figures = f"{len(job.ids)} tokens, {(job.ids == BOS).sum()} documents, {reads}, TTT={r.ttt}"
    return job.run.status == 0, f"{status}; {figures}"


def before_learning(job, n: int) -> np.ndarray:
    """Which of the first n targets are scored before anything can have been learned, bool [n]:
    adapters know nothing in the first chunk of a document, weights in the first segment."""
    r, target, starts = job.reading, np.arange(n), job.text.starts
    if not r.ttt:
        return target >= 0
    start = starts[np.searchsorted(starts, target, side="right") - 1]  # of its document
    phase = math.ceil((len(job.text.ids) - 1) / (r.phases + 1))
    return target < r.learns_after if r.ttt == "sgd" else (start < phase) & (target - start < r.T)


def compare(a: np.ndarray, b: np.ndarray, text: str, limit: float | tuple) -> tuple[bool, str]:
    """Scores of the same targets. limit: nats of each, or of a GPU (CUDA_MEAN, CUDA_SIZE)."""
    if a.shape != b.shape or not len(a):
        return False, f"{text}: {len(a)} and {len(b)} scores"
    moved = np.abs(a - b)
    figures = f"{text}: {len(a)} scores moved by at most {moved.max():.3g}"
    if not isinstance(limit, tuple):
        return bool(moved.max() <= limit), f"{figures}, {limit:g} allowed"
    mean, size = abs((a - b).mean()), moved.mean()
    figures += f", their mean by {mean:.2g}, in the mean by {size:.2g}, {limit} allowed"
    return bool(mean <= limit[0] and size <= limit[1]), figures


def verdict(results: list[tuple[bool, str]]) -> tuple[bool, str]:
    return all(passed for passed, _ in results), "; ".join(figures for _, figures in results)


def check_reproduced(job) -> tuple[bool, str]:
    """The sample again, one row at a time: what a GPU, other rows or learning that is not said did
    to the scores shows. What was scored before it could learn equals what learned nothing."""
    again = nats_of(job, job.ids, TTT="", **ONE_ROW)
    n, results = job.reading.alike(len(again)), []
    text = "in batches against one row at a time"
    results.append(compare(job.run.nats, again, text, job.tolerance))
    if job.sample:
        nats, unlearned = job.sample.nats[:n], job.sample.unlearned[:n]
        limit = (job.cuda_mean, job.cuda_size) if job.cuda else job.tolerance
        results.append(compare(unlearned, again[:n], "the run's without learning", limit))
        text, early = "before it learned against those", before_learning(job, len(nats))
        results.append(compare(nats[early], unlearned[early], text, limit))
    return verdict(results)


# --------------------------------------------------------------------------------------------------
# Probes: the text is rewritten


def laid_out(job, n: int, size: int = 0) -> np.ndarray:
    """n tokens of the validation text, again and again if it is too short, as documents of so many
    tokens; 0 = one document."""
    words = job.text.ids[: 4 * n + 1024]
    ids = np.resize(words[words != BOS], n).astype(np.int64)
    ids[:: size or n] = BOS
    return ids


def rewritten(job, ids: np.ndarray, start: int, end: int | None = None) -> np.ndarray:
    """A copy with other ids, none of them BOS, at start .. end-1."""
    others, out = np.delete(np.arange(job.text.sp.vocab_size()), BOS), ids.astype(np.int64)
    old = out[start:end]
    at = np.random.default_rng(start).integers(len(others), size=len(old))
    out[start:end] = np.where(others[at] == old, others[at - 1], others[at])
    return out


def noise(job, ids: np.ndarray, **how) -> float:
    """Nats by which the same score may differ: with --gpu, where backward passes of attention add
    up in any order, twice what it differs by when the same text is scored twice."""
    if not job.gpu or job.costs is not None:
        return job.probe_tolerance
    again = execute(job, ids, **(FEW_ROWS | how)).nats
    return max(job.probe_tolerance, 2 * float(np.abs(nats_of(job, ids, **how) - again).max()))


def probe_truncation(job) -> tuple[bool, str]:
    """The text ends early, once after three windows or chunks: fewer than a cheat may wait for."""
    r, how, results = job.reading, {"TTT": ""} | ONE_ROW, []
    for n in sorted({3 * len(job.ids) // 4, r.T + 2 * r.stride + 1}):
        if n < len(job.ids):
            whole, cut = (nats_of(job, ids, **how) for ids in (job.ids, job.ids[:n]))
            end, text = r.alike(n - 1), f"cut off after {n} of {len(job.ids)} tokens"
            results.append(compare(whole[:end], cut[:end], text, noise(job, job.ids, **how)))
    return verdict(results)


def cuts(job) -> Iterator[tuple[np.ndarray, int, dict]]:
    """(text, cut, how it is scored), without TTT: the text as it is; then one document, in whose
    later windows no BOS makes a state forgotten that comes from the future. Odd cuts lie inside
    chunks and strides, the other between them."""
    T, stride, stream = job.reading.T, job.reading.stride, job.reading.stream
    ids, how = job.text.ids[: PROBE_TOKENS if stream else T + 2 * stride], job.reading.still
    yield ids, 3 * (len(ids) if stream else min(len(ids), T)) // 4 | 1, how
    ids, how = laid_out(job, T + 4 * stride), how | (ONE_ROW if stream else {})
    for k in (T + stride // 2 | 1, T + 2 * stride):
        yield ids, k, how
        ids = rewritten(job, ids, k)


def learning_cuts(job) -> Iterator[tuple[np.ndarray, int, dict]]:
    """(text, cut, how it is scored), with TTT. Each cut lies inside what is learned from at once:
    a target before it moves if that is learned from before it is scored, or scored again. One more
    lies where SGD has learned. A stream reads documents side by side, of which the later ones may
    teach the earlier ones nothing, then one after another: a cut in the first chunk of a document,
    where adapters are warm, one in the second of the next."""
    r, how = job.reading, job.reading.learning
    T, D, sgd, n = r.T, r.document, r.sgd, r.needed
    ids = laid_out(job, n, D)
    if not r.stream:
        first = 3 * min(T, sgd) // 4 | 1
        yield ids, first, how
        yield rewritten(job, ids, first), ((T + sgd) // sgd + 1) * sgd + sgd // 2 | 1, how
        return
    yield ids, n * 3 // 4 | 1, how
    how = how | ONE_ROW
    yield ids, D + T // 4 | 1, how
    yield ids, 2 * D + T + T // 2 | 1, how
    if sgd:
        learned = sgd * (r.ttt == "sgd") or r.phases * math.ceil((n - 1) / (r.phases + 1))
        border = math.ceil(learned / D) * D  # SGD knows what lies before; cut in its next step
        yield ids, (border + (border + 8) // sgd * sgd + sgd) // 2 | 1, how


def probe_future(job) -> tuple[bool, str]:
    """All tokens from a cut on are replaced: no score of a target before it moves. With TTT: how
    far it had moved them by then, against the same text without it; 0 = nothing to find."""
    results = []
    for ids, k, how in [*cuts(job), *(learning_cuts(job) if job.reading.ttt else [])]:
        before, after = (nats_of(job, x, **how)[: k - 1] for x in (ids, rewritten(job, ids, k)))
        text = f"tokens from {k} of {len(ids)} on replaced{'' if 'TTT' in how else ', TTT'}"
        results.append(compare(before, after, text, noise(job, ids, **how)))
    if job.reading.ttt:
        without = nats_of(job, ids, **(how | {"TTT": ""}))[: k - 1]
        results.append((True, f"TTT had moved them by up to {np.abs(before - without).max():.3g}"))
    return verdict(results)


def probe_isolation(job) -> tuple[bool, str]:
    """All that comes before one document becomes another document. A stream reads them in one row,
    and nothing is learned: from an earlier document a later one may learn."""
    r = job.reading
    size, how = (r.document, ONE_ROW) if r.stream else (r.T // 4 + 5, {})
    ids, border = laid_out(job, max(r.T, 4 * size) + r.stride, size), 2 * size
    other = rewritten(job, ids, 1, border)
    before, after = (nats_of(job, x, **(r.still | how))[border:] for x in (ids, other))
    text = f"all tokens before the document at {border} replaced"
    return compare(before, after, text, noise(job, ids, **(r.still | how)))


def contexts(V: int, budget: int) -> list[list[int]]:
    """Those of CONTEXTS that `budget` has tokens for, beside that of 63; at least 1 to 5."""
    costs = np.cumsum([V * len(lengths) * (lengths[-1] + 1) for lengths in CONTEXTS[1:]])
    return CONTEXTS[: max(3, 1 + int((costs <= budget).sum()))]


def sums(job, lengths: list[int], **how) -> Iterator[float]:
    """Of the probabilities of all ids behind a context of so many tokens of one document each:
    every document takes another id, and is one window, or a chunk where `how` says nothing else."""
    V, L = job.text.sp.vocab_size(), max(lengths) + 1
    ids = np.empty((len(lengths), V, L), np.int64)
    for n, documents in zip(lengths, ids, strict=True):
        documents[:] = laid_out(job, 64 * n + L)[-L:]
        documents[:, 0], documents[:, n] = BOS, np.arange(V)
    how = dict.fromkeys(("EVAL_SEQ_LEN", "EVAL_STRIDE", "EVAL_CHUNK"), str(L)) | MANY_ROWS | how
    nats = nats_of(job, np.append(ids, BOS), **how).reshape(ids.shape)
    for n, documents in zip(lengths, nats, strict=True):
        yield math.fsum(np.exp(-documents[:, n - 1]))


def probe_normalisation(job) -> tuple[bool, str]:
    """The probabilities of the whole vocabulary sum to 1 at several positions of a document: there
    shows a position that sees its own target, or a score that depends on it. Once with TTT, too:
    adapters know nothing of such a document yet, those that learn first do."""
    V, r = job.text.sp.vocab_size(), job.reading
    first, *more = contexts(V, job.normalisation_tokens)
    plan = [(first, {"TTT": "", "EVAL_CHUNK": "32"})]  # behind a chunk, in a stream
    plan += [(lengths, {"TTT": ""}) for lengths in more]
    plan += [([4], STILL | {"TTT_CHUNK_TOKENS": r.sgd_tokens})] if r.ttt else []
    found = []
    for lengths, how in plan:
        found += zip(lengths, sums(job, lengths, **how), strict=True)
    limit = job.normalisation_tolerance
    worst, total = max(found, key=lambda place: abs(place[1] - 1))
    places = ", ".join(str(n) for n, _ in found)
    text = f"{V} probabilities sum to {total:.9f} at worst, behind {worst} tokens"
    right = all(abs(total - 1) <= limit for _, total in found)
    return right, f"{text}, {limit:g} allowed; contexts of {places}"


def probe_rows(job) -> tuple[bool, str]:
    """Adapters learn from the scored targets of their own row. Documents of one length alternate
    between two rows; the second is replaced: the other row, whose first document ends where it
    begins, does not move."""
    D = job.reading.document
    how = job.reading.learning | {"nproc": 1, "EVAL_ROWS": "2", "TTT_PHASES": "0"}
    ids, row = laid_out(job, 6 * D, D), np.arange(6 * D - 1) // D % 2
    before, after = (nats_of(job, x, **how) for x in (ids, rewritten(job, ids, D + 1, 2 * D)))
    learned = np.abs(before - after)[3 * D :][row[3 * D :] == 1].max()
    text = "document 2 of 6 in two rows replaced: in the other row"
    limit = noise(job, ids, **how)
    passed, figures = compare(before[row == 0], after[row == 0], text, limit)
    return passed, f"{figures}; in its own row, where that is learned from, by {learned:.3g}"


PROBES = {
    "truncation": probe_truncation,
    "future": probe_future,
    "isolation": probe_isolation,
    "normalisation": probe_normalisation,
    "rows": probe_rows,
}


# --------------------------------------------------------------------------------------------------
# One after another


def attempt(job, name: str, check, *args) -> bool:
    """Prints the line of a check; a program that does not score fails it."""
    try:
        passed, figures = check(*args)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        passed, figures = False, f"{type(error).__name__}: {one_line(error)}"
    print(f"verify: {name} {'passed' if passed else 'FAILED'} {figures}".rstrip(), flush=True)
    job.passed[name] = bool(passed)
    return job.passed[name]


def attempt_scores(job, prefix: str, scores, spread: float | None, end: int) -> None:
    """The checks of a score file; spread None: it is not of the whole text."""
    if attempt(job, f"{prefix}positions", check_positions, job, scores, end - 1):
        attempt(job, f"{prefix}bytes", check_bytes, job, scores, end)
        if spread is not None:
            attempt(job, f"{prefix}score", check_score, job, scores, spread)


def verify_files(job) -> None:
    attempt(job, "data", check_data, job)
    attempt(job, "size", check_size, job)
    if job.log_path or job.submission_path:
        attempt(job, "claims", check_claims, job)
    if job.training:
        attempt(job, "overlap", check_overlap, job)
    else:
        print(f"verify: overlap: no training shards in {job.data}")
    if job.state_path.is_file():
        attempt(job, "gptq", packed.check_gptq, job.artifact, job.state_path)
    else:
        print(f"verify: no file {job.state_path}: what GPTQ gained is not checked")
    if job.sample:
        attempt_scores(job, "sample_", job.sample, None, job.text.end)
    else:
        print(f"verify: no file {job.sample_path}: what the run scored is not compared")
    if job.scores:
        attempt_scores(job, "claimed_", job.scores, 0.0, len(job.text.ids))
    # what is of another artifact is compared with nothing more
    job.sample, job.scores = (
        scores if scores and not of_another(job, scores) else None
        for scores in (job.sample, job.scores)
    )
    if job.sample and job.scores:
        nats = job.scores.nats[: len(job.sample.nats)]
        attempt(job, "claimed_sample", compare, nats, job.sample.nats, "against the sample", 0.0)


def announce(job, checks: dict) -> None:
    """How long it will take: all checks in a rehearsal, in which nothing is scored."""
    job.costs = {}
    for check in checks.values():
        with contextlib.suppress(ArithmeticError, LookupError, ValueError):
            check(job)
    n, tokens = len(job.costs) + job.full, sum(job.costs.values())
    tokens += job.reading.cost(job.text.ids) if job.full else 0
    seconds, job.costs = n * job.starting + tokens / job.rate, None
    speed = f"{job.starting:.1f} s each and {job.rate:,.0f} tokens a second"
    print(f"verify: about {seconds:,.0f} s: {n} processes, {tokens:,} tokens, {speed}", flush=True)


def score_all(job) -> tuple[bool, str]:
    job.full_run = execute(job)
    return job.full_run.status == 0, f"exit status {job.full_run.status} {job.full_run.error}"


def verify_full(job) -> None:
    """Scores the whole text again, as the run did it."""
    if not attempt(job, "full", score_all, job):
        return
    cuda, nats, end = job.cuda or job.gpu, job.full_run.nats, len(job.text.ids)
    attempt_scores(job, "", job.full_run, job.cuda_mean if cuda else job.tolerance, end)
    if job.scores:
        limit = (job.cuda_mean, job.cuda_size) if cuda else job.tolerance
        attempt(job, "claimed_scores", compare, job.scores.nats, nats, "against --full", limit)


def verify(job) -> dict[str, bool]:
    """All checks, each with a line; what rests on a failed one is left out. job: of `parse`.

    Returns: what passed, by name. Raises: OSError, ValueError for input that cannot be used.
    """
    prepare(job)
    verify_files(job)
    if not job.passed["data"]:
        print("verify: the program is not run: no score on these data would mean anything")
        return job.passed
    with contextlib.ExitStack() as job.ends:
        verify_program(job)
    return job.passed


def verify_program(job) -> None:
    attempt(job, "run", check_run, job)
    if job.run:
        names = [name for name in job.probes if name != "rows" or job.reading.ttt == "lora"]
        checks = {"reproduced": check_reproduced} | {name: PROBES[name] for name in names}
        announce(job, checks)
        for name, check in checks.items():
            attempt(job, name, check, job)
        if job.full:
            verify_full(job)


def prepare(job) -> None:
    """Reads all input. Raises: OSError, ValueError naming the file that cannot be used."""
    job.code = code_of(job.script.resolve())
    job.sample_path = job.sample_path or Path(f"{job.artifact}.sample.npz")
    job.state_path = Path(f"{job.artifact}.trained.pt")
    job.training = sorted(job.data.glob("fineweb_train_[0-9]*.bin"))
    job.sha256 = sha256(read_file(job.artifact, "an artifact"))
    stats = job.data / "stats.json"
    job.stats = read_stats(stats) if stats.exists() else {}
    job.log = read_log(job.log_path) if job.log_path else SimpleNamespace(figures={}, note="")
    job.submission = read_submission(job.submission_path) if job.submission_path else {}
    job.text = Text(job.data, job.tokenizer)
    if not job.text.sizes.any():
        raise ValueError(f"{job.text.shards[0]}: its text has no bytes, nothing can be scored")
    job.scores = read_scores(job.scores_path) if job.scores_path else None
    there = job.sample_path.is_file()
    job.sample = read_scores(job.sample_path, "unlearned") if there else None
    job.cuda = there and job.sample.device != "cpu"
    job.run, job.costs, job.known, job.passed, job.forks = None, None, {}, {}, None
    job.seen = {}  # of each shard its tokens and sha256
    if job.log.note:
        print(f"verify: {job.log.note}")


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def amount(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def parse(argv: list[str] | None = None) -> SimpleNamespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add, root = parser.add_argument, Path(__file__).resolve().parent.parent
    add("artifact", type=Path, nargs="?", help="this and the next three: else as the log has them")
    add("--data", type=Path, help="folder with fineweb_val_*.bin")
    add("--tokenizer", type=Path)
    add("--train-script", type=Path, dest="script", default=root / "train_gpt.py")
    add("--log", type=Path, dest="log_path", help="logs/RUN.txt of the run")
    add("--submission", type=Path, dest="submission_path", help="its submission.json")
    add("--scores", type=Path, dest="scores_path", help="the score file that it wrote")
    add("--sample", type=Path, dest="sample_path", help="its sample; default: beside the artifact")
    add("--full", action="store_true", help="score the whole validation text again")
    add("--gpu", action="store_true", help="score on a GPU where there is one")
    add("--nproc", type=positive, default=1, help="ranks; scores with TTT depend on their number")
    add("--probes", nargs="*", choices=PROBES, default=list(PROBES), help="alone: none")
    add("--normalisation-tokens", type=positive, default=400_000, help="beside those of 63")
    add("--tolerance", type=amount, default=1e-4, help="nats, rounding of batches of another shape")
    add("--probe-tolerance", type=amount, default=1e-6, help="nats, of the same shape on a CPU")
    add("--cuda-mean", type=amount, default=CUDA_MEAN, help="nats")
    add("--cuda-size", type=amount, default=CUDA_SIZE, help="nats")
    add("--normalisation-tolerance", type=amount, default=1e-4, help="of a sum of probabilities")
    job = SimpleNamespace(**vars(parser.parse_args(argv)))
    if None in (job.artifact, job.data, job.tokenizer) and not job.log_path:
        parser.error("expected an artifact, --data and --tokenizer, or the --log that names them")
    return job


def fill_in(job) -> None:
    """What was not given, as the run in the log had it. Raises: OSError, ValueError."""
    if None not in (job.artifact, job.data, job.tokenizer):
        return
    with using(job.log_path, "the log of a run"):
        settings = logs.choose(job.log_path, logs.read_runs(job.log_path))[0].settings
        names = dict(artifact="artifact", data="data_path", tokenizer="tokenizer_path")
        for own, name in names.items():
            setattr(job, own, getattr(job, own) or Path(settings[name]))
        system = settings["system"]
    if job.script.name == "train_gpt.py" and re.fullmatch(r"\w+", system) and system != "record":
        job.script = job.script.with_name("systems") / f"{system}.py"


def main(argv: list[str] | None = None) -> int | str:
    """0 if all checks pass, 1 if one fails, 128 and more if a signal ended it, or a line about the
    input that cannot be used."""
    job = parse(argv)
    try:
        fill_in(job)
        with stoppable():
            passed = verify(job)
    except (OSError, ValueError) as error:
        return f"verify: error: {one_line(error)}"
    except Stopped as stop:
        (number,) = stop.args
        print(f"verify: error: stopped by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + number
    print(NOT_CHECKED)
    if left_out := [name for name in PROBES if name not in passed]:
        print(f"  probes that did not run (rows: TTT=lora only): {' '.join(left_out)}")
    failed = [name for name in passed if not passed[name]]
    text = f"{len(passed)} checks, FAILED: {', '.join(failed)}"
    print(f"verify: {text}" if failed else f"verify: all {len(passed)} passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files, on any terminal
    sys.exit(main())
