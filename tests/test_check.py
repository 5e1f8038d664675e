"""tools/check.py: all ok on a machine and a toy that are well; a line that says so, and status 1,
for each machine on which the run would fail."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import toys
from conftest import ROOT
from corpus import NORMAL, edit_pieces, load, tokenizer_model, write_corpus

import train_gpt

sys.path.append(str(ROOT / "tools"))
import check  # noqa: E402  (the path comes first)

LAYOUTS = dict(
    train_gpt="G S",
    baseline="A2",
    kv_share="G2",
    pure_gdn="G S",
    crawler="A (A G)x2 A",
    transformer="A (A)x2 A",
    gdn_hybrid="G S S=1",
    hybrid_1895="G A (A)x2",
)
STREAM = dict(eval_mode="stream", ttt="lora")
OPTIONS = dict(  # what only one system has: SGD while scoring, a curriculum
    kv_share=dict(ttt="sgd", ttt_chunk_tokens=128, ttt_freeze_blocks=1),
    hybrid_1895=dict(eval_mode="stream", ttt="sgd", ttt_chunk_tokens=128, parallel_start_layer=2),
    transformer=STREAM | dict(ttt_chunk_tokens=128, parallel_start_layer=2),
    pure_gdn=dict(train_batch_tokens=3 * 128, grad_accum_steps=3, curriculum="0:1x16 0.5:3x32"),
)
DATA = ["ranks", "model", "training shards", "validation"]
TRAINING = [*DATA, "collectives", "training step"]


def as_env(settings: dict) -> dict[str, str]:
    return {
        name.upper(): str(int(value) if isinstance(value, bool) else value)
        for name, value in settings.items()
    }


@pytest.fixture
def machine(tmp_path, monkeypatch, capsys):
    """run(parts=None, system="train_gpt", **settings): those parts, or all, of a toy on a corpus in
    this folder. Its `status`, `rows` by name, `text`, and `env`, of the file for run.sh."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "mean_seconds", lambda f, limit: check.seconds_of(f))
    (tmp_path / "data").mkdir()
    corpus = write_corpus(tmp_path / "data")

    def run(parts=None, system="train_gpt", env=None, **settings):
        own = dict(artifact="out/model.ptz", layout=LAYOUTS[system])
        hp = toys.tiny_of(system, **corpus | own | OPTIONS.get(system, {}) | settings)
        variables = as_env({f.name: getattr(hp, f.name) for f in fields(hp)}) | (env or {})
        variables |= {} if system == "train_gpt" else dict(SYSTEM=system)
        chosen = {name: part for name, part in check.PARTS.items() if not parts or name in parts}
        with mock.patch.object(check, "PARTS", chosen), mock.patch.dict(os.environ, clear=True):
            os.environ.update(variables)
            status = check.main()
        text = capsys.readouterr().out
        rows = {line[4:25].strip(): line for line in text.splitlines() if line[:4].strip()}
        file = tmp_path / "logs" / "check.env"
        return SimpleNamespace(
            status=status, rows=rows, text=text, env=file.read_text() if file.exists() else ""
        )

    return run


def fails(result, what: str, *texts: str) -> None:
    """The row is NOT ok, it and its remedy say so, and nothing was thrown."""
    assert result.status == 1 and result.rows[what].startswith("NOT "), result.text
    after = result.text[result.text.index(result.rows[what]) :]
    said = "\n".join(after.splitlines()[:2])
    assert all(text in said for text in texts), said
    assert "check_failed=1" in result.env and "Traceback" not in result.text


# -----------------------------------------------------------------------------
# a machine that is well


@pytest.mark.parametrize("system", toys.SYSTEMS)
def test_a_toy_of_each_system_is_all_ok(machine, system):
    result = machine(system=system)
    assert result.status == 0, result.text
    assert set(check.PARTS) <= result.rows.keys()
    assert all(result.rows[what].startswith("ok ") for what in check.PARTS), result.text
    assert "check_failed=0" in result.env and "export" not in result.env


