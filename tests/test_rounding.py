"""tools/rounding.py: each way is what it says, and is packed, loaded and scored."""

import sys

import pytest
import torch
from conftest import ROOT
from in_process import train

import train_gpt

sys.path.append(str(ROOT / "tools"))
import rounding  # noqa: E402  (the path comes first)


def correlated(rows=12, cols=20):
    """Weights whose rows differ in size, and the Hessian of inputs that go together."""
    X = torch.randn(200, cols) @ torch.randn(cols, cols)
    return torch.randn(rows, cols) * torch.logspace(-1, 1, rows)[:, None], X.mT @ X / len(X)


def test_without_correlations_each_value_is_rounded_to_the_nearest():
    W, H = correlated()
    found = rounding.uncorrelated("any", H)
    torch.testing.assert_close(found.diagonal().mean(), H.diagonal().mean())
    q, scale = train_gpt.gptq_quantize(W, found, 6, 12.0)
    assert torch.equal(q, (W / scale.float()[:, None]).round().to(torch.int8))


def test_steps_by_row_are_in_proportion_to_its_deviation_and_as_large_in_the_mean():
    """The quadratic mean, as for one step the widths of rows are by their deviations."""
    W, H = correlated()
    step = 40.0
    _, scale = rounding.by_row(W, H, 8, 127 * step / W.std(1))
    deviation = W.std(1) / W.std(1).square().mean().sqrt()
    torch.testing.assert_close(scale.float(), step * deviation, rtol=1e-3, atol=0)


def test_only_the_embedding_is_read_once():
    H = torch.eye(3)
    assert torch.equal(rounding.read_once("tok_emb.weight", H), H / 2)
    assert rounding.read_once("blocks.0.mixer.q_proj.weight", H) is H


@pytest.mark.parametrize("size", [None, 25_000])
def test_every_way_is_scored_at_the_same_bytes(tmp_path, monkeypatch, capsys, size):
    """By default of the artifact; else of so many besides the code."""
    train(tmp_path, ROOT / "train_gpt.py", run_id="run")
    monkeypatch.chdir(tmp_path)
    code = sum(path.stat().st_size for path in train_gpt.code_files())
    arguments = ["rounding.py", "model.ptz"] + (["--bytes", str(code + size)] if size else [])
    monkeypatch.setattr(sys, "argv", arguments)
    for name in rounding.TEXT:
        monkeypatch.delenv(name.upper(), raising=False)
    assert rounding.main() == 0
    target = code + (size or (tmp_path / "model.ptz").stat().st_size)
    _, name, *rows = capsys.readouterr().out.splitlines()
    assert name == "model.ptz" and len(rows) == len(rounding.WAYS)
    for way, row in zip(rounding.WAYS, rows, strict=True):
        label, bytes_, before, after, loss = row.rsplit(maxsplit=4)
        assert label.strip() == way and bytes_ == f"{target:,}"
        assert float(after) - float(before) == pytest.approx(float(loss), abs=2e-4)
        assert 0 < float(before) < 10


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rounding.py", str(tmp_path / "none.ptz")])
    said = rounding.main()
    assert said.startswith("rounding: error: ") and "none.ptz.trained.pt" in said
