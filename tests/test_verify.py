"""tools/verify.py on trial: it agrees with an honest run to the last digit and names what is wrong with any other.

In the copies of train_gpt.py that hold a bug the audit is silent, so that the verifier alone can catch it. Most of a
process's time is the import of torch: all but one are forked from a process that has done that.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from corpus import NORMAL, edit_pieces, load, prose, tokenizer_model, write_corpus, write_shard

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]

import prepare  # noqa: E402  (the paths come first)
import verify  # noqa: E402

SMALL = dict(
    PRESET="demo", LAYOUT="G S", MODEL_DIM="32", GDN_HEAD_DIM="16", HEAD_DIM="16", WINDOW_SIZE="40",
    TRAIN_SEQ_LEN="64", TRAIN_BATCH_TOKENS="512", EVAL_SEQ_LEN="64", EVAL_STRIDE="32", VAL_BATCH_SIZE="4096",
    NGRAM_VOCAB_SIZE="256", NGRAM_DIM="16", ITERATIONS="40", MAX_WALLCLOCK_SECONDS="0", GPTQ_CALIBRATION_BATCHES="8",
    WARMUP_STEPS="1", RUN_ID="run", SCORES="scores.npz", EVAL_MODE="sliding", TTT="",
)
SILENT = [("    def verdict(self) -> None:\n", "    def verdict(self) -> None:\n        return\n")]
LEARNING = dict(TRAIN_SEQ_LEN="64", TTT_CHUNK_TOKENS="64", EVAL_CHUNK="32", EVAL_ROWS="8", VAL_BATCH_SIZE="256")
STREAM = LEARNING | dict(EVAL_MODE="stream")
MODES = {  # how an artifact may say that it is to be scored
    "sliding": {}, "sliding sgd": LEARNING | dict(TTT="sgd"), "stream": STREAM, "stream sgd": STREAM | dict(TTT="sgd"),
    "lora": STREAM | dict(TTT="lora"), "lora in phases": STREAM | dict(TTT="lora", TTT_PHASES="1"),
}
CHILD = """
import os, runpy, sys
os.chdir(cwd), os.environ.clear(), os.environ.update(env)
for number, name in (1, "out"), (2, "err"):
    os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
sys.argv[:] = command
runpy.run_path(command[0], run_name="__main__")
"""


def train(folder: Path, **corpus) -> None:
    """A finished run in the folder: artifact, score file, submission.json."""
    settings = SMALL | {name.upper(): str(value) for name, value in corpus.items()}
    env = {name: value for name, value in os.environ.items() if verify.INHERITED.fullmatch(name)} | settings
    result = subprocess.run([sys.executable, ROOT / "train_gpt.py"], cwd=folder, env=env | {"OMP_NUM_THREADS": "1"},
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of one finished run, with its data."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").mkdir()
    train(folder, **write_corpus(folder / "data", train_tokens=12_000, val_tokens=1_500))
    return folder


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """subprocess.run of a script, without a new interpreter."""
    folder, context = tmp_path_factory.mktemp("forked"), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload("torch._dynamo torch.nn.attention.varlen sentencepiece brotli zstandard".split())

    def run(command, cwd, env, **_):
        names = dict(cwd=str(cwd), env=env, folder=str(folder), command=command[1:])
        process = context.Process(target=exec, args=(CHILD, names))
        process.start()
        process.join()
        out, err = ((folder / name).read_text() for name in ("out", "err"))
        return SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err)

    return run


@pytest.fixture
def check(trained, forked, monkeypatch, capsys):
    """check(*options, artifact, tokenizer, mode) -> exit status, names of the failed checks, all that was printed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=forked))

    def run(*options, artifact="final_model.int6.ptz", tokenizer="data/tokenizer.model", data="data", mode="sliding"):
        monkeypatch.setattr(verify, "SETTINGS", verify.SETTINGS | MODES[mode])
        arguments = trained / artifact, "--data", trained / data, "--tokenizer", trained / tokenizer, *options
        status = verify.main([str(argument) for argument in arguments])
        text = capsys.readouterr().out
        return SimpleNamespace(status=status, failed=set(re.findall(r"^verify: (\w+) FAILED", text, re.M)), text=text)

    return run


@pytest.fixture(scope="session")
def rerun(trained):
    """What the program makes of the artifact: for checks that look at files only."""
    job = SimpleNamespace(script=ROOT / "train_gpt.py", artifact=trained / "final_model.int6.ptz", nproc=1,
                          tokenizer=trained / "data/tokenizer.model", sidecar=[],
                          shards=[trained / "data/fineweb_val_000000.bin"])
    return verify.execute(job)