def test_the_table_of_a_terminal_has_the_same_rows(machine, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    result = machine(["python", "torch", "disk"])
    assert all(word in result.text for word in ("what", "needed", "python", "torch", "disk"))
    assert "not checked" in " ".join(result.text.split())  # it rests on the model


def test_the_state_on_disk_has_the_bytes_that_are_demanded(tmp_path, tiny):
    model = train_gpt.GPT(tiny())
    batches = [(torch.zeros(1, 8, dtype=torch.long),) * 2]
    state = dict(hessians=model.calibrate(batches), weights=dict(model.named_parameters()))
    torch.save(state, tmp_path / "state.pt")
    demanded = check.state_bytes(model)
    assert demanded <= (tmp_path / "state.pt").stat().st_size <= 1.05 * demanded + 65_536


def test_two_ranks_find_each_other(tmp_path):
    (tmp_path / "data").mkdir()
    corpus = write_corpus(tmp_path / "data")
    hp = toys.tiny_of("train_gpt", **corpus)
    env = {name: x for name, x in os.environ.items() if name != "SYSTEM"} | dict(
        OMP_NUM_THREADS="1"
    )
    env |= as_env({f.name: getattr(hp, f.name) for f in fields(hp)}) | dict(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, ROOT / "tools" / "ranks.py", "2"]
    run = subprocess.run(
        [*command, ROOT / "tools" / "check.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "2 up, cpu" in run.stdout and "all_reduce of" in run.stdout
    assert "check_failed=0" in (tmp_path / "logs" / "check.env").read_text(), run.stdout


# -----------------------------------------------------------------------------
# machines on which the run would fail


def test_a_broken_shard(machine, tmp_path):
    path = tmp_path / "data" / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-100])
    result = machine([*DATA, "files"])
    fails(result, "training shards", "fineweb_train_000001.bin", "expected", "data/prepare.py")
    assert result.rows["validation"].startswith("ok ")


def test_ids_beyond_the_vocabulary(machine):
    fails(machine(DATA, vocab_size=300), "training shards", "not below VOCAB_SIZE")


def test_no_disk(machine, monkeypatch):
    usage = SimpleNamespace(total=1 << 40, used=1 << 40, free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    fails(machine(["model", "disk"]), "disk", "0.0 GiB free", "set ARTIFACT")


def test_a_folder_that_cannot_be_written(machine, tmp_path):
    (tmp_path / "file").write_text("")
    fails(machine(["model", "disk"], artifact="file/model.ptz"), "disk", "file")


def test_another_tokenizer_of_the_same_size(machine, tmp_path):
    model = tokenizer_model()
    sp = load(model)
    texts = {i: sp.id_to_piece(i) for i in range(4, sp.vocab_size()) if not sp.is_byte(i)}
    swapped = {i: (text, NORMAL) for i, text in zip(texts, [*texts.values()][::-1], strict=True)}
    (tmp_path / "other.model").write_bytes(edit_pieces(model, swapped))
    result = machine([*DATA, "files"], tokenizer_path=str(tmp_path / "other.model"))
    fails(result, "files", "other.model: ", "3 of 4 documents are other tokens")


def test_a_driver_that_is_too_old(machine, monkeypatch):
    monkeypatch.setattr(check, "driver_version", lambda: "570.124.06")
    monkeypatch.setattr(check, "cuda_version", lambda: "13.0")
    result = machine()
    fails(result, "driver", "570.124.06", "580 or newer for CUDA 13.0", "torch>=2.11,<2.13")
    assert "model" not in result.rows  # it would run on the CPU

    monkeypatch.setattr(check, "cuda_version", lambda: "12.8")
    assert machine(["driver"]).rows["driver"].startswith("ok ")
    monkeypatch.setattr(check, "cuda_version", lambda: None)
    fails(machine(), "driver", "torch for CPUs", "delete .venv", "PIP_EXTRA_INDEX_URL")


def test_gpus_that_torch_does_not_see(machine, monkeypatch):
    monkeypatch.setattr(check, "driver_version", lambda: "580.65")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(machine(["GPUs", "model"]), "GPUs", "CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    "count, major, texts",
    [(4, 9, ["set NPROC=4"]), (8, 7, ["capability 7.0", "older than capability 8.0"])],
)
def test_too_few_gpus_or_too_old_ones(machine, monkeypatch, count, major, texts):
    card = SimpleNamespace(name="NVIDIA X", major=major, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    result = machine(["GPUs", "model"], env=dict(LOCAL_WORLD_SIZE="8"))
    fails(result, "GPUs", f"{count} x NVIDIA X", "80 GiB", *texts)
    assert "model" not in result.rows


def test_a_container_with_little_shared_memory(machine, monkeypatch):
    usage = SimpleNamespace(total=64 << 20, used=0, free=64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(train_gpt.world, "size", 8)
    monkeypatch.setattr(train_gpt.world, "device", torch.device("cuda", 0))
    row = check.shared_memory(None)
    assert (
        not row.ok
        and "64 MiB free" in row.found
        and "start the container with --shm-size" in row.remedy
    )


def test_an_older_torch_or_fla(machine, monkeypatch):
    monkeypatch.setattr(train_gpt, "varlen_attn", lambda q, k, v, window_size=(-1, -1): None)
    fails(machine(["torch"]), "torch", "enable_gqa", "requirements.txt")
    monkeypatch.setattr(check, "installed", lambda name: "0.5.0")
    monkeypatch.setattr(train_gpt.world, "device", torch.device("cuda", 0))
    assert not check.fla_version(None).ok and check.triton_version(None).ok


def test_a_wrong_delta_rule(machine, monkeypatch):
    rule = train_gpt.gated_delta_rule

    def wrong(q, k, v, g, beta, state=None):
        return rule(q, k, v, 1.02 * g, beta, state)

    monkeypatch.setattr(train_gpt, "gated_delta_rule", wrong)
    fails(machine([*DATA, "delta rule"]), "delta rule", "wrong:", "dg", "requirements.txt")


def test_a_convolution_across_documents(machine, monkeypatch):
    convolve = train_gpt.short_conv

    def wrong(x, weight, ctx, *activation):
        return convolve(
            x, weight, ctx._replace(same_doc=torch.ones_like(ctx.same_doc)), *activation
        )

    monkeypatch.setattr(train_gpt, "short_conv", wrong)
    fails(machine([*DATA, "convolution"]), "convolution", "wrong:", "dx", "requirements.txt")


def test_attention_over_one_token_too_many(machine, monkeypatch):
    attend = train_gpt.window_attention
    monkeypatch.setattr(
        train_gpt, "window_attention", lambda q, k, v, n, *rest: attend(q, k, v, n + 1, *rest)
    )
    result = machine([*DATA, "delta rule", "attention"])
    fails(result, "attention", "wrong:", "dq")
    assert result.rows["delta rule"].startswith("ok ")


def test_a_budget_too_small_for_the_final_pass(machine):
    result = machine(eval_seconds=0.001, **STREAM)
    fails(result, "forecast: final pass", "learning would stop", "TTT=", "EVAL_SECONDS=")
    assert result.rows["forecast: total"].startswith("ok ")


def test_a_budget_of_hardly_a_step(machine):
    result = machine(max_wallclock_seconds=0.001, gptq_reserve_seconds=0.0)
    fails(result, "forecast: training", "MAX_WALLCLOCK_SECONDS")


def test_hessians_beyond_their_reserve(machine):
    result = machine([*TRAINING, "Hessians"], max_wallclock_seconds=9.0, gptq_reserve_seconds=0.0)
    fails(result, "Hessians", "set GPTQ_RESERVE_SECONDS=1")
    assert "export GPTQ_RESERVE_SECONDS=${GPTQ_RESERVE_SECONDS:-1}" in result.env


def test_an_artifact_over_the_cap(machine, monkeypatch):
    monkeypatch.setattr(train_gpt, "SIZE_LIMIT", 50_000)
    result = machine(["model", "packing", "forecast: bytes"])
    fails(result, "forecast: bytes", "50,000", "MODEL_DIM")


def test_an_artifact_whose_steps_are_chosen(machine):
    parts = ["model", "packing", "forecast: bytes"]
    result = machine(parts, artifact_target_bytes=150_000)
    assert result.rows["forecast: bytes"].startswith("ok ")
    assert "steps are chosen for 150,000" in result.rows["forecast: bytes"]
    fails(machine(parts, artifact_target_bytes=50_000), "forecast: bytes", "50,000", "MODEL_DIM")


def test_what_fails_elsewhere_leaves_a_line_and_the_others(machine, monkeypatch):
    def broken(job):
        raise KeyError("the cause")

    monkeypatch.setitem(check.PARTS, "files", broken)
    result = machine([*DATA, "files", "delta rule"])
    fails(result, "files", "KeyError", "the cause")
    assert result.rows["delta rule"].startswith("ok ")


def test_impossible_settings_are_one_line(machine, monkeypatch):
    monkeypatch.setenv("MODEL_DIM", "wide")
    assert check.main() == "check: error: MODEL_DIM='wide': expected int"
    monkeypatch.setenv("SYSTEM", "nothing")
    assert "nothing" in check.main()


# -----------------------------------------------------------------------------
# too little memory


class Memory:
    """Of a card with `size` bytes, of which a row needs 100 and all else 1000."""

    def __init__(self, monkeypatch, size: int):
        self.size, self.peak, self.asked = size, 0, []
        monkeypatch.setattr(check, "allocated", lambda: 1000)
        monkeypatch.setattr(check, "peak", lambda: self.peak)
        monkeypatch.setattr(check, "memory_limit", lambda: 0.92 * size)

    def use(self, rows: int) -> None:
        self.asked.append(rows)
        self.peak = 1000 + 100 * rows
        if self.peak > self.size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def small_card(monkeypatch):
    """small_card(rows): too little for a forward of more."""

    def make(rows: int) -> Memory:
        memory = Memory(monkeypatch, 1100 + 120 * rows)
        accumulate, score = train_gpt.accumulate, train_gpt.score

        def accumulate_here(model, batch):
            memory.use(len(batch[0][0]))
            return accumulate(model, batch)

        def score_here(model, tokens, plan, *rest):
            memory.use(plan.rows)
            return score(model, tokens, plan, *rest)

        monkeypatch.setattr(train_gpt, "accumulate", accumulate_here)
        monkeypatch.setattr(train_gpt, "score", score_here)
        return memory

    return make


BATCH = dict(train_batch_tokens=64 * 64, grad_accum_steps=2)  # 32 rows of 64 tokens


def test_smaller_micro_batches_where_memory_does_not_suffice(machine, small_card):
    memory = small_card(10)
    result = machine(TRAINING, **BATCH)
    fails(result, "training step", "with 8 of 32 rows", "set GRAD_ACCUM_STEPS=8")
    assert "export GRAD_ACCUM_STEPS=${GRAD_ACCUM_STEPS:-8}" in result.env
    assert [*dict.fromkeys(memory.asked)] == [32, 4, 8]  # as set, for the slope, proposed
    assert machine(TRAINING, **BATCH | dict(grad_accum_steps=8)).status == 0


def test_fewer_rows_for_the_final_pass(machine, small_card):
    small_card(10)
    settings = dict(STREAM, eval_rows=16, val_batch_size=8 * 64)
    parts = [*TRAINING, "windows", "final pass"]
    result = machine(parts, **settings)
    fails(result, "final pass", "out of memory; with 1", "set EVAL_ROWS=1")
    rows = int(result.env.partition("EVAL_ROWS:-")[2].partition("}")[0])
    assert 8 <= rows < 16 and result.rows["windows"].startswith("ok ")
    assert machine(parts, **settings | dict(eval_rows=rows)).status == 0


def test_fewer_windows_at_once(machine, small_card):
    small_card(10)
    result = machine([*TRAINING, "windows", "final pass"], val_batch_size=32 * 64)
    fails(result, "windows", "set VAL_BATCH_SIZE=")
    assert result.rows["final pass"].startswith("ok ")  # sliding, with the proposal


def test_a_card_too_small_for_a_row(machine, small_card):
    memory = small_card(10)
    memory.size = 900
    result = machine([*TRAINING, "Hessians"], **BATCH)
    fails(result, "training step", "not even 1 of 32 rows", "MODEL_DIM")
    assert result.rows["Hessians"].startswith("- ")


def test_the_settings_are_for_the_same_system_and_ranks_unless_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SYSTEM", raising=False)
    check.write_env(True, dict(EVAL_ROWS=12))

    def sourced(nproc: int, **env) -> str:
        script = (
            f"set -eu; nproc={nproc}; . logs/check.env; echo ${{EVAL_ROWS:-none}} $check_failed"
        )
        run = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
        return run.stdout.strip()

    assert sourced(1) == "12 1"
    assert sourced(1, EVAL_ROWS="7") == "7 1"
    assert sourced(8) == sourced(1, SYSTEM="crawler") == "none 1"


FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *tools/settings.py*) echo "script=train_gpt.py RUN_ID=run gpus=1 nproc=1 dataset=data" ;
        echo "tokenizer=tokenizer artifact=artifact source=--demo text=" ;;
    *tools/check.py) mkdir -p logs && cp env logs/check.env ;;
    *tools/screen.py) cat ;;
    *train_gpt.py*--data*) ;;
    *train_gpt.py) echo "trains with ${GRAD_ACCUM_STEPS:-none}" ;;
