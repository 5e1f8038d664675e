"""tools/bench.py: its comparisons are fair and its estimates are right."""

import contextlib
import io
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from corpus import BOS, write_corpus

import train_gpt

sys.path.insert(0, str(ROOT / "tools"))

import bench  # noqa: E402  (the path comes first)


@pytest.mark.parametrize("bits, sigmas", [(6, 12.85), (7, 15.0), (8, 20.0), (4, 2.0)])
def test_the_rate_of_a_rounded_normal(bits, sigmas):
    """Against the entropy of the values that a million draws round to."""
    qmax = 2 ** (bits - 1) - 1
    q = (torch.randn(1_000_000, dtype=torch.float64) * qmax / sigmas).round().clamp(-qmax, qmax)
    share = torch.unique(q, return_counts=True)[1] / len(q)
    assert bench.gaussian_bits(bits, sigmas) == pytest.approx(-(share * share.log2()).sum().item(), abs=0.01)


def test_the_estimate_of_an_artifact(tiny, tmp_path):
    """Of normal weights: what brotli makes of them, but for the description of the tensors."""
    hp = tiny(layout="S2", model_dim=128, mlp_mult=4.0, ngram_vocab_size=0)
    model = train_gpt.GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    size = train_gpt.save_artifact(tmp_path / "model.ptz", model, hp)
    assert sum(bench.estimated_bytes(hp)) == pytest.approx(size, rel=0.05)


def test_toys_have_the_same_parameters_and_the_same_tokens():
    target = bench.toy("record", 1_300_000, 1)[1]
    for preset in bench.PUBLISHED:
        settings, count = bench.toy(preset, target, 614_400)
        hp = train_gpt.Hyperparameters(**(train_gpt.PRESETS[preset] | settings))
        hp.validate()
        assert count == pytest.approx(target, rel=0.02)
        tokens = 0
        for step in range(hp.iterations):
            _, micro_steps, _ = max(stage for stage in train_gpt.stages(hp) if stage[0] <= step / hp.iterations)
            tokens += micro_steps * hp.train_batch_tokens // hp.grad_accum_steps
        assert tokens == pytest.approx(614_400, rel=0.005)


def test_every_preset_fits_the_cap(capsys):
    """Also with the 120 kB that brotli needed above the entropy of #1787's artifact."""
    bench.bench_size(None)
    rows = dict(re.findall(r"^(\w+) .* ([\d,]+) +[\d.]+%$", capsys.readouterr().out, re.M))
    assert rows.keys() == train_gpt.PRESETS.keys()
    assert [preset for preset, total in rows.items() if int(total.replace(",", "")) + 120_000 > 16_000_000] == []


def test_throughput_trains(monkeypatch, capsys):
    for name, value in TINY.items():
        monkeypatch.setenv(name.upper(), str(value))
    monkeypatch.setenv("LAYOUT", "A (A)x3 A")
    bench.bench_throughput(SimpleNamespace(runs=1))
    out = capsys.readouterr().out
    assert re.search(r"record, cpu: [\d,]+ tokens/s", out)
    # five passes: q and o, k and v of half the heads, up and down; then the n-gram projection and the head
    weights = 5 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 32 * 64) + 16 * 32 + 32 * 64
    assert f"matmul floor {6 * weights / 1e6:.1f} MFLOP/token" in out


def test_a_toy_runs_and_is_read(tmp_path, monkeypatch):
    """A whole run of train_gpt.py; what it says of itself is what the table shows."""
    settings = TINY | write_corpus(tmp_path) | dict(iterations=3, gptq_calibration_batches=1)
    for name in ("data_path", "tokenizer_path"):
        monkeypatch.delenv(name.upper(), raising=False)
    bpb, rate = bench.toy_run("record", settings, seed=1)
    assert 0.5 < bpb < 20 and rate > 0
    with pytest.raises(RuntimeError, match="record, seed 1"):
        bench.toy_run("record", settings | dict(layout="X"), seed=1)


def test_the_curve_against_a_loop():
    """Documents of all lengths, also empty ones and one past the last border; targets in no order."""
    random = np.random.default_rng(0)
    lengths = [9000, 1, 1, 64, 65, *random.integers(1, 5000, 20).tolist()]
    tokens = np.concatenate([[1, *random.integers(2, 9, n - 1)] for n in lengths])
    position = random.permutation(np.arange(1, len(tokens)))
    scores = dict(nats=random.random(len(position)), bytes=random.integers(0, 5, len(position)), position=position)
    borders = [64, 128, 256, 512, 1024, 2048, 4096, 8192, math.inf]
    expected, place, offsets = [[0, 0.0, 0] for _ in borders], -1, []
    for token in tokens:
        place = 0 if token == 1 else place + 1
        offsets.append(place)
    for nats, size, at in zip(*scores.values(), strict=True):
        bucket = next(i for i, border in enumerate(borders) if offsets[at] < border)
        expected[bucket] = [a + b for a, b in zip(expected[bucket], (1, nats, size), strict=True)]
    count, bits = bench.by_offset(scores, np.flatnonzero(tokens == 1))
    assert count.tolist() == [n for n, _, _ in expected] and min(count) > 0
    assert bits == pytest.approx([nats / math.log(2) / size for _, nats, size in expected])


def test_the_curve_of_short_documents():
    """Offsets that no target has have no bits either, and are no error."""
    scores = dict(nats=np.ones(3), bytes=np.array([2, 0, 4]), position=np.array([1, 2, 3]))  # the second is a BOS
    count, bits = bench.by_offset(scores, np.array([0, 2]))
    assert count.tolist() == [3] + [0] * 8 and np.isnan(bits[1:]).all()
    assert bits[0] == pytest.approx(3 / math.log(2) / 6)