def planted(folder: Path, *edits: tuple[str, str]) -> Path:
    """A copy of train_gpt.py with each text replaced, which must be there exactly once, and a silent audit."""
    source = (ROOT / "train_gpt.py").read_text()
    for old, new in [*SILENT, *edits]:
        assert source.count(old) == 1, f"the place of the bug is not there once but {source.count(old)} times: {old!r}"
        source = source.replace(old, new)
    path = folder / "planted.py"
    path.write_text(source)
    return path


def test_an_honest_run_passes_every_check(trained, check, monkeypatch):
    """And nothing of the caller feeds the score: neither its environment nor what lies beside the artifact."""
    for name, value in dict(EVAL_STRIDE="16", LAYOUT="G", VOCAB_SIZE="9", DATA_PATH="nowhere").items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(trained)
    result = check("--submission", trained / "submission.json", "--scores", trained / "scores.npz")
    assert result.status == 0 and not result.failed, result.text
    names = re.findall(r"^verify: (\w+) passed", result.text, re.M)
    assert names == ("size run positions bytes score claimed_scores claimed_positions claimed_bytes claimed_score "
                     "probes truncation future isolation normalisation").split()
    own = json.loads((trained / "submission.json").read_text())["own_text"]
    bpb = float(re.search(r"^verify: score passed bpb (\S+)", result.text, re.M)[1])
    assert bpb == pytest.approx(own["val_bpb"], abs=1e-9) and f"/ {own['bytes']} bytes" in result.text
    assert "not checked:" in result.text and "EVAL_SEQ_LEN=64 EVAL_STRIDE=64" in result.text


def test_the_same_from_a_process_of_its_own(trained, check, monkeypatch):
    monkeypatch.setattr(verify, "subprocess", subprocess)
    result = check("--submission", trained / "submission.json", "--scores", trained / "scores.npz", "--probes")
    assert result.status == 0 and not result.failed, result.text


def moved(text: str, check: str) -> list[tuple[int, float]]:
    """(scores compared, by how much they moved) of each comparison in the line of a check."""
    line = re.search(rf"^verify: {check} \w+ (.*)$", text, re.M)[1]
    return [(int(n), float(by)) for n, by in re.findall(r"(\d+) scores moved by at most ([^,]+),", line)]


@pytest.mark.parametrize("mode, probes, compared", [
    ("stream", "truncation isolation future", dict(truncation=[599], future=[24, 80, 319])),
    ("lora", "truncation future", dict(truncation=[599], future=[450, 88, 208])),
    ("lora in phases", "truncation isolation normalisation rows future",
     dict(truncation=[416], rows=[240], future=[624, 88, 208, 496])),
    ("sliding sgd", "truncation isolation normalisation future", dict(truncation=[64], future=[48, 224])),
    ("stream sgd", "truncation future", dict(truncation=[64], future=[450, 88, 208, 104])),
])
def test_an_honest_run_passes_in_every_mode(check, mode, probes, compared):
    """To the bit; and where SGD follows a schedule that is as long as the text, the line says what is not compared."""
    result = check("--probe-tokens", 600, "--probes", *probes.split(), mode=mode)
    assert result.status == 0 and not result.failed, result.text
    for name, counts in compared.items():
        assert moved(result.text, name) == [(n, 0.0) for n in counts], result.text
    taught = re.findall(r"TTT had moved them by up to (\S+)|where that is learned from, by (\S+)", result.text)
    assert len(taught) == (mode != "stream") + ("rows" in probes)
    assert all(float(ahead or row) > 1e-4 for ahead, row in taught)
    assert ("the others' schedule: they are not checked" in result.text) is (mode not in ("stream", "lora"))
    assert mode == "stream" or "isolation" not in probes or re.search(r"isolation passed .*TTT=\)", result.text)


def test_a_run_that_learned_from_the_text_is_verified(trained, check, tmp_path):
    """The artifact itself says how; the score that counts is the last one in the log."""
    train(tmp_path, data_path=trained / "data", tokenizer_path=trained / "data/tokenizer.model",
          vocab_size=load(tokenizer_model()).vocab_size(), **MODES["lora"])
    result = check("--submission", tmp_path / "submission.json", "--scores", tmp_path / "scores.npz", "--probes",
                   artifact=tmp_path / "final_model.int6.ptz")
    assert result.status == 0 and not result.failed, result.text
    assert result.text.count("log, 8 decimals") == 2