esac
"""


def test_run_sh_ends_with_the_verdict_and_takes_the_settings(tmp_path):
    requirements = "requirements.txt", "tests/requirements.txt"
    for name in (
        "run.sh",
        "tools/supervise.sh",
        "tools/install.sh",
        "tools/lock.py",
        *requirements,
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "train_gpt.py").write_text("")
    wanted = [(ROOT / name).read_text() for name in requirements]
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "installed.txt").write_text("".join(wanted).rstrip("\n"))
    (tmp_path / "venv" / "bin" / "python").write_text(FAKE_PYTHON)
    (tmp_path / "venv" / "bin" / "python").chmod(0o755)
    (tmp_path / "env").write_text("check_failed=1\nexport GRAD_ACCUM_STEPS=32\n")

    def run_sh(*arguments: str) -> subprocess.CompletedProcess:
        env = dict(PATH=os.environ["PATH"], VENV="venv", DATA_PATH="data", RUN_ID="run")
        command = ["bash", tmp_path / "run.sh", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    assert "trains with none" in run_sh().stdout
    check_only = run_sh("check")
    assert check_only.returncode == 1 and "trains" not in check_only.stdout, check_only.stderr
    assert "trains with 32" in run_sh().stdout
    (tmp_path / "env").write_text("check_failed=0\n")
    assert run_sh("check").returncode == 0
    assert run_sh("chek").returncode == 2


# -----------------------------------------------------------------------------
# the forecast


def test_each_stage_takes_its_share_of_the_time():
    hp = toys.tiny_of("pure_gdn", train_batch_tokens=192, grad_accum_steps=3)
    hp.max_wallclock_seconds, hp.gptq_reserve_seconds, hp.iterations = 110.0, 10.0, 10_000
    hp.curriculum = "0:1x64 0.5:3x64"
    job = check.Job(
        hp=hp, steps=[0.1, 0.4], tokens_of=[64, 192], seconds={}, hessians=3.0, stream=range(64_000)
    )
    row = check.training_forecast(job)
    # 50 s of 0.1 s and 50 s of 0.4 s
    assert row.ok and row.found.startswith("625 steps in 100 s")
    assert math.isclose(job.seconds["training"], 103.0)


def test_bytes_are_those_of_the_artifact(tmp_path, lively):
    hp = toys.tiny_of("train_gpt", model_dim=64, vocab_size=512)
    model = train_gpt.GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    written = train_gpt.save_artifact(tmp_path / "model.ptz", model, hp, toys.usual(model))
    job = check.Job(hp=hp, model=model, seconds={})
    check.packing(job)
    assert abs(job.artifact_bytes / written - 1) < 0.05
