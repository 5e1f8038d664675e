"""Verify a packed artifact from outside: train_gpt.py is run as a subprocess, nothing of it is imported or believed.

    python tools/verify.py final_model.int6.ptz --data FOLDER --tokenizer MODEL    # the artifact
    python tools/verify.py ... --submission submission.json --scores scores.npz     # and what a run claimed and wrote

Each process runs with EVAL_ONLY=1 in a new folder with nothing in it but copies of the script, the artifact, the
tokenizer and the tokens to score, and sees no environment variable of the caller but those of INHERITED. One line a
check, `verify: <name> passed|FAILED <figures>`; exit status 0 only if all pass. nats and bits are per target, sizes in
bytes. CPU processes repeat each other exactly; for a GPU raise the tolerances.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sentencepiece as spm

BOS, HEADER_INTS, MAGIC, VERSION = 1, 256, 20240520, 1
SIZE_LIMIT = 16_000_000
OFFICIAL_DOCUMENTS, OFFICIAL_BYTES = 50_000, (151_020_000, 151_090_000)
INHERITED = re.compile(r"(PATH|HOME|TMPDIR|LANG|USER|LD_LIBRARY_PATH|CUDA_VISIBLE_DEVICES|(OMP|MKL)_NUM_THREADS)")
SETTINGS = dict(EVAL_ONLY="1", ARTIFACT="artifact.ptz", DATA_PATH="data", TOKENIZER_PATH="tokenizer.model",
                SCORES="scores.npz", RUN_ID="verify", EVAL_SECONDS="0")
# each document of that probe is one window, or a chunk and one more token: adapters that learn from what is scored have
# learned nothing of it yet, those that learn from it first show; SGD runs and stands still
NORMALISATION = dict(EVAL_SEQ_LEN="64", EVAL_STRIDE="64", EVAL_CHUNK="63", TTT_LR="0", TTT_EPOCHS="1")
# a stream reads, and adapters learn from, one document after another
ONE_ROW = dict(nproc=1, EVAL_ROWS="1")
NOT_CHECKED = """verify: not checked:
  that training took at most 600 s, evaluation 600 s, and on which hardware; the times are the run's own
  that training read no validation text, and all shards it names; nor seeds, and how many runs were not shown
  that the tokenizer and the validation shards are the official ones, beyond documents and bytes
  scores that learn from targets already scored: causality shows no use of a target before its score, not the order of
    updates inside the process; nor what a clock left unlearned, EVAL_SECONDS=0 stops no learning
  with TTT: isolation (it runs without TTT), probabilities after a step of learning (normalisation sees none), and with
    SGD, whose schedule depends on the length of the text, truncation after its first step
  probes beyond their places: the first --probe-tokens tokens, a few cuts, one border, one context of 63 tokens
  that the script does not notice that it is probed and behave differently then
  what the script reads outside its folder: files at absolute paths, the network; the Python packages it imports"""


def read_shard(path: Path) -> np.ndarray:
    """Token ids of one shard, uint16. Raises: ValueError if header or size are not those of a shard."""
    raw = path.read_bytes()
    magic, version, count = np.frombuffer(raw[:12].ljust(12, b"\0"), "<i4").tolist()
    if (magic, version) != (MAGIC, VERSION) or len(raw) != 4 * HEADER_INTS + 2 * count:
        raise ValueError(f"{path}: magic {magic}, version {version}, {count} tokens in {len(raw)} bytes: not a shard")
    return np.frombuffer(raw, "<u2", offset=4 * HEADER_INTS)


def write_shard(path: Path, ids: np.ndarray) -> None:
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, len(ids)
    path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())


def read_text(job) -> None:
    """The validation split and its tokenizer: shards, ids [N], starts of documents, bytes of their decoded text.
    Raises: FileNotFoundError, or ValueError naming the file that does not fit."""
    for path in job.script, job.artifact, job.tokenizer, *filter(None, (job.scores, job.submission)):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    job.shards = sorted(job.data.glob("fineweb_val_[0-9]*.bin"))
    if not job.shards:
        raise FileNotFoundError(f"{job.data}: no file fineweb_val_*.bin in it")
    job.sidecar = sorted(job.data.glob("fineweb_val_bytes_*.bin"))  # CaseOps: the bytes of the original text
    job.sp = load_tokenizer(job.tokenizer)
    for shard, path in zip(arrays := [read_shard(path) for path in job.shards], job.shards, strict=True):
        if len(shard) and shard.max() >= job.sp.vocab_size():
            raise ValueError(f"{path}: token {shard.max()}, {job.tokenizer} has {job.sp.vocab_size()} pieces")
    job.ids = np.concatenate(arrays).astype(np.int64)
    if len(job.ids) < 2 or job.ids[0] != BOS:
        raise ValueError(f"{job.shards[0]}: expected at least 2 tokens, the first of them BOS={BOS}")
    job.starts = np.flatnonzero(job.ids == BOS)
    texts = [job.sp.decode(ids.tolist()) for ids in np.split(job.ids, job.starts[1:])]
    # an operator of CaseOps is no byte of the original, and U+E004 quotes the character after it
    texts = [re.sub("\ue004(.?)|[\ue001-\ue003]", r"\1", text) if job.sidecar else text for text in texts]
    job.text_bytes = np.array([len(text.encode()) for text in texts])
    job.bytes = int(job.text_bytes.sum())
    job.official = len(job.starts) == OFFICIAL_DOCUMENTS and OFFICIAL_BYTES[0] <= job.bytes <= OFFICIAL_BYTES[1]


def load_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """Raises: ValueError if the file is no SentencePiece model, or its BOS is not that of the shards."""
    try:
        sp = spm.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise ValueError(f"{path}: not a SentencePiece model") from None
    if sp.bos_id() != BOS:
        raise ValueError(f"{path}: BOS is {sp.bos_id()}, expected {BOS}")
    return sp


def read_scores(path: Path, label: str) -> SimpleNamespace:
    """nats, bytes, position of a score file. Raises: ValueError if it has no such three rows of one length."""
    try:
        with np.load(path) as file:
            scores = SimpleNamespace(label=label, **{name: file[name] for name in ("nats", "bytes", "position")})
    except Exception as error:  # whatever numpy says of a file that is no archive
        raise ValueError(f"{path}: not a score file: {error}") from None
    if len({array.shape for array in (scores.nats, scores.bytes, scores.position)}) != 1 or scores.nats.ndim != 1:
        raise ValueError(f"{path}: nats, bytes and position differ in shape")
    return scores


def execute(job, ids=None, nproc=None, **overrides) -> SimpleNamespace:
    """Scores these tokens (None = the validation shards as they are) in new processes: scores, log, status, error.
    Raises: RuntimeError with the last line of its errors if it wrote no scores."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "data").mkdir()
        copies = [(job.script, "train_gpt.py"), (job.artifact, "artifact.ptz"),
                  (job.tokenizer, "tokenizer.model")]
        for source, name in copies + [(path, f"data/{path.name}") for path in job.shards + job.sidecar if ids is None]:
            shutil.copyfile(source, folder / name)
        if ids is not None:
            write_shard(folder / "data" / "fineweb_val_000000.bin", ids)
        if ids is not None and job.sidecar:  # rewritten text has bytes that nobody knows, and only nats are compared
            write_shard(folder / "data" / "fineweb_val_bytes_000000.bin", np.ones_like(ids))
        env = {name: value for name, value in os.environ.items() if INHERITED.fullmatch(name)} | SETTINGS | overrides
        nproc = nproc or job.nproc
        ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        command = [sys.executable, *(ranks if nproc > 1 else []), "train_gpt.py"]
        result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        errors = [line for line in result.stderr.splitlines() if re.search(r"(?<!ChildFailed)Error\b", line)]
        error = (errors or result.stderr.strip().splitlines() or [""])[-1]
        if not (folder / SETTINGS["SCORES"]).is_file():
            raise RuntimeError(f"exit status {result.returncode}, no scores: {error}")
        scores = read_scores(folder / SETTINGS["SCORES"], "re-run")
    return SimpleNamespace(scores=scores, log=result.stdout, status=result.returncode, error=error)


