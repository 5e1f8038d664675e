"""tools/bench.py: its comparisons are fair and its estimates are right."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
from corpus import write_corpus

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