def test_transformed_text_is_verified_by_its_original(check, tmp_path):
    """CaseOps: a sidecar holds the bytes of the original, which the verifier decodes."""
    for name, texts in ("docs", prose()[30:200]), ("val", prose()[:30]):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    prepare.main(["--docs", str(tmp_path / "docs.jsonl"), "--val-docs", str(tmp_path / "val.jsonl"), "--caseops",
                  "--vocab-size", "400", "--name", "cased", "--output-root", str(tmp_path)])
    data, tokenizer = tmp_path / "datasets" / "cased", tmp_path / "tokenizers" / "cased_400_bpe_caseops.model"
    train(tmp_path, data_path=data, tokenizer_path=tokenizer, vocab_size=400)
    result = check("--submission", tmp_path / "submission.json", "--probes", "normalisation",
                   artifact=tmp_path / "final_model.int6.ptz", tokenizer=tokenizer, data=data)
    assert result.status == 0 and not result.failed, result.text
    decoded = json.loads((data / "stats.json").read_text())["val"]["bytes"]
    assert f"decoded {decoded}," in result.text


def test_the_verifier_shares_no_code_with_the_program():
    source = (ROOT / "tools" / "verify.py").read_text()
    assert not re.search(r"import\s+train_gpt|from\s+train_gpt|import torch|importlib", source)