def read_submission(path: Path | None) -> dict:
    """Raises: ValueError if the file holds no JSON object."""
    try:
        submission = json.loads(path.read_text()) if path else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(submission, dict):
        raise ValueError(f"{path}: not a JSON object")
    return submission


def check_run(job) -> tuple[bool, str]:
    job.run = execute(job)
    settings = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
    return job.run.status == 0, f"exit status {job.run.status} under {settings} {job.run.error * (job.run.status != 0)}"


def check_size(job) -> tuple[bool, str]:
    """The cap, and the submission's own figure if there is one."""
    sizes = job.artifact.stat().st_size, job.script.stat().st_size
    claimed = job.claims.get("bytes_total")
    return (sum(sizes) <= SIZE_LIMIT and claimed in (None, sum(sizes)),
            f"artifact {sizes[0]} + script {sizes[1]} = {sum(sizes)} of {SIZE_LIMIT} bytes, submission.json: {claimed}")


def check_positions(job, scores) -> tuple[bool, str]:
    """Every target once and in order, each score finite and not negative."""
    complete = np.array_equal(scores.position, np.arange(1, len(job.ids)))
    bad = int((~(np.isfinite(scores.nats) & (scores.nats >= 0))).sum())
    return complete and not bad, (f"{len(scores.position)} positions, {len(np.unique(scores.position))} different, "
                                  f"expected 1 to {len(job.ids) - 1} in order; {bad} nats negative or not finite")


