"""tools/rounding.py: each way is what it says, and is packed, loaded and scored."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
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
    """The quadratic mean, as for one step the widths of rows are by their deviations. A row of
    nothing, whose width is bounded, changes no step."""
    W, H = correlated(rows=13)
    W[3] = 0.0
    step = 40.0
    _, scale = rounding.by_row(W, H, 8, (127 * step / W.std(1)).clamp(max=1e4))
    deviation = W.std(1) / W.std(1).square().mean().sqrt()
    torch.testing.assert_close(scale.float(), step * deviation, rtol=1e-3, atol=2**-24)


def test_only_the_embedding_is_read_once():
    H = torch.eye(3)
    assert torch.equal(rounding.read_once("tok_emb.weight", H), H / 2)
    assert rounding.read_once("blocks.0.mixer.q_proj.weight", H) is H


def trained_toy(lively, packed):
    """A model, its calibration batches, and packing that is replaced."""
    hp = train_gpt.Hyperparameters(**TINY | dict(layout="G S", run_id="run"))
    model = lively(train_gpt.GPT(hp))
    batches = [torch.randint(2, hp.vocab_size, (2, 2, 16)) for _ in range(2)]
    hessians = train_gpt.collect_hessians(model, batches)
    own = dict(hp=hp, model=model, hessians=hessians, packed=packed, reached=0)
    return SimpleNamespace(**own, batches=lambda count: batches)


def test_rotated_values_are_the_same_function_with_hessians_of_its_own(lively):
    x = trained_toy(lively, lambda size, hessians, model: (hessians, model))
    hessians, model = rounding.values_rotated(x, 1)
    ids = torch.randint(2, x.hp.vocab_size, (2, 20))
    torch.testing.assert_close(model(ids), x.model(ids), rtol=1e-4, atol=1e-4)
    names = ["blocks.1.mixer.v_proj.weight", "blocks.1.mixer.o_proj.weight"]
    for name, W in model.named_parameters():
        assert torch.equal(W, x.model.get_parameter(name)) == (name not in names)
    expected = train_gpt.collect_hessians(model, x.batches(1))
    for name, H in expected.items():
        torch.testing.assert_close(hessians[name], H, rtol=1e-3, atol=1e-4)


def test_inputs_are_those_of_the_rounded_model(lively):
    seen = []

    def packed(size, hessians=None):
        seen.append(hessians)
        return rounded

    x = trained_toy(lively, packed)
    rounded = copy.deepcopy(x.model)
    with torch.no_grad():
        rounded.blocks[0].mlp.up_proj.weight.mul_(2)
    rounding.calibrated_rounded(x, 1)
    rounding.calibrated_longer(x, 1)
    assert seen[0] is None and len(seen) == 3
    for model, found in zip((rounded, x.model), seen[1:], strict=True):
        expected = train_gpt.collect_hessians(model, x.batches(1))
        assert all(torch.equal(found[name], H) for name, H in expected.items())


def test_errors_given_back_are_the_best_of_their_rank_at_a_byte_a_number(lively):
    """No other update of that rank leaves less error in the outputs: the squares of the singular
    values behind it."""
    sizes = []

    def packed(size):
        sizes.append(size)
        return copy.deepcopy(rounded)

    x = trained_toy(lively, packed)
    rounded = copy.deepcopy(x.model)
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_((4 * p).round() / 4)
    found, numbers = rounding.low_rank(x, 100_000, rank=2), 0
    for name, W in x.model.named_parameters():
        own, before = found.get_parameter(name), rounded.get_parameter(name)
        if x.model.kinds[name] != train_gpt.MATRIX:
            assert torch.equal(own, before)
            continue
        numbers += 2 * sum(W.shape)
        assert torch.linalg.matrix_rank(own - before, rtol=1e-3) <= 2
        H = x.hessians[name].double()
        H += 0.01 * H.diagonal().mean() * torch.eye(len(H))
        values, vectors = torch.linalg.eigh(H)
        root = vectors * values.sqrt()  # root root^T = H
        rest = torch.linalg.svdvals((W - before).double() @ root)[2:].square().sum()
        left = ((W - own).double() @ root).square().sum()
        torch.testing.assert_close(left, rest, rtol=1e-3, atol=1e-6)
    assert sizes == [100_000 - numbers] and x.reached == numbers


def test_more_calibration_begins_where_that_of_the_run_did(tmp_path, monkeypatch):
    train(tmp_path, ROOT / "train_gpt.py", run_id="run")
    monkeypatch.chdir(tmp_path)
    x = rounding.Trained(Path("model.ptz"))
    found = train_gpt.collect_hessians(x.model, x.batches(x.hp.gptq_calibration_batches))
    assert found.keys() == x.hessians.keys()
    for name, H in found.items():
        torch.testing.assert_close(H, x.hessians[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [None, 21_000])
def test_every_way_is_scored_at_the_same_bytes(tmp_path, monkeypatch, capsys, size):
    train(tmp_path, ROOT / "train_gpt.py", run_id="run")
    monkeypatch.chdir(tmp_path)
    arguments = ["rounding.py", "model.ptz"] + (["--bytes", str(size)] if size else [])
    monkeypatch.setattr(sys, "argv", arguments)
    for name in rounding.TEXT:
        monkeypatch.delenv(name.upper(), raising=False)
    assert rounding.main() == 0
    code = sum(path.stat().st_size for path in train_gpt.code_files())
    target = size or (tmp_path / "model.ptz").stat().st_size
    _, name, *rows = capsys.readouterr().out.splitlines()
    assert name == "model.ptz" and len(rows) == len(rounding.WAYS)
    for way, row in zip(rounding.WAYS, rows, strict=True):
        label, reached, before, after, loss = row.rsplit(maxsplit=4)
        assert label.strip() == way
        below = target - int(reached.replace(",", ""))
        assert 0 <= below < 0.02 * (target + code)  # where bytes jump
        assert float(after) - float(before) == pytest.approx(float(loss), abs=2e-4)
        assert 0 < float(before) < 10
    assert len({row.split()[-1] for row in rows}) > len(rows) / 2


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rounding.py", str(tmp_path / "none.ptz")])
    said = rounding.main()
    assert said.startswith("rounding: error: ") and "none.ptz.trained.pt" in said


@pytest.mark.parametrize("system", ["json", "none"])
def test_another_system_is_one_line(tmp_path, monkeypatch, system):
    torch.save(
        dict(weights={}, hessians={}, figures={}, config={}, system=system),
        tmp_path / "a.ptz.trained.pt",
    )
    monkeypatch.setattr(sys, "argv", ["rounding.py", str(tmp_path / "a.ptz")])
    assert rounding.main().startswith(f"rounding: error: SYSTEM={system!r}: expected one of ")
