"""The main job as a user starts it: torchrun, real text, real processes; the log against independent arithmetic."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
import torch

import train_gpt

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
    PRESET="demo", LAYOUT="G S G S=1", MODEL_DIM="48", GDN_HEAD_DIM="16", HEAD_DIM="16", WINDOW_SIZE="40",
    TRAIN_SEQ_LEN="128", TRAIN_BATCH_TOKENS="1024", EVAL_SEQ_LEN="128", EVAL_STRIDE="64", VAL_BATCH_SIZE="8192",
    NGRAM_VOCAB_SIZE="512", NGRAM_DIM="16", ITERATIONS="40", MAX_WALLCLOCK_SECONDS="0", GPTQ_CALIBRATION_BATCHES="8",
)


def launch(folder: Path, nproc: int = 1, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    if not nproc:
        command = [sys.executable]
    env = {k: v for k, v in os.environ.items() if k.lower() not in vars(train_gpt.Hyperparameters())} | env
    env |= {"OMP_NUM_THREADS": "1"} if nproc > 1 else {}
    return subprocess.run([*command, str(ROOT / "train_gpt.py")], cwd=folder, env=env, capture_output=True, text=True,
                          timeout=300)


def figure(text: str, pattern: str) -> float:
    """The number behind the last match of `pattern`."""
    return float(re.findall(pattern + r"([-+\d.einfa]+)", text)[-1])


def losses(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"step:\d+/\d+ train_loss:(\S+)", text)]


def final_line(text: str) -> str:
    return re.findall(r"^final_int6_\w+_exact val_loss:.*$", text, re.M)[-1]


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> dict:
    """The demo corpus, its validation text cut to 12,000 tokens so that scoring takes seconds."""
    root = tmp_path_factory.mktemp("demo")
    subprocess.run([sys.executable, ROOT / "data" / "prepare.py", "--demo", "--output-root", root], check=True)
    path = root / "datasets" / "demo" / "fineweb_val_000000.bin"
    header, tokens = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", offset=1024)[:12_000]
    header[2] = len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return dict(DATA_PATH=str(path.parent), TOKENIZER_PATH=str(root / "tokenizers" / "demo_1024_bpe.model"))


@pytest.fixture(scope="session")
def run(demo, tmp_path_factory) -> tuple[Path, str, dict]:
    """One finished run: its folder, its log, its environment."""
    folder = tmp_path_factory.mktemp("run")
    env = SMALL | demo | dict(RUN_ID="first", SCORES="scores.npz", VAL_LOSS_EVERY="20")
    result = launch(folder, **env)
    assert result.returncode == 0, result.stderr
    return folder, (folder / "logs" / "first.txt").read_text(), env


def test_the_log_starts_with_the_source_and_ends_with_the_score(run):
    _, log, _ = run
    source = (ROOT / "train_gpt.py").read_text()
    assert log.startswith(source)
    assert log[len(source):].startswith("\n" + "=" * 100 + "\nRunning Python ")
    audit = log.splitlines()[-1].removeprefix("audit: ")
    assert len(json.loads(audit)) >= 15 and all(check["passed"] for check in json.loads(audit).values())
    assert sum(line.startswith("audit: ") for line in log.splitlines()) <= 20
    for line in ("warmup_step:2/2", "step:1/40 train_loss:", "step:20/40 val_loss:", "step:40/40 val_loss:",
                 "Total submission size int6+brotli:"):
        assert line in log[len(source):]
    gptq = json.loads(audit)["gptq"]
    assert gptq["hessians"] == gptq["tensors"] > 10 and gptq["no_better"] == []
    times = [check["at"] for check in json.loads(audit).values()]
    assert times == sorted(times) and 0 < times[0] and times[-1] > times[0] + 1  # seconds of the whole process


def test_training_learns(run):
    _, log, _ = run
    assert losses(log)[0] == pytest.approx(math.log(1024), abs=0.05)
    assert losses(log)[-1] < losses(log)[0] - 0.5
    # neither the warm-up on random tokens nor the validations left a trace in the weights or the loader
    assert figure(log, "step:40/40 val_loss:") < figure(log, "step:20/40 val_loss:")


def test_gptq_costs_little(run):
    _, log, _ = run
    ema = figure(log, "post-ema val_loss:[0-9.]+ val_bpb:")
    gptq = figure(log, "final_int6_roundtrip val_loss:[0-9.]+ val_bpb:")
    assert abs(gptq - ema) < 0.01


def test_the_score_can_be_recomputed_from_its_file(run, demo):
    folder, log, _ = run
    scores = np.load(folder / "scores.npz")
    tokens = np.fromfile(Path(demo["DATA_PATH"]) / "fineweb_val_000000.bin", "<u2", offset=1024)
    assert scores["nats"].dtype == np.float64 and scores["bytes"].dtype.kind == "i"
    assert np.array_equal(scores["position"], np.arange(1, len(tokens)))
    sp = spm.SentencePieceProcessor(model_file=demo["TOKENIZER_PATH"])
    starts = [*np.flatnonzero(tokens == 1), len(tokens)]
    text = [sp.decode(tokens[a:b].tolist()).encode() for a, b in zip(starts, starts[1:], strict=False)]
    assert scores["bytes"].sum() == sum(map(len, text))
    bpb = scores["nats"].sum() / math.log(2) / sum(map(len, text))
    assert f"val_bpb:{bpb:.8f}" == final_line(log).split()[-1]


def test_a_new_process_scores_the_artifact_to_the_last_digit(run):
    folder, log, env = run
    result = launch(folder, nproc=0, EVAL_ONLY="1", ARTIFACT="final_model.int6.ptz", SCORES="again.npz",
                    **{name: env[name] for name in ("DATA_PATH", "TOKENIZER_PATH")})
    assert result.returncode == 0, result.stderr
    assert final_line(result.stdout) == final_line(log)
    first, again = (np.load(folder / name)["nats"] for name in ("scores.npz", "again.npz"))
    assert np.array_equal(first, again)


def test_sizes_are_those_on_disk(run):
    folder, log, _ = run
    artifact, code = (folder / "final_model.int6.ptz").stat().st_size, (ROOT / "train_gpt.py").stat().st_size
    assert f"Serialized model int6+brotli: {artifact} bytes" in log
    assert f'"bytes_code": {code}, "bytes_model": {artifact}, "bytes_total": {artifact + code}' in log
    assert f"Total submission size int6+brotli: {artifact + code} bytes" in log


def test_submission_json_claims_nothing_for_other_text(run):
    folder, log, _ = run
    submission = json.loads((folder / "submission.json").read_text())
    assert submission["val_bpb"] is None and submission["val_loss"] is None
    own = submission["own_text"]
    assert f"val_bpb:{own['val_bpb']:.8f}" == final_line(log).split()[-1]
    assert submission["bytes_total"] == submission["bytes_code"] + submission["bytes_model"]
    assert submission["step_stop"] == 40


@pytest.mark.parametrize("official, changes, claimed", [
    (True, {}, True), (False, {}, False), (True, dict(wallclock_seconds=600.1), False),
    (True, dict(eval_time_seconds=600.1), False),
], ids=["official", "other text", "trained too long", "evaluated too long"])
def test_a_score_is_claimed_for_the_official_split_within_the_limits(
    tmp_path, monkeypatch, tiny, official, changes, claimed
):
    monkeypatch.chdir(tmp_path)
    scores = dict(val_bpb=1.5, val_loss=2.5, raw_val_bpb=1.6, pre_quant_val_bpb=1.4)
    validation = SimpleNamespace(is_official=official, documents=range(50_000), bytes=151_050_000)
    limits = dict(wallclock_seconds=600.0, eval_time_seconds=600.0, bytes_total=16_000_000)
    audit = train_gpt.Audit()
    audit.check("causality", True)
    train_gpt.write_submission(tiny(), validation, scores | limits | changes, audit)
    submission = json.loads((tmp_path / "submission.json").read_text())
    assert {name: submission[name] for name in scores} == (scores if claimed else dict.fromkeys(scores))
    assert (submission["own_text"] is None) == claimed == all(submission["compliance"].values())
    assert submission["compliance"] == dict(
        within_600_seconds_each=not changes, full_validation_split=official, causality=True)


def test_the_artifact_is_written_before_anything_else_can_fail(tmp_path, monkeypatch, tiny):
    hp = tiny(artifact=str(tmp_path / "model.ptz"))
    model = train_gpt.GPT(hp)
    batch = torch.randint(hp.vocab_size, (1, 2, 2, hp.train_seq_len))
    hessians = train_gpt.collect_hessians(model, list(batch))

    def fails(*_):
        raise FloatingPointError("a diagnostic failed")

    monkeypatch.setattr(train_gpt, "validate", fails)
    with pytest.raises(FloatingPointError):
        train_gpt.pack(hp, model, None, hessians, train_gpt.Audit())
    train_gpt.load_artifact(hp.artifact, "cpu")


def test_two_ranks_give_the_losses_of_one(run, demo, tmp_path):
    _, log, env = run
    env = env | dict(ITERATIONS="10", RUN_ID="two", VAL_LOSS_EVERY="0", TTT="")  # adapters start at random, by row
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert launch(one, **env).returncode == 0
    result = launch(two, nproc=2, **env)
    assert result.returncode == 0, result.stderr
    first, second = ((folder / "logs" / "two.txt").read_text() for folder in (one, two))
    assert losses(first) == pytest.approx(losses(second), abs=1e-4) and len(losses(first)) == 10
    pattern = "final_int6_stream_exact val_loss:"
    assert figure(first, pattern) == pytest.approx(figure(second, pattern), abs=2e-3)


def test_the_clock_stops_training_inside_the_budget(demo, tmp_path):
    env = SMALL | demo | dict(RUN_ID="clock", ITERATIONS="100000", MAX_WALLCLOCK_SECONDS="12", GPTQ_RESERVE_SECONDS="4",
                              MIN_LR="0.1", EVAL_MODE="sliding", EVAL_STRIDE="128", TTT="", WARMUP_STEPS="1")
    result = launch(tmp_path, **env)
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "logs" / "clock.txt").read_text()
    assert "gptq:reserving 4s, effective=8000ms" in log
    # the next step is expected to take as long as the longest of the last ten: the system may still hold it up
    assert 4000 < figure(log, r"stopping_early: wallclock_cap train_time:") <= 8400
    assert figure(log, r"train\+hessians:") <= 12_000
    assert figure(log, 'lr_multiplier_at_stop": ') == pytest.approx(0.1, abs=0.05)


def test_a_loss_that_is_not_finite_stops_the_run(demo, tmp_path):
    result = launch(tmp_path, **(SMALL | demo | dict(RUN_ID="nan", SCALAR_LR="1e30", GRAD_CLIP_NORM="0")))
    assert result.returncode != 0
    assert re.search(r"FloatingPointError: step \d+: train_loss", result.stderr)
    assert not (tmp_path / "final_model.int6.ptz").exists() and not (tmp_path / "submission.json").exists()


@pytest.mark.parametrize("change, message", [
    (dict(DATA_PATH="nowhere"), "DATA_PATH=nowhere"),
    (dict(TOKENIZER_PATH="nowhere.model"), "nowhere.model"),
    (dict(VOCAB_SIZE="512"), "VOCAB_SIZE=512"),
    (dict(TRAIN_BATCH_TOKENS="1000"), "TRAIN_BATCH_TOKENS=1000"),
    (dict(EVAL_ONLY="1", ARTIFACT="nowhere.ptz"), "nowhere.ptz"),
], ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_bad_input_gives_one_error_that_names_it(demo, tmp_path, change, message):
    result = launch(tmp_path, nproc=0, **(SMALL | demo | change))
    assert result.returncode != 0
    assert message in result.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.glob("*.ptz"))


@pytest.mark.parametrize("excess", [0, 1])
def test_an_artifact_over_the_cap_fails_the_audit_and_is_kept(tmp_path, tiny, excess):
    """Decimal megabytes, with the code."""
    hp = tiny(artifact=str(tmp_path / "model.ptz"))
    with open(hp.artifact, "wb") as file:
        file.truncate(16_000_000 - (ROOT / "train_gpt.py").stat().st_size + excess)
    audit = train_gpt.Audit()
    sizes = train_gpt.audit_limits(audit, hp, dict(eval_time_seconds=1.0))
    assert sizes["bytes_total"] == 16_000_000 + excess and Path(hp.artifact).exists()
    assert audit.checks["size"]["passed"] is (excess == 0)
    if excess:
        with pytest.raises(RuntimeError, match="audit failed: size"):
            audit.verdict()