def check_bytes(job, scores) -> tuple[bool, str]:
    """The bytes of each document in the score file against its decoded text; the first BOS is no target."""
    counted = np.add.reduceat(np.concatenate(([0], scores.bytes)), job.starts)
    wrong, total = int((counted != job.text_bytes).sum()), job.bytes
    return not wrong, (f"counted {counted.sum()}, decoded {total}, {total / (len(job.ids) - 1):.4f} per token, {wrong} "
                       f"of {len(counted)} documents differ, official split: {'yes' if job.official else 'no'}")


def claimed_bpb(job, own: str) -> Iterator[tuple[str, float, float]]:
    """(source, bits per byte, tolerance) of each claim; `own` is the source that must agree without job.tolerance."""
    spread = job.tolerance / math.log(2) * (len(job.ids) - 1) / job.bytes
    if job.submission:
        top = job.claims.get("val_bpb")
        value = top if top is not None else (job.claims.get("own_text") or {}).get("val_bpb")
        honest = value is not None and (top is None or job.official)  # at the top stand scores of the official split
        yield "submission.json", float(value) if honest else math.nan, 1e-9 + spread * (own != "claimed")
    spread *= own != "re-run"
    lines = re.findall(r"^audit: \w+ (?:passed|FAILED) (\{.*\})$", job.run.log, re.M)
    full = [value for line in lines if (value := json.loads(line).get("val_bpb")) is not None]
    rounded = re.findall(r"^final_(?!\w*_roundtrip_)\w+_exact val_loss:\S+ val_bpb:(\S+)$", job.run.log, re.M)
    if full:
        yield "log, full precision", full[-1], 1e-9 + spread
    yield "log, 8 decimals", float(rounded[-1]) if rounded else math.nan, 5.001e-9 + spread


def check_score(job, scores) -> tuple[bool, str]:
    """Bits per byte from the nats and the decoded text, in float64, against every claim there is of it."""
    bits, total = math.fsum(scores.nats) / math.log(2), job.bytes
    claims = list(claimed_bpb(job, scores.label))
    texts = [f"{source} {value!r} (differs by {abs(bits / total - value):.1e}, {allowed:.1e} allowed, implies "
             f"{bits / value:.1f} bytes)" for source, value, allowed in claims]
    return (all(abs(bits / total - value) <= allowed for _, value, allowed in claims),
            f"bpb {bits / total!r} = {bits:.3f} bits / {total} bytes; " + "; ".join(texts))


def check_equal(job, scores) -> tuple[bool, str]:
    """The score file of the run itself against the re-run."""
    again = job.run.scores
    same = np.array_equal(scores.position, again.position) and np.array_equal(scores.bytes, again.bytes)
    moved = np.abs(scores.nats - again.nats).max() if scores.nats.shape == again.nats.shape else math.inf
    return same and moved <= job.tolerance, f"positions and bytes equal: {same}, nats differ by at most {moved:.3g}"


def compare(a: np.ndarray, b: np.ndarray, tolerance: float, text: str) -> tuple[bool, str]:
    moved = np.abs(a - b).max() if a.shape == b.shape and len(a) else math.inf
    return bool(moved <= tolerance), f"{text}: {len(a)} scores moved by at most {moved:.3g}, {tolerance:g} allowed"


