"""tools/packed.py and tools/repack.py: what is read of an artifact without train_gpt.py, and a run
that goes on where it stopped."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from in_process import planted, train
from toys import SYSTEMS, random_ids, system, toy

import train_gpt

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
import packed  # noqa: E402
import repack  # noqa: E402


def trained(path, name, lively):
    """An artifact of a system at this path, and its state; returns model, quantized, state."""
    hp = toy(name)
    model = lively(system(name).GPT(hp))
    batches = [(random_ids(hp, B=8, T=64, starts=(0,)), None)]
    hessians = model.calibrate(batches)
    quantized = train_gpt.quantize(model, hessians)
    train_gpt.save_artifact(path, model, hp, quantized)
    state = dict(system=hp.system, config=asdict(hp), hessians=hessians, figures={}, checks={})
    state |= dict(weights=dict(model.named_parameters()))
    torch.save(state, f"{path}.trained.pt")
    return model, quantized, state


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_artifact_is_read_without_the_program(tmp_path, lively, name):
    model, quantized, _ = trained(tmp_path / "a.ptz", name, lively)
    state = packed.read_state(tmp_path / "a.ptz.trained.pt")
    found = packed.read_packed(tmp_path / "a.ptz", state)
    assert found.keys() == quantized.keys()
    for tensor, (q, scale) in quantized.items():
        assert (found[tensor].q == q.numpy()).all(), tensor
        assert (found[tensor].scale == scale.float().numpy()).all(), tensor


def test_errors_are_those_of_the_outputs(tmp_path, lively):
    """On inputs that are there, not only their Hessian; and rounding is that of the program."""
    _, quantized, state = trained(tmp_path / "a.ptz", "train_gpt", lively)
    name, rows = "blocks.0.mlp.up_proj.weight", torch.randn(40, 32, dtype=torch.float64)
    state["hessians"][name] = rows.T @ rows
    found = packed.errors(packed.read_packed(tmp_path / "a.ptz", state), state)
    W, (q, scale) = state["weights"][name].detach().double(), quantized[name]
    values = dict(ours=q.double(), nearest=(W / scale.double()[:, None]).round().clamp(-31, 31))
    for error, q in zip(found[name], values.values(), strict=True):
        expected = (rows @ (W - q * scale.double()[:, None]).T).square().sum().item()
        assert error == pytest.approx(expected, rel=1e-6)


def test_what_gptq_gained_is_checked(tmp_path, lively):
    path = tmp_path / "a.ptz"
    model, quantized, state = trained(path, "train_gpt", lively)
    files = path, Path(f"{path}.trained.pt")
    passed, text = packed.check_gptq(*files)
    assert passed and float(re.search(r"error (0\.\d+) of", text)[1]) < 1, text
    train_gpt.save_artifact(path, model, model.hp)  # rounded to nearest
    passed, text = packed.check_gptq(*files)
    assert not passed and "no better: " in text
    one = dict(
        quantized,
        **{"blocks.0.mlp.up_proj.weight": train_gpt.quantize(model)["blocks.0.mlp.up_proj.weight"]},
    )
    train_gpt.save_artifact(path, model, model.hp, one)
    passed, text = packed.check_gptq(*files)
    assert not passed and text.endswith("no better: blocks.0.mlp.up_proj.weight")


def test_a_state_of_another_model_or_none_is_an_error_with_its_name(tmp_path, lively):
    _, _, state = trained(tmp_path / "a.ptz", "train_gpt", lively)
    trained(tmp_path / "b.ptz", "crawler", lively)
    other = packed.read_state(tmp_path / "b.ptz.trained.pt")
    with pytest.raises(ValueError, match=r"a\.ptz: \d+ bytes of values, the trained model has"):
        packed.read_packed(tmp_path / "a.ptz", other)
    for content in (b"", b"no zip", (tmp_path / "a.ptz.trained.pt").read_bytes()[:9000]):
        (tmp_path / "c.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"c\.pt: not the state of a finished training"):
            packed.read_state(tmp_path / "c.pt")
    torch.save(state | dict(weights={}), tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt: not the state .*: Hessians of tensors"):
        packed.read_state(tmp_path / "c.pt")


def repacked(folder, *args):
    script = Path(repack.__file__)
    return subprocess.run(
        [sys.executable, script, *args], cwd=folder, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize(
    "name, settings, options",
    [
        ("train_gpt", dict(ttt="lora", eval_mode="stream"), []),
        ("kv_share", {}, ["--train-script", "systems/kv_share.py"]),
    ],
)
def test_a_run_that_died_while_it_packed_goes_on(tmp_path, name, settings, options):
    """The same artifact and the same score as without the accident, and all checks in one log."""
    done, dead = tmp_path / "done", tmp_path / "dead"
    done.mkdir(), dead.mkdir()
    train(done, planted(tmp_path, name), iterations=6, **settings)
    shutil.copy(done / "model.ptz.trained.pt", dead)
    result = repacked(dead, "model.ptz", *options)
    assert result.returncode == 0, result.stderr
    assert (dead / "model.ptz").read_bytes() == (done / "model.ptz").read_bytes()
    old, new = (
        json.loads(re.search(r"^figures: (.*)$", path.read_text(), re.M)[1])
        for path in (done / "logs" / "run.txt", dead / "logs" / "run.repacked.txt")
    )
    assert new.pop("repacked") is True and new.keys() == old.keys()
    assert new["checks"].keys() == old["checks"].keys() and len(new["checks"]) == 8
    for name in ("val_bpb", "val_loss", "step_stop", "raw_val_bpb", "pre_quant_val_bpb", "seed"):
        assert new[name] == old[name], name


def test_what_cannot_be_repacked_is_said_in_a_line(tmp_path, lively):
    result = repacked(tmp_path, "model.ptz")
    assert result.returncode == 1 and result.stderr.startswith("repack: error: ")
    assert "model.ptz.trained.pt" in result.stderr and result.stderr.count("\n") == 1
    trained(tmp_path / "a.ptz", "pure_gdn", lively)
    result = repacked(tmp_path, "a.ptz")
    assert "a.ptz.trained.pt: its system is pure_gdn, not record" in result.stderr
