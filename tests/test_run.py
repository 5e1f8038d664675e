"""The main job as run.sh starts it: real text, real processes; the log against arithmetic of its
own."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
import torch
import transformer

import train_gpt

ROOT = Path(__file__).resolve().parent.parent
LINE = "\n" + "=" * 100 + "\n"
SMALL = dict(
    PRESET="demo",
    LAYOUT="G S G S",
    MODEL_DIM="48",
    GDN_HEAD_DIM="16",
    HEAD_DIM="16",
    WINDOW_SIZE="40",
    TRAIN_SEQ_LEN="128",
    TRAIN_BATCH_TOKENS="1024",
    EVAL_SEQ_LEN="128",
    EVAL_STRIDE="64",
    VAL_BATCH_SIZE="8192",
    ITERATIONS="40",
    MAX_WALLCLOCK_SECONDS="0",
    GPTQ_CALIBRATION_BATCHES="8",
)
VARIABLES = {f.name for f in fields(train_gpt.Hyperparameters)}
VARIABLES |= {"rank", "local_rank", "world_size"}


def launch(
    folder: Path, nproc: int = 1, script: str = "train_gpt.py", **env
) -> subprocess.CompletedProcess:
    """The script in that folder, as one plain process or on ranks."""
    command = [sys.executable]
    if nproc > 1:
        command += [ROOT / "tools" / "ranks.py", str(nproc)]
    env = {k: v for k, v in os.environ.items() if k.lower() not in VARIABLES} | env
    env |= {"OMP_NUM_THREADS": "1"} if nproc > 1 else {}
    return subprocess.run(
        [*command, str(ROOT / script)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def figure(text: str, pattern: str) -> float:
    """The number behind the last match of `pattern`."""
    return float(re.findall(pattern + r"([-+\d.einfa]+)", text)[-1])


def losses(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"step:\d+/\d+ train_loss:(\S+)", text)]


def final_line(text: str) -> str:
    return re.findall(r"^final_int6_\w+_exact val_loss:.*$", text, re.M)[-1]


def figures_of(log: str) -> dict:
    return json.loads(log.splitlines()[-1].removeprefix("figures: "))


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> dict:
    """The demo corpus, its validation text cut to 12,000 tokens so that scoring takes seconds."""
    root = tmp_path_factory.mktemp("demo")
    command = [sys.executable, ROOT / "data" / "prepare.py", "--demo", "--output-root", root]
    subprocess.run(command, check=True)
    path = root / "datasets" / "demo" / "fineweb_val_000000.bin"
    header, tokens = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", offset=1024)[:12_000]
    header[2] = len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    path.with_name("stats.json").unlink()  # it describes the whole
    tokenizer = root / "tokenizers" / "demo_1024_bpe.model"
    return dict(DATA_PATH=str(path.parent), TOKENIZER_PATH=str(tokenizer))


@pytest.fixture(scope="session")
def run(demo, tmp_path_factory) -> tuple[Path, str, dict]:
    """One finished run: its folder, its log, its environment."""
    folder = tmp_path_factory.mktemp("run")
    env = SMALL | demo | dict(RUN_ID="first", SCORES="scores.npz", VAL_LOSS_EVERY="20")
    result = launch(folder, **env)
    assert result.returncode == 0, result.stderr
    return folder, (folder / "logs" / "first.txt").read_text(), env


# -----------------------------------------------------------------------------
# a whole run


def test_the_log_is_source_versions_settings_course_and_figures(run):
    _, log, env = run
    source = (ROOT / "train_gpt.py").read_text()
    assert log.startswith(source + LINE + "Running Python ")
    versions, settings, rest = log[len(source + LINE) :].partition(LINE)
    assert f"Running PyTorch {torch.__version__}" in versions and settings == LINE
    found = dict(re.findall(r"^  (\w+): (.*)$", rest, re.M))
    expected = train_gpt.Hyperparameters.from_env(env)
    names = {f.name for f in fields(expected)}
    assert found.keys() == names | {"system"} and found["system"] == "record"
    assert all(found[name] == str(getattr(expected, name)) for name in names)
    for line in (
        "warmup_step:2/2",
        "step:1/40 train_loss:",
        "step:20/40 val_loss:",
        "step:40/40 val_loss:",
        "Total submission size int6+range:",
    ):
        assert line in rest


def test_every_check_passes_and_is_logged_once(run):
    _, log, _ = run
    checks = figures_of(log)["checks"]
    lines = re.findall(r"^audit: (\w+) passed (.*)$", log, re.M)
    assert log.count("\naudit: ") == len(lines) == len(checks) == 7
    for name, line in lines:
        assert json.loads(line) | {"passed": True} == checks[name]


def test_training_learns(run):
    _, log, _ = run
    assert losses(log)[0] == pytest.approx(math.log(1024), abs=0.05)
    assert losses(log)[-1] < losses(log)[0] - 0.5
    # neither the warm-up on random tokens nor the validations left a trace in weights or loader
    assert figure(log, "step:40/40 val_loss:") < figure(log, "step:20/40 val_loss:")


def test_gptq_costs_little(run):
    _, log, _ = run
    ema = figure(log, "post-ema val_loss:[0-9.]+ val_bpb:")
    gptq = figure(log, "final_int6_roundtrip val_loss:[0-9.]+ val_bpb:")
    assert abs(gptq - ema) < 0.01


def test_the_score_can_be_recomputed_from_its_file(run, demo):
    folder, log, _ = run
    scores = np.load(folder / "scores.npz")
    path = Path(demo["DATA_PATH"]) / "fineweb_val_000000.bin"
    tokens = np.fromfile(path, "<u2", offset=1024)
    assert scores["nats"].dtype == np.float64 and scores["bytes"].dtype.kind == "i"
    assert np.array_equal(scores["position"], np.arange(1, len(tokens)))
    sp = spm.SentencePieceProcessor(model_file=demo["TOKENIZER_PATH"])
    starts = [*np.flatnonzero(tokens == 1), len(tokens)]
    documents = [tokens[a:b].tolist() for a, b in zip(starts, starts[1:], strict=False)]
    size = sum(len(sp.decode(ids).encode()) for ids in documents)
    assert scores["bytes"].sum() == size
    bpb = scores["nats"].sum() / math.log(2) / size
    assert f"val_bpb:{bpb:.8f}" == final_line(log).split()[-1]
    assert figures_of(log)["val_bpb"] == pytest.approx(bpb, rel=1e-12)


def test_a_new_process_scores_the_artifact_to_the_last_digit(run):
    folder, log, env = run
    again = dict(EVAL_ONLY="1", ARTIFACT="final_model.int6.ptz", SCORES="again.npz", RUN_ID="again")
    again |= {name: env[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
    result = launch(folder, **again)
    assert result.returncode == 0, result.stderr
    assert final_line(result.stdout) == final_line(log)
    first, second = (np.load(folder / name)["nats"] for name in ("scores.npz", "again.npz"))
    assert np.array_equal(first, second)


def test_sizes_are_those_on_disk(run):
    folder, log, _ = run
    artifact = (folder / "final_model.int6.ptz").stat().st_size
    code = (ROOT / "train_gpt.py").stat().st_size
    assert f"Total submission size int6+range: {artifact + code} bytes" in log
    sizes = dict(bytes_code=code, bytes_model=artifact, bytes_total=artifact + code)
    assert sizes.items() <= figures_of(log).items()
    assert sizes.items() <= figures_of(log)["checks"]["size"].items()


def test_the_run_leaves_artifact_sample_scores_and_log(run):
    folder, log, _ = run
    names = {str(path.relative_to(folder)) for path in folder.rglob("[!.]*") if path.is_file()}
    assert names - {"again.npz", "logs/again.txt"} == {
        "final_model.int6.ptz",
        "final_model.int6.ptz.trained.pt",
        "final_model.int6.ptz.sample.npz",
        "scores.npz",
        "logs/first.txt",
    }
    assert figures_of(log)["official"] is False and figures_of(log)["step_stop"] == 40


# -----------------------------------------------------------------------------
# other launches


def test_a_system_runs_as_its_own_script_and_all_its_code_counts(demo, tmp_path):
    changes = dict(LAYOUT="A (A)x2 A", PARALLEL_START_LAYER="0", TTT="", RUN_ID="system")
    changes |= dict(ITERATIONS="4", WARMUP_STEPS="1", GPTQ_CALIBRATION_BATCHES="1")
    result = launch(tmp_path, script="systems/transformer.py", **(SMALL | demo | changes))
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "logs" / "system.txt").read_text()
    own = re.findall(r"^(?:import|from) (\w+)", (ROOT / "systems/transformer.py").read_text(), re.M)
    names = [name for name in (*own, "transformer") if (ROOT / f"systems/{name}.py").exists()]
    code = [ROOT / "train_gpt.py", *(ROOT / f"systems/{name}.py" for name in sorted(names))]
    sources = "".join(path.read_text() + LINE for path in code)
    assert log.startswith(sources + "Running Python ")
    figures = figures_of(log)
    assert figures["system"] == "transformer"
    assert figures["bytes_code"] == sum(path.stat().st_size for path in code)
    _, hp = train_gpt.load_artifact(
        tmp_path / "final_model.int6.ptz", "cpu", transformer.Hyperparameters, transformer.GPT
    )
    assert hp.layout == changes["LAYOUT"]


def test_two_ranks_give_the_losses_of_one(run, demo, tmp_path):
    """Without adapters, which start at random, by row."""
    env = run[2] | dict(ITERATIONS="10", RUN_ID="two", VAL_LOSS_EVERY="0", TTT="")
    logs = []
    for nproc in 1, 2:
        folder = tmp_path / str(nproc)
        folder.mkdir()
        result = launch(folder, nproc, **env)
        assert result.returncode == 0, result.stderr
        logs.append((folder / "logs" / "two.txt").read_text())
    first, second = logs
    assert losses(first) == pytest.approx(losses(second), abs=1e-4) and len(losses(first)) == 10
    pattern = "final_int6_stream_exact val_loss:"
    assert figure(first, pattern) == pytest.approx(figure(second, pattern), abs=2e-3)
    assert figures_of(second)["hardware"] == "2xCPU"
    samples = [np.load(tmp_path / n / "final_model.int6.ptz.sample.npz") for n in ("1", "2")]
    assert len(samples[0]["nats"]) == len(samples[1]["nats"]) > 10_000


def test_a_loss_that_is_not_finite_stops_the_run(demo, tmp_path):
    changes = dict(RUN_ID="nan", SCALAR_LR="1e30", GRAD_CLIP_NORM="0")
    result = launch(tmp_path, **(SMALL | demo | changes))
    assert result.returncode == 1
    assert re.fullmatch(r"step \d+: loss .*: try lower rates\n", result.stderr)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["logs"]
    assert "figures:" not in (tmp_path / "logs" / "nan.txt").read_text().partition(LINE)[2]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(DATA_PATH="nowhere"), "DATA_PATH=nowhere"),
        (dict(TOKENIZER_PATH="nowhere.model"), "nowhere.model"),
        (dict(VOCAB_SIZE="512"), "VOCAB_SIZE"),
        (dict(TRAIN_BATCH_TOKENS="1000"), "TRAIN_BATCH_TOKENS=1000"),
        (dict(EVAL_ONLY="1", ARTIFACT="nowhere.ptz"), "nowhere.ptz"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_input_gives_one_error_that_names_it(demo, tmp_path, change, message):
    result = launch(tmp_path, **(SMALL | demo | change))
    assert result.returncode != 0
    assert message in result.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.glob("*.ptz"))


# -----------------------------------------------------------------------------
# the clock


def test_the_clock_stops_training_inside_the_budget(demo, tmp_path):
    """By its own log: no step was begun behind the end, nor could one more have been taken. By a
    clock of its own to the millisecond: tests/test_audit.py."""
    changes = dict(
        RUN_ID="clock",
        ITERATIONS="100000",
        MAX_WALLCLOCK_SECONDS="16",
        GPTQ_RESERVE_SECONDS="8",
        GPTQ_CALIBRATION_BATCHES="1",
        MIN_LR="0.5",  # reached long before: a slow step may end the run early
        TRAIN_BATCH_TOKENS="128",
        EVAL_MODE="sliding",
        EVAL_STRIDE="128",
        TTT="",
        WARMUP_STEPS="1",
        TRAIN_LOG_EVERY="1",
    )
    result = launch(tmp_path, **(SMALL | demo | changes))
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "logs" / "clock.txt").read_text()
    ends = [0.0, *map(float, re.findall(r" train_loss:\S+ train_time:(\d+)ms", log))]
    steps = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    stop, rounding = figure(log, r"stopping_early: .*train_time:"), 2.0
    assert ends[-2] <= 8000 and ends[-1] <= stop + rounding
    assert stop + max(steps[-10:]) > 8000 - rounding
    assert figure(log, r"train\+hessians:") <= 16_000
    lr = min(1, max(0.5, (1 - ends[-2] / 8000) / 0.75))  # of the last step, as it began
    assert figure(log, 'lr_multiplier_at_stop": ') == pytest.approx(lr, abs=0.05)


# -----------------------------------------------------------------------------
# inside one process


def calibrated(tmp_path, tiny):
    """A fresh model, its loss, its Hessians, and hyperparameters that say where to pack it."""
    hp = tiny(artifact=str(tmp_path / "model.ptz"))
    model = train_gpt.GPT(hp)
    batch = torch.randint(hp.vocab_size, (1, 2, 2, hp.train_seq_len))
    return hp, model, model.calibrate([*batch])


def test_a_log_is_begun_where_there_is_no_nvidia_smi(tmp_path, monkeypatch):
    """As in containers whose driver is mounted without its tools."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(train_gpt.world, "device", torch.device("cuda", 0))
    train_gpt.init_log(train_gpt.Hyperparameters(run_id="bare"))
    train_gpt.log.handlers.clear()
    assert " device:cuda " in (tmp_path / "logs" / "bare.txt").read_text()