def plan_probes(job) -> tuple[bool, str]:
    """What the probes need: how the evaluation reads and learns, as the program logs it, and the text to rewrite.
    Raises: ValueError if the text is too short for the windows or chunks of the evaluation."""
    found = dict(re.findall(r"^  (eval_\w+|ttt\w*|train_seq_len): ?(.*)$", job.run.log, re.M))
    job.stream, job.ttt = found.get("eval_mode") == "stream", found.get("ttt", "")
    lengths = ("eval_chunk", "eval_chunk") if job.stream else ("eval_seq_len", "eval_stride")
    job.T, job.stride = (int(found.get(name, 2048)) for name in lengths)
    job.phases = int(found.get("ttt_phases", 0)) if job.ttt else 0
    rows = job.nproc * int(found.get("train_seq_len", 2048))  # of whole ones SGD makes a chunk; 0 = no SGD
    whole = max(1, int(found.get("ttt_chunk_tokens", 32768)) // rows) * rows
    job.sgd_chunk = whole if job.ttt == "sgd" or job.phases else 0
    job.document = 2 * job.T + job.T // 2 if job.stream else job.T  # tokens of one that a probe lays out
    job.needed = 4 * job.document * (job.phases + 1) + 3 * job.sgd_chunk if job.ttt else 0  # by the cuts with TTT
    job.text = job.ids[: min(max(job.probe_tokens, 3 * job.T, job.needed), len(job.ids) * 3 // 4)]
    if len(job.text) < 3 * job.T - 64:
        raise ValueError(f"{len(job.ids)} validation tokens are too few for probes of 3 x {lengths[0].upper()}={job.T}")
    reads = f"stream in chunks of {job.T}" if job.stream else f"windows of {job.T}, stride {job.stride}"
    learns = f", TTT={job.ttt}" + f", SGD on chunks of {job.sgd_chunk}, {job.phases} phases" * bool(job.sgd_chunk)
    return True, f"{len(job.text)} tokens, {(job.text == BOS).sum()} documents, {reads}" + learns * bool(job.ttt)


def nats_of(job, ids: np.ndarray, **how) -> np.ndarray:
    """nats of these tokens, scored once for all the probes that compare with them; how: as of `execute`."""
    key = ids.tobytes(), *sorted(how.items())
    if key not in job.known:
        job.known[key] = execute(job, ids, **how).scores.nats
    return job.known[key]


def rewritten(job, ids: np.ndarray, start: int, end: int) -> np.ndarray:
    """A copy with other ids, none of them BOS, at start .. end-1."""
    others, out = np.delete(np.arange(job.sp.vocab_size()), BOS), ids.copy()
    at = np.random.default_rng(start).integers(len(others), size=end - start)
    out[start:end] = np.where(others[at] == ids[start:end], others[at - 1], others[at])
    return out


def laid_out(job, n: int) -> np.ndarray:
    """n tokens of the validation text, again and again if it is too short, as documents of job.document tokens."""
    ids = np.resize(job.ids[job.ids != BOS], n)
    ids[:: job.document] = BOS
    return ids


def settings_of(how: dict) -> str:
    return f" ({text})" if (text := " ".join(f"{k}={v}" for k, v in how.items() if k.isupper())) else ""


def probe_truncation(job) -> tuple[bool, str]:
    """The validation text ends early. The last of the windows starts elsewhere, and what it scores is left out; a
    stream loses nothing but what is cut off. SGD follows a schedule that depends on the length of the text."""
    n, text = len(job.text) - 1, f"text cut off after {len(job.text)} of {len(job.ids)} tokens"
    end = n if job.stream else job.T + (n - job.T) // job.stride * job.stride
    if job.sgd_chunk:
        end = min(end, job.sgd_chunk if job.ttt == "sgd" else -(-n // (job.phases + 1)))
        text += ", scores before the first step of SGD (the length sets the others' schedule: they are not checked)"
    return compare(job.run.scores.nats[:end], nats_of(job, job.text)[:end], job.tolerance, text)


def cuts(job) -> Iterator[tuple[np.ndarray, int, dict]]:
    """(text, cut, how it is scored), without TTT. The first cut is in the first window of the text as it is; what
    follows it is one document, cut again and again, since a state that comes from the future is forgotten at the next
    document. Odd cuts lie inside chunks and strides, those at multiples of 64 between them."""
    T, n, zone = job.T, len(job.text), job.T + -(-job.T // job.stride) * job.stride
    odd = min((zone + job.stride // 2) | 1, (n - 8) | 1)
    places, ids = ((3 * T // 4) | 1, (T + zone) // 128 * 64, odd, (odd + n) // 128 * 64), job.text
    for k in sorted({k for k in places if places[0] <= k < n}):
        yield ids, k, {}
        ids = rewritten(job, ids, k, n)


def learning_cuts(job) -> Iterator[tuple[np.ndarray, int, dict]]:
    """(text, cut, how it is scored), with TTT. Each cut lies inside what is learned from at once, so that a target
    before it moves if that is learned from before it is scored, or scored again. One more lies where SGD has learned.
    A stream reads documents side by side, of which the later ones may teach the earlier ones nothing, and then one
    after another: a cut in the first chunk of a document, where adapters are warm, one in the second of the next."""
    T, D, chunk, n = job.T, job.document, job.sgd_chunk, job.needed
    if not job.stream:
        text, first = job.text if len(job.text) >= n else np.resize(job.ids, n), 3 * min(T, chunk) // 4 | 1
        yield text, first, {}
        yield rewritten(job, text, first, len(text)), ((T + chunk) // chunk + 1) * chunk + chunk // 2 | 1, {}
        return
    yield job.text, len(job.text) * 3 // 4 | 1, {}
    yield laid_out(job, n), D + T // 4 | 1, ONE_ROW
    yield laid_out(job, n), 2 * D + T + T // 2 | 1, ONE_ROW
    if chunk:
        learned = max(chunk * (job.ttt == "sgd"), job.phases * -(-(n - 1) // (job.phases + 1)))
        border = -(-learned // D) * D  # SGD has learned from what lies before; the cut is inside the next of its chunks
        yield laid_out(job, n), (border + (border + 8) // chunk * chunk + chunk) // 2 | 1, ONE_ROW


def probe_future(job) -> tuple[bool, str]:
    """All tokens from a cut on are replaced: no score of a target before it moves. With TTT: how far it had moved them
    by then, against the same text without it; 0 = there was nothing to find."""
    results = []
    for ids, k, how in learning_cuts(job) if job.ttt else cuts(job):
        before, after = (nats_of(job, text, **how)[: k - 1] for text in (ids, rewritten(job, ids, k, len(ids))))
        results.append(compare(before, after, job.tolerance,
                               f"tokens from {k} of {len(ids)} on replaced{settings_of(how)}"))
        if not results[-1][0]:
            break
    else:
        if job.ttt:
            taught = np.abs(before - nats_of(job, ids, **how | dict(TTT=""))[: k - 1]).max()
            results.append((True, f"TTT had moved them by up to {taught:.3g}"))
    return all(passed for passed, _ in results), "; ".join(figures for _, figures in results)


def probe_isolation(job) -> tuple[bool, str]:
    """All that comes before one document, near the middle of the text, becomes another document. A stream reads them
    in one row, and nothing is learned: from an earlier document a later one may learn."""
    borders = np.flatnonzero(job.text[:-1] == BOS)[1:]
    if not len(borders):
        raise ValueError(f"one document in {len(job.text)} tokens, raise --probe-tokens")
    border = int(borders[np.abs(borders - len(job.text) // 2).argmin()])
    how = (ONE_ROW if job.stream else {}) | (dict(TTT="") if job.ttt else {})
    before, after = (nats_of(job, ids, **how)[border:] for ids in (job.text, rewritten(job, job.text, 1, border)))
    return compare(before, after, job.isolation_tolerance,
                   f"all tokens before the document at {border} replaced{settings_of(how)}")


def probe_normalisation(job) -> tuple[bool, str]:
    """For each id of the vocabulary a document of 64 tokens: the same 63, then that id. Its probabilities sum to 1."""
    V = job.sp.vocab_size()
    context = np.append(BOS, job.text[job.text != BOS][:62])
    ids = np.append(np.column_stack((np.tile(context, (V, 1)), np.arange(V))), BOS)
    nats = nats_of(job, ids, **NORMALISATION)
    total = math.fsum(np.exp(-nats[len(context) - 1 :: len(context) + 1][:V]))
    return (abs(total - 1) <= job.normalisation_tolerance, f"probabilities of {V} ids sum to {total:.9f}, "
            f"{job.normalisation_tolerance:g} allowed{settings_of(NORMALISATION)}")


def probe_rows(job) -> tuple[bool, str]:
    """Adapters learn from the scored targets of their own row. Documents of one length alternate between two rows; the
    second is replaced: the other row, whose first document ends where it begins, does not move."""
    D, how = job.document, dict(nproc=1, EVAL_ROWS="2", TTT_PHASES="0")
    ids, row = laid_out(job, 6 * D), np.arange(6 * D - 1) // D % 2
    before, after = (nats_of(job, text, **how) for text in (ids, rewritten(job, ids, D + 1, 2 * D)))
    learned = np.abs(before - after)[3 * D :][row[3 * D :] == 1].max()
    passed, figures = compare(before[row == 0], after[row == 0], job.tolerance,
                              f"document 2 of 6 in two rows replaced{settings_of(how)}: in the other row")
    return passed, f"{figures}; in its own row, where that is learned from, by {learned:.3g}"


PROBES = dict(truncation=probe_truncation, future=probe_future, isolation=probe_isolation,
              normalisation=probe_normalisation, rows=probe_rows)


def attempt(job, name: str, check, *args) -> bool:
    """Prints the line of a check; a program that does not score fails it."""
    try:
        passed, figures = check(job, *args)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        passed, figures = False, str(error)
    print(f"verify: {name} {'passed' if passed else 'FAILED'} {figures}".rstrip(), flush=True)
    job.passed.append(passed)
    return passed


def verify(job) -> None:
    """All checks in turn; what rests on a failed one is left out."""
    attempt(job, "size", check_size)
    attempt(job, "run", check_run)
    if not job.run:
        return
    files = [("", job.run.scores)] + [("claimed_", scores) for scores in [job.scores] if scores]
    for prefix, scores in files:
        if prefix:
            attempt(job, "claimed_scores", check_equal, scores)
        if attempt(job, f"{prefix}positions", check_positions, scores):
            attempt(job, f"{prefix}bytes", check_bytes, scores)
            attempt(job, f"{prefix}score", check_score, scores)
    if job.probes and attempt(job, "probes", plan_probes):
        job.probes = [name for name in job.probes if name != "rows" or job.ttt == "lora"]
        for name in job.probes:
            attempt(job, name, PROBES[name])


def parse(argv) -> SimpleNamespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with fineweb_val_*.bin")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--train-script", type=Path, dest="script",
                        default=Path(__file__).resolve().parent.parent / "train_gpt.py")
    parser.add_argument("--submission", type=Path, help="submission.json of the run")
    parser.add_argument("--scores", type=Path, help="score file that the run wrote")
    parser.add_argument("--probes", nargs="*", choices=PROBES, default=list(PROBES), help="default all; alone: none")
    parser.add_argument("--probe-tokens", type=int, default=8192,
                        help="more are taken if windows, chunks or what SGD learns from ask for them")
    parser.add_argument("--nproc", type=int, default=1, help="ranks; with TTT, scores depend on their number")
    parser.add_argument("--tolerance", type=float, default=0.0, help="nats, between two processes")
    parser.add_argument("--isolation-tolerance", type=float, default=0.0, help="nats, after another document")
    parser.add_argument("--normalisation-tolerance", type=float, default=1e-4)
    return SimpleNamespace(**vars(parser.parse_args(argv)))


def main(argv=None) -> int | str:
    """The exit status: 0 if all checks pass, 1 if one fails, or a line about the input that cannot be used."""
    job = parse(argv)
    job.run, job.known, job.passed = None, {}, []
    try:
        read_text(job)
        job.claims = read_submission(job.submission)
        job.scores = read_scores(job.scores, "claimed") if job.scores else None
    except (OSError, ValueError) as error:
        return f"verify: error: {error}"
    verify(job)
    left_out = " ".join(name for name in PROBES if name not in job.probes)
    print(NOT_CHECKED + f"\n  probes not asked for, or (rows) without TTT=lora: {left_out}" * bool(left_out))
    failed = job.passed.count(False)
    print(f"verify: {len(job.passed)} checks, {failed} FAILED" if failed else f"verify: all {len(job.passed)} passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