def test_an_artifact_with_one_flipped_byte_does_not_run(trained, check):
    data = bytearray((trained / "final_model.int6.ptz").read_bytes())
    data[len(data) // 2] ^= 1
    (trained / "flipped.ptz").write_bytes(data)
    result = check(artifact="flipped.ptz")
    assert result.status == 1 and result.failed == {"run"} and "damaged" in result.text


def drop(scores):
    return {name: np.delete(array, 700) for name, array in scores.items()}


def lower(scores):
    scores["nats"][700] -= 1e-3
    return scores


def swap(scores):
    return {name: array[[1, 0, *range(2, len(array))]] for name, array in scores.items()}


def move_a_byte(scores):
    at = np.flatnonzero(scores["bytes"] > 1)[0]
    scores["bytes"][at] -= 1
    scores["bytes"][-1] += 1
    return scores


@pytest.mark.parametrize("change, failed", [
    (drop, {"claimed_positions", "claimed_scores"}), (lower, {"claimed_scores", "claimed_score"}),
    (swap, {"claimed_positions", "claimed_scores"}), (move_a_byte, {"claimed_scores", "claimed_bytes"}),
], ids=["one position dropped", "one score lowered", "two positions swapped", "a byte moved to another document"])
def test_a_changed_score_file_is_named(trained, rerun, check, tmp_path, monkeypatch, change, failed):
    monkeypatch.setattr(verify, "execute", lambda job: rerun)
    np.savez(tmp_path / "changed.npz", **change(dict(np.load(trained / "scores.npz"))))
    result = check("--probes", "--scores", tmp_path / "changed.npz", "--submission", trained / "submission.json")
    assert result.status == 1 and result.failed == failed, result.text


@pytest.mark.parametrize("change, failed", [
    (lambda s: s["own_text"].update(val_bpb=s["own_text"]["val_bpb"] - 1e-8), {"score"}),
    (lambda s: s.update(val_bpb=s["own_text"]["val_bpb"]), {"score"}),  # at the top: the official split
    (lambda s: s.update(own_text=None), {"score"}),
    (lambda s: s.update(bytes_total=s["bytes_total"] - 1), {"size"}),
], ids=["lowered", "other text", "nothing", "size"])
def test_a_changed_submission_is_named(trained, rerun, check, tmp_path, monkeypatch, change, failed):
    monkeypatch.setattr(verify, "execute", lambda job: rerun)
    submission = json.loads((trained / "submission.json").read_text())
    change(submission)
    (tmp_path / "submission.json").write_text(json.dumps(submission))
    result = check("--probes", "--submission", tmp_path / "submission.json")
    assert result.status == 1 and result.failed == failed, result.text


@pytest.mark.parametrize("off, failed", [(0, set()), (2e-9, {"score"})])
def test_a_claim_of_full_precision_in_the_log_is_found(trained, rerun, check, monkeypatch, off, failed):
    bpb = json.loads((trained / "submission.json").read_text())["own_text"]["val_bpb"]
    line = f'audit: claim passed {{"val_bpb": {bpb + off!r}}}\n'
    monkeypatch.setattr(verify, "execute", lambda job: SimpleNamespace(**vars(rerun) | dict(log=rerun.log + line)))
    result = check("--probes")
    assert result.failed == failed and "log, full precision" in result.text


def test_a_tokenizer_whose_table_and_text_disagree(trained, check, tmp_path):
    """A space inside a piece: three bytes to the table, one in the text."""
    model = tokenizer_model()
    sp = load(model)
    ids = np.fromfile(trained / "data/fineweb_val_000000.bin", "<u2", offset=1024)
    used = next(int(i) for i in ids if sp.id_to_piece(int(i)).isalpha() and len(sp.id_to_piece(int(i))) == 2)
    first, second = sp.id_to_piece(used)
    (tmp_path / "edited.model").write_bytes(edit_pieces(model, {used: (f"{first}\u2581{second}", NORMAL)}))
    result = check("--probes", "--train-script", planted(tmp_path), tokenizer=tmp_path / "edited.model")
    assert result.status == 1 and result.failed == {"bytes", "score"}, result.text


DELTA = """gated_delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta,
                                    memory.pop(0) if memory is not None else None)"""
SOFTCAP = "        return cap * torch.tanh(self.lm_head(norm(x)).float() / cap)\n"
TOKENS = "        self.paths, self.tokens = stream.paths, stream.read(0, len(stream)).to(DEVICE)\n"
LUT = 'base = len(piece.removeprefix("\\u2581").encode()) if plain'
BUGS = {
    "a state that starts where the sequence ends": ("future", {"future"}, [
        (f"        o, state = {DELTA}", f"        o, state = {DELTA.replace('else None', f'else {DELTA}[1]')}"),
        (", RESET_LOG_DECAY)", ", 0.0)")]),
    "the statistics of all validation text": ("truncation", {"truncation"}, [
        ("log = logging.getLogger(\"train_gpt\")\n", "log = logging.getLogger(\"train_gpt\")\nCOUNTS = []\n"),
        (TOKENS, TOKENS + "        COUNTS[:] = torch.bincount(self.tokens, minlength=hp.vocab_size).tolist()\n"),
        (SOFTCAP, SOFTCAP.rstrip() + " + torch.tensor(COUNTS).log1p()\n")]),
    "a bonus for the target": ("normalisation", {"normalisation"}, [
        ("    nats_of = functools.partial(token_nats, model)\n",
         "    def nats_of(x, y):\n        return (token_nats(model, x, y) - 0.01).clamp(min=0)\n\n")]),
    "the target among the inputs": ("normalisation", {"normalisation"}, [
        ("bigram ^ (51497 * shift(ids, 2))", "bigram ^ (51497 * ids.roll(-1, 1))")]),
    "a document that goes on into the next": ("isolation", {"isolation"}, [
        (", RESET_LOG_DECAY)", ", 0.0)")]),
    "a leading space counted twice": (None, {"bytes", "score"}, [
        (LUT, LUT.replace(" if", ' + piece.startswith("\\u2581") if'))]),
    "the last targets dropped": (None, {"positions"}, [
        (TOKENS, TOKENS.replace("len(stream))", "(len(stream) - 1) // 64 * 64 + 1)"))]),
}


@pytest.mark.parametrize("probe, failed, edits", BUGS.values(), ids=BUGS)
def test_a_script_with_a_bug_is_caught(check, tmp_path, probe, failed, edits):
    probes = ["--probes", probe] if probe else ["--probes"]
    result = check("--probe-tokens", 400, "--train-script", planted(tmp_path, *edits), *probes)
    assert result.status == 1 and result.failed == failed, result.text


PLANS, STEP = "    for plan, end in plans:\n", "                learner.learn(step, out, scored)\n"
READ = "nats_of(tokens[here], tokens[here + 1], *memory)"
SCORED = (".min() < 1:", ".min() < 0:")  # the program's own look at what it learns from
ADAPT, SHARE = "            self.update(self.adamw)\n", "            for _, B, _ in self.adapters.values():\n"


def read(memory: str) -> str:
    """The same forward, which leaves the memory as it was."""
    return READ.replace("*memory", f"*map(list, {memory})")


CHEATS = {
    "adapters learn from a chunk before it is scored": ("lora", {"future", "normalisation"}, [
        (READ, f"(learner and learner.learn(step, {read('memory')}, scored), {READ})[1]")]),
    "what adapters learned from is scored again": ("lora", {"future", "normalisation"}, [
        (READ, f"(before := [*map(list, memory)], {READ})[1]"),
        (STEP, STEP + f"                nats[index[scored]] = {read('before')}.detach()[scored].double()\n")]),
    "adapters learn from the next document in their chunk": ("lora", {"rows"}, [("out * scored", "out")]),
    "all rows teach all adapters": ("lora", {"rows"}, [
        (ADAPT, SHARE + "                B.grad += B.grad.sum(0)\n" + ADAPT)]),
    "adapters that know the last document at the next one's start": ("lora", {"normalisation"}, [
        ("B.data.mul_(", "B.data.mul(")]),
    "SGD learns from a chunk before it is scored": ("sliding sgd", {"future"}, [
        SCORED, (PLANS, PLANS + "        learner and learner.end_segment(end)\n")]),
    "and in a stream": ("stream sgd", {"future"}, [
        SCORED, (PLANS, PLANS + "        learner and learner.end_segment(end)\n")]),
    "what SGD learned from is scored again": ("sliding sgd", {"future"}, [
        (PLANS, PLANS.replace("plans", "[plan for plan in plans for _ in range(2 if ttt else 1)]"))]),
    "a phase learns from a chunk that is scored in part": ("lora in phases", {"future"}, [
        SCORED, ("end - n + 1, n)", "end, n)")]),
    "a document in a stream goes on into the next": ("stream", {"isolation"}, [
        (", RESET_LOG_DECAY)", ", 0.0)")]),
}


@pytest.mark.parametrize("mode, failed, edits", CHEATS.values(), ids=CHEATS)
def test_a_script_that_cheats_while_it_learns_is_caught(check, tmp_path, mode, failed, edits):
    """By each of these probes."""
    result = check("--probe-tokens", 500, "--train-script", planted(tmp_path, *edits), "--probes", *failed, mode=mode)
    assert result.status == 1 and result.failed == failed, result.text


def bad_header(data: Path):
    write_shard(data / "fineweb_val_000000.bin", [1, 5, 6], header=(20240521, 1, None))


def cut_short(data: Path):
    write_shard(data / "fineweb_val_000000.bin", [1, 5, 6], header=(20240520, 1, 4))


def foreign_ids(data: Path):
    write_shard(data / "fineweb_val_000000.bin", [1, 5, 60_000])


def no_bos(data: Path):
    write_shard(data / "fineweb_val_000000.bin", [5, 5, 6])


def sidecar_only(data: Path):
    write_shard(data / "fineweb_val_bytes_000000.bin", [1, 5, 6])


@pytest.mark.parametrize("make, message", [
    (bad_header, "fineweb_val_000000.bin: magic 20240521"), (cut_short, "fineweb_val_000000.bin: magic 20240520"),
    (foreign_ids, "fineweb_val_000000.bin: token 60000"), (no_bos, "expected at least 2 tokens"),
    (sidecar_only, "no file fineweb_val_"),
], ids=lambda x: getattr(x, "__name__", ""))
def test_a_shard_that_cannot_be_used_is_one_line(check, tmp_path, make, message):
    make(tmp_path)
    status = check(data=tmp_path).status
    assert status.startswith("verify: error: ") and message in status and "\n" not in status


@pytest.mark.parametrize("options, files, message", [
    ([], dict(artifact="nowhere.ptz"), "nowhere.ptz: no such file"),
    ([], dict(tokenizer="nowhere.model"), "nowhere.model: no such file"),
    ([], dict(tokenizer="submission.json"), "submission.json: not a SentencePiece model"),
    (["--scores", ROOT / "README.md"], {}, "README.md: not a score file"),
    (["--submission", ROOT / "README.md"], {}, "README.md: not JSON"),
], ids=["artifact", "tokenizer", "no tokenizer", "scores", "submission"])
def test_a_file_that_cannot_be_used_is_one_line(check, options, files, message):
    status = check(*options, **files).status
    assert status.startswith("verify: error: ") and message in status and "\n" not in status


def test_a_tokenizer_with_another_bos_does_not_fit(check, tmp_path):
    (tmp_path / "other.model").write_bytes(tokenizer_model(bos_id=2, eos_id=1))
    assert "BOS is 2, expected 1" in check(tokenizer=tmp_path / "other.model").status


def test_the_cap_is_decimal_and_counts_the_script(trained, tmp_path):
    script = tmp_path / "script.py"
    job = SimpleNamespace(artifact=trained / "final_model.int6.ptz", script=script, claims={})
    for excess in 0, 1:
        with open(script, "wb") as file:
            file.truncate(16_000_000 - job.artifact.stat().st_size + excess)
        assert verify.check_size(job)[0] is (excess == 0)