def test_the_artifact_is_written_before_anything_else_can_fail(tmp_path, monkeypatch, tiny):
    hp, model, hessians = calibrated(tmp_path, tiny)

    def fails(*_):
        raise train_gpt.Refused("a diagnostic failed")

    monkeypatch.setattr(train_gpt, "validate", fails)
    validation = SimpleNamespace(tokens=torch.randint(hp.vocab_size, (99,)))
    with pytest.raises(train_gpt.Refused, match="a diagnostic failed"):
        train_gpt.pack(hp, model, validation, hessians)
    train_gpt.load_artifact(hp.artifact, "cpu")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_packs(tmp_path, monkeypatch, tiny, rank):
    """Another rank's quantization may differ from it in a bit."""
    hp, model, hessians = calibrated(tmp_path, tiny)
    monkeypatch.setattr(train_gpt.world, "rank", rank)
    monkeypatch.setattr(train_gpt, "validate", lambda *_, **__: dict(val_bpb=1.0))
    validation = SimpleNamespace(tokens=torch.randint(hp.vocab_size, (99,)))
    figures = train_gpt.pack(hp, model, validation, hessians)
    assert figures == dict(pre_quant_val_bpb=1.0)
    assert Path(hp.artifact).exists() is (rank == 0)


@pytest.mark.parametrize("excess", [0, 1])
def test_an_artifact_over_the_cap_fails_the_audit_and_is_kept(tmp_path, monkeypatch, tiny, excess):
    """Decimal megabytes, with the code."""
    code = [ROOT / "train_gpt.py", ROOT / "systems" / "transformer.py"]
    hp = tiny(artifact=str(tmp_path / "model.ptz"))
    with open(hp.artifact, "wb") as file:
        file.truncate(16_000_000 - sum(path.stat().st_size for path in code) + excess)
    audit, text = train_gpt.Audit(), SimpleNamespace(starts=[0], bytes=1, is_official=False)
    monkeypatch.setattr(train_gpt, "evaluate", lambda *_: dict(eval_time_seconds=1.0))
    monkeypatch.setattr(train_gpt, "code_files", lambda: code)
    fails = pytest.raises(train_gpt.Refused, match="audit failed: size")
    with fails if excess else contextlib.nullcontext():
        train_gpt.finish(hp, None, text, audit, {})
    assert audit.checks["size"]["bytes_total"] == 16_000_000 + excess
    assert Path(hp.artifact).exists() and audit.checks["size"]["passed"] is (excess == 0)