@pytest.fixture
def artifact(tmp_path, monkeypatch):
    """A tiny artifact, of which the environment tells as a user would; the working folder is the one it lies in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    corpus = write_corpus(tmp_path / "data", val_tokens=2400)
    settings = TINY | corpus | dict(
        layout="G S", iterations=3, ttt_chunk_tokens=256, ttt_freeze_blocks=1, eval_chunk=16, eval_seq_len=128)
    with mock.patch.dict(os.environ, {name.upper(): str(value) for name, value in settings.items()}):
        train_gpt.main()
    train_gpt.log.handlers.clear()
    monkeypatch.setenv("ARTIFACT", "final_model.int6.ptz")
    monkeypatch.setenv("TTT_LORA_LR", "0.01")
    monkeypatch.setenv("TTT", "sgd")  # a row's own settings come first


@pytest.fixture
def in_process(monkeypatch):
    """Runs without the seconds that a process takes to start."""

    def run_output(name, settings, folder):
        out = io.StringIO()
        with mock.patch.dict(os.environ, settings), contextlib.chdir(folder), contextlib.redirect_stdout(out):
            train_gpt.main()
        train_gpt.log.handlers.clear()
        return out.getvalue()

    monkeypatch.setattr(bench, "run_output", run_output)


@pytest.fixture
def evaluate(artifact, monkeypatch, capsys):
    """evaluate(*rows) -> what --evaluation prints: its head, and the cells of both tables below theirs."""

    def start(*rows):
        monkeypatch.setattr(sys, "argv", f"bench.py --evaluation --folder runs --rows {' '.join(rows)}".split())
        bench.main()
        head, *tables = capsys.readouterr().out.split("\n\n")
        return head, *([line.strip("| ").split(" | ") for line in text.splitlines()[2:]] for text in tables)

    return start


def own_figures(name: str, settings: str) -> tuple[float, int]:
    """Bits per byte and milliseconds that the run says of itself, which had these settings and left these scores."""
    log = Path("runs", "logs", f"{name}.txt").read_text().split("=" * 100)[-1]
    modes = "EVAL_ONLY=True EVAL_SECONDS=0.0 TTT_LORA_LR=0.01".split() + settings.strip("`").split()
    modes += [default for default in ("TTT=", "TTT_PHASES=0") if default.split("=")[0] + "=" not in settings]
    assert [mode for mode in modes if f"  {mode.split('=')[0].lower()}: {mode.split('=')[1]}\n" not in log] == []
    _, (label, ms) = re.findall(r"^final_int6_(\S+) val_loss.* eval_time:(\d+)ms$", log, re.M)
    ((same_label, bpb),) = re.findall(r"^final_int6_(\S+)_exact val_loss:\S+ val_bpb:(\S+)$", log, re.M)
    assert label == same_label == "_ttt_".join(
        ["stream" if "stream" in name else "sliding_window", *re.findall("sgd|lora", name)])
    with np.load(Path("runs", f"{name}.npz")) as scores:
        assert scores["nats"].sum() / math.log(2) / scores["bytes"].sum() == pytest.approx(float(bpb), abs=1e-6)
    return float(bpb), int(ms)


def test_the_evaluations_are_the_runs(evaluate, in_process):
    """All modes; what the tables show is what the runs say."""
    head, rows, curve = evaluate(*bench.EVALUATIONS)
    assert "2,399 targets" in head and "TTT_LORA_LR=0.01" in head
    assert "EVAL_CHUNK=16 EVAL_ROWS=4 EVAL_SEQ_LEN=128 " in head
    assert [row[0] for row in rows] == [*bench.EVALUATIONS] and "EVAL_STRIDE=128`" in rows[0][1]
    own = [own_figures(*row[:2]) for row in rows]
    base_bpb, base_ms = own[1]
    assert [row[2:] for row in rows] == [
        [f"{bpb:.4f}", f"{bpb - base_bpb:+.4f}", f"{ms / 1000:.2f}", f"{base_ms / ms:.2f}x"] for bpb, ms in own]
    assert len({bpb for bpb, _ in own}) == len(rows), "two rows are the same mode"
    assert [row[0] for row in curve] == ["0-63", "64-127", "128-255", "256-511", "512-1023", "1024-2047"]
    assert sum(int(row[1].replace(",", "")) for row in curve) == 2399
    for column, row in enumerate(rows, 2):
        with np.load(Path("runs", f"{row[0]}.npz")) as scores:
            tokens = train_gpt.TokenStream("data", "val", 384).read(0, 2400).numpy()
            _, bits = bench.by_offset(scores, np.flatnonzero(tokens == BOS))
        assert [line[column] for line in curve] == [f"{x:.4f}" for x in bits[:6]]


def test_rows_by_number_or_name(evaluate, in_process):
    """In the order of the table; without sliding-64 there is nothing to compare with."""
    _, rows, curve = evaluate("stream", "1")
    assert [(row[0], row[3], row[5]) for row in rows] == [("non-overlapping", "-", "-"), ("stream", "-", "-")]
    assert {len(row) for row in curve} == {4}


def test_an_evaluation_in_a_process_of_its_own(evaluate, monkeypatch):
    """As the command does it, and what it says of a run that fails."""
    _, rows, _ = evaluate("3")
    assert [row[2] for row in rows] == [f"{own_figures(*row[:2])[0]:.4f}" for row in rows]
    monkeypatch.setenv("LOGIT_SOFTCAP", "7")
    with pytest.raises(RuntimeError, match=r"^stream: (.|\n)*LOGIT_SOFTCAP=7.0: expected 30.0, as the artifact says"):
        evaluate("stream")
