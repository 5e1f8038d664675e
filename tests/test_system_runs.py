"""Each system as a user starts it, at a toy size: a run, then its artifact in a new process."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT
from corpus import write_corpus
from toys import CURRICULUM, SYSTEMS, as_packed, random_ids, rounded, save_rounded, system, toy

import train_gpt

sys.path.append(str(ROOT / "tools"))
import repack  # noqa: E402  (the path comes first)

SMALL = dict(
    MODEL_DIM="32",
    GDN_HEADS="2",
    GDN_KEY_HEADS="1",
    GDN_HEAD_DIM="16",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    HEAD_DIM="16",
    WINDOW_SIZE="24",
    ROPE_DIMS="8",
    TIED_EMBED_INIT_STD="0.05",
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="384",
    GRAD_ACCUM_STEPS="3",
    ITERATIONS="12",
    WARMUP_STEPS="1",
    MAX_WALLCLOCK_SECONDS="0",
    GPTQ_CALIBRATION_BATCHES="4",
    ARTIFACT_TARGET_BYTES="0",
    EVAL_SEQ_LEN="64",
    EVAL_STRIDE="32",
    VAL_BATCH_SIZE="4096",
    EVAL_CHUNK="16",
    EVAL_ROWS="4",
    TTT_LORA_RANK="4",
    ARTIFACT="model.ptz",
    RUN_ID="run",
)
NGRAMS = dict(NGRAM_VOCAB_SIZE="256", NGRAM_DIM="16")
OWN = dict(
    train_gpt={},
    baseline=dict(ROPE_DIMS="16"),
    gdn_hybrid=NGRAMS,
    kv_share=NGRAMS | dict(TTT_CHUNK_TOKENS="128"),
    pure_gdn=dict(CURRICULUM=CURRICULUM),
    crawler=NGRAMS | dict(INST_DIM="4"),
    transformer=dict(TTT_CHUNK_TOKENS="128"),
    hybrid_1895=dict(TTT_CHUNK_TOKENS="128", GDN_KEY_HEADS="1", FREQUENT_TOKENS="100"),
)
# what runs in this process, which takes less time, with another layout
SHORT = dict(gdn_hybrid="G S S=1", hybrid_1895="G A (A)x2 A")
FINAL = re.compile(r"final_int\d_(?:sliding_window|stream)\w*_exact val_loss:\S+ val_bpb:(\S+)")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Environment that names a tiny corpus."""
    facts = write_corpus(tmp_path_factory.mktemp("corpus"), train_tokens=12_000, val_tokens=700)
    return {name.upper(): str(value) for name, value in facts.items()}


def start(name, folder, **env):
    """A run of a system, in `folder`, with nothing of our own environment that it would read."""
    script = ROOT / ("train_gpt.py" if name == "train_gpt" else f"systems/{name}.py")
    known = vars(system(name).Hyperparameters())
    inherited = {key: value for key, value in os.environ.items() if key.lower() not in known}
    env = inherited | env | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def printed(done):
    """What a run that ended well printed."""
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout


def figures_of(output):
    return json.loads(output.splitlines()[-1].removeprefix("figures: "))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name not in SHORT])
def test_a_run_of_a_system_and_its_artifact(corpus, tmp_path, name):
    log = printed(start(name, tmp_path, **SMALL | OWN[name] | corpus))
    figures = figures_of(log)
    checks = figures["checks"]
    expected = "bytes warm_up gradients once ledger"
    assert set(checks) >= {*expected.split(), "size", "time"}
    assert all(check["passed"] for check in checks.values())
    assert figures["system"] == name.replace("train_gpt", "record")
    assert figures["layout"] == system(name).Hyperparameters().layout
    assert figures["step_stop"] == 12

    # progress is n/12: two steps of one micro-batch, four of two, six of three
    micro_batches = 2 * 1 + 4 * 2 + 6 * 3 if name == "pure_gdn" else 12 * 3
    assert figures["tokens_read"] == 128 * (micro_batches + 4 * 3)
    stages = re.findall(r"warmup_step:1/1 progress:(\S+)", log)
    later = dict(pure_gdn=["0.15", "0.45"], transformer=["0.35"])
    assert stages == ["0", *later.get(name, [])]
    trained = log[log.index("train_time:") :]  # behind the warm-up
    begun = re.findall(r"step:(\d+)/12 train_loss\S+ \S+ \S+\nlayer_loop:enabled passes:(.*)", log)
    passes = "[0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]"
    assert begun == ([("5", passes)] if name == "transformer" else [])
    assert trained.count("layer_loop:") == len(begun)

    final = FINAL.search(log)
    learns = {"train_gpt": "_ttt_lora_", "kv_share": "_ttt_sgd_", "transformer": "_ttt_lora_"}
    assert learns.get(name, "_exact") in final[0] and ("_ttt_" in final[0]) == (name in learns)
    assert f"{figures['val_bpb']:.8f}" == final[1]

    artifact = (tmp_path / "model.ptz").read_bytes()
    scoring = {key: corpus[key] for key in ("DATA_PATH", "TOKENIZER_PATH")}
    again = printed(
        start(name, tmp_path, EVAL_ONLY="1", ARTIFACT="model.ptz", RUN_ID="again", **scoring)
    )
    assert FINAL.search(again)[0] == final[0]
    assert figures_of(again)["val_bpb"] == figures["val_bpb"]
    assert (tmp_path / "model.ptz").read_bytes() == artifact


def run_here(name, **env):
    """What a run of a system in this process and folder prints."""
    module, out = system(name), io.StringIO()
    with mock.patch.dict(os.environ, env, clear=True), contextlib.redirect_stdout(out):
        train_gpt.main(module.Hyperparameters, module.GPT)
    train_gpt.log.handlers.clear()
    return out.getvalue()


@pytest.mark.parametrize("name", SHORT)
def test_a_short_run_of_a_system_and_its_artifact(corpus, tmp_path, monkeypatch, name):
    """And the same artifact, made again of what the run kept before it quantized."""
    monkeypatch.chdir(tmp_path)
    short = dict(LAYOUT=SHORT[name], ITERATIONS="5", PARALLEL_START_LAYER="2")
    log = run_here(name, **SMALL | OWN[name] | corpus | short)
    figures, final = figures_of(log), FINAL.search(log)
    assert all(check["passed"] for check in figures["checks"].values())
    assert (figures["system"], figures["step_stop"]) == (name, 5)
    begun = re.findall(r"step:(\d+)/5 train_loss\S+ \S+ \S+\nlayer_loop:enabled passes:(.*)", log)
    assert begun == ([("2", "[0, 1, 2, 2, 3]")] if name == "hybrid_1895" else [])
    assert ("_ttt_sgd_" if name == "hybrid_1895" else "_exact") in final[0]
    artifact = (tmp_path / "model.ptz").read_bytes()
    again = run_here(name, EVAL_ONLY="1", ARTIFACT="model.ptz", **corpus)
    assert FINAL.search(again)[0] == final[0]
    path = (tmp_path / "model.ptz").rename("trained.ptz")
    with mock.patch.dict(os.environ, corpus, clear=True):
        repack.repack(Path("model.ptz.trained.pt"), Path("model.ptz"), system(name))
    train_gpt.log.handlers.clear()
    assert (tmp_path / "model.ptz").read_bytes() == path.read_bytes() == artifact


def test_another_systems_artifact_is_refused_in_one_line(corpus, tmp_path):
    for name in ("train_gpt", "crawler"):
        hp = toy(name)
        save_rounded(tmp_path / f"{name}.ptz", system(name).GPT(hp), hp)
    for name, other, said in (
        ("crawler", "train_gpt", "crawler, not record"),
        ("train_gpt", "pure_gdn", "record, not pure_gdn"),
    ):
        done = start(other, tmp_path, EVAL_ONLY="1", ARTIFACT=f"{name}.ptz", **corpus)
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert re.fullmatch(rf"{name}\.ptz: .*its system is {said}", last)
        assert "val_bpb" not in done.stdout


def test_every_artifact_is_read_by_its_own_system_alone(lively, tmp_path):
    for name in SYSTEMS:
        hp, path = toy(name), tmp_path / f"{name}.ptz"
        model = lively(system(name).GPT(hp))
        save_rounded(path, model, hp)
        for other in SYSTEMS:
            module = system(other)
            if other != name:
                with pytest.raises(ValueError, match=f"{name}.ptz: .*its system is"):
                    train_gpt.load_artifact(path, "cpu", module.Hyperparameters, module.GPT)
                continue
            loaded, found = train_gpt.load_artifact(path, "cpu", module.Hyperparameters, module.GPT)
            assert {**vars(found), "run_id": 0} == {**vars(hp), "run_id": 0}
            ids = random_ids(hp, starts=(0, 20))
            shipped = as_packed(model, rounded(model))
            assert torch.equal(loaded(ids), shipped(ids))


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_demo_of_a_system_is_valid_and_reads_text(name):
    hp = system(name).Hyperparameters.from_env(dict(PRESET="demo"))
    assert hp.preset == "demo" and hp.micro_steps() >= 1
    model = system(name).GPT(hp)
    model.set_progress(1.0)
    logits = model(random_ids(hp, B=1, T=32, starts=(0,)))
    assert logits.shape == (1, 32, hp.vocab_size) and logits.isfinite().all()


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_batch_of_a_system_is_split_evenly_over_ranks(monkeypatch, name, ranks):
    monkeypatch.setattr(train_gpt.world, "size", ranks)
    hp = system(name).Hyperparameters.from_env({})
    rows, rest = divmod(hp.train_batch_tokens, hp.micro_steps() * ranks * hp.train_seq_len)
    assert hp.preset == "record" and rows >= 1 and rest == 0


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_preset_that_a_system_has_not_is_refused_by_name(name):
    with pytest.raises(ValueError, match="PRESET='kv_share': no preset"):
        system(name).Hyperparameters.from_env(dict(PRESET="kv_share"))
