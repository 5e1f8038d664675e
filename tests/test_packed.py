"""tools/packed.py and tools/repack.py: what is read of an artifact without train_gpt.py, and a run
that goes on where it stopped."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from in_process import planted, train
from toys import STEP, SYSTEMS, random_ids, rounded, save_rounded, system, toy

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
    quantized = train_gpt.quantize(model, hessians, STEP)
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
    save_rounded(path, model, model.hp)  # rounded to nearest
    passed, text = packed.check_gptq(*files)
    assert not passed and "no better: " in text
    one = dict(
        quantized,
        **{"blocks.0.mlp.up_proj.weight": rounded(model)["blocks.0.mlp.up_proj.weight"]},
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
        with pytest.raises(ValueError, match=r"c\.pt: damaged, or not what a run keeps"):
            packed.read_state(tmp_path / "c.pt")
    torch.save(state | dict(weights={}), tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt: damaged, or .*: Hessians of tensors"):
        packed.read_state(tmp_path / "c.pt")
    state["weights"]["blocks.0.mixer.A_log"].data.add_(0.1)
    with pytest.raises(
        ValueError, match=r"a\.ptz: another blocks\.0\.mixer\.A_log than was trained: they are"
    ):
        packed.read_packed(tmp_path / "a.ptz", state)


def without(name):
    return lambda state: {key: x for key, x in state.items() if key != name}


NAME = "blocks.0.mlp.up_proj.weight"


def with_hessian(H):
    return lambda state: state | dict(hessians=state["hessians"] | {NAME: H})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: [state], "a list"),
        (without("hessians"), "it has no hessians"),
        (without("weights"), "it has no weights"),
        (with_hessian(torch.eye(3)), f"the Hessian of {NAME}: [3, 3] for"),
        (with_hessian(torch.full((32, 32), torch.nan)), f"{NAME} or its Hessian is not finite"),
    ],
    ids="list hessians weights shape nan".split(),
)
def test_a_state_with_something_wrong_in_it(tmp_path, lively, change, message):
    path = tmp_path / "a.ptz"
    _, _, state = trained(path, "train_gpt", lively)
    torch.save(change(state), f"{path}.trained.pt")
    error = packed.main([str(path)])
    assert f"a.ptz.trained.pt: damaged, or not what a run keeps: {message}" in error
    assert error.startswith("packed: error: ") and "\n" not in error
    passed, text = packed.check_gptq(path, Path(f"{path}.trained.pt"))
    assert not passed and message in text


def cut(data):
    return data[:-1]


def another_stream(data):  # of the right sha256
    return data[:8] + hashlib.sha256(b"no brotli").digest() + b"no brotli"


@pytest.mark.parametrize("change", [cut, another_stream, lambda data: b"", lambda data: b"x" * 99])
def test_an_artifact_that_is_none_is_one_line(tmp_path, lively, change):
    path = tmp_path / "a.ptz"
    trained(path, "train_gpt", lively)
    path.write_bytes(change(path.read_bytes()))
    error = packed.main([str(path)])
    assert error.startswith(f"packed: error: {path}: no artifact") and "\n" not in error
    assert not packed.check_gptq(path, Path(f"{path}.trained.pt"))[0]


def test_a_file_that_is_not_there_or_a_folder_is_one_line(tmp_path, lively):
    path = tmp_path / "a.ptz"
    assert "No such file or directory" in packed.main([str(path)])
    trained(path, "train_gpt", lively)
    path.unlink()
    assert f"No such file or directory: '{path}'" in packed.main([str(path)])
    path.mkdir()
    assert f"Is a directory: '{path}'" in packed.main([str(path)])


def test_nothing_quantized_is_no_division_by_zero(tmp_path, lively, capsys):
    """No Hessians at all; and a tensor that rounding does not change."""
    model, quantized, state = trained(tmp_path / "a.ptz", "train_gpt", lively)
    torch.save(state | dict(hessians={}), tmp_path / "a.ptz.trained.pt")
    assert not packed.check_gptq(tmp_path / "a.ptz", tmp_path / "a.ptz.trained.pt")[0]
    with torch.no_grad():
        quantized[NAME] = (torch.zeros_like(quantized[NAME][0]), quantized[NAME][1])
        state["weights"][NAME].zero_()
    train_gpt.save_artifact(tmp_path / "a.ptz", model, model.hp, quantized)
    torch.save(state, tmp_path / "a.ptz.trained.pt")
    assert packed.main([str(tmp_path / "a.ptz")]) == 0
    assert re.search(rf"^ *nan of +0  {NAME}$", capsys.readouterr().out, re.M)


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
    assert new["checks"].keys() == old["checks"].keys() and len(new["checks"]) == 7
    for name in ("val_bpb", "val_loss", "step_stop", "raw_val_bpb", "pre_quant_val_bpb", "seed"):
        assert new[name] == old[name], name


def test_variables_of_packing_are_read_again():
    hp = toy("train_gpt", artifact_target_bytes=0, model_dim=48)
    env = dict(ARTIFACT_TARGET_BYTES="150000", EMBED_BITS="5", ROUNDING_STEP="0.125")
    found = repack.with_packing_of(env | dict(MODEL_DIM="64", PRESET="demo"), hp)
    assert (found.artifact_target_bytes, found.embed_bits) == (150_000, 5)
    assert found.rounding_step == 0.125
    own = dict(artifact_target_bytes=0, embed_bits=hp.embed_bits, rounding_step=hp.rounding_step)
    assert replace(found, **own) == hp
    with pytest.raises(ValueError, match="^ARTIFACT_TARGET_BYTES='all': expected int$"):
        repack.with_packing_of(dict(ARTIFACT_TARGET_BYTES="all"), hp)


def test_groups_add_up_their_tensors(tmp_path, lively, capsys):
    path = tmp_path / "a.ptz"
    model, quantized, state = trained(path, "train_gpt", lively)
    groups = {g.name: g for g in packed.groups_of(packed.read_packed(path, state), state)}
    assert sum(g.tensors for g in groups.values()) == len(quantized)
    assert sum(g.values for g in groups.values()) == sum(q.numel() for q, _ in quantized.values())
    q, scale = quantized["tok_emb.weight"]
    W, H = model.tok_emb.weight.detach().double(), state["hessians"]["tok_emb.weight"].double()
    E, shares = W - q * scale.double()[:, None], q.unique(return_counts=True)[1] / q.numel()
    table = groups["embedding, also output"]
    assert table.values == q.numel() and 2 ** (table.bits - 1) > q.abs().max() > 0
    assert table.bytes == pytest.approx(-(shares * shares.log2()).sum().item() * q.numel() / 8)
    assert table.error == pytest.approx((E @ H @ E.T).trace().item(), rel=1e-4)
    assert table.outputs == pytest.approx((W @ H @ W.T).trace().item(), rel=1e-4)
    assert packed.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].strip() for line in lines[1 : len(groups) + 1]] == [*groups]
    assert lines[len(groups) + 2].split() == ["artifact", f"{path.stat().st_size:,}"]


def test_what_cannot_be_repacked_is_said_in_a_line(tmp_path, lively):
    result = repacked(tmp_path, "model.ptz")
    assert result.returncode == 1 and result.stderr.startswith("repack: error: ")
    assert "model.ptz.trained.pt" in result.stderr and result.stderr.count("\n") == 1


def another_weight(state):
    return state | dict(weights=state["weights"] | dict(other=torch.zeros(2)))


def another_shape(state):
    return state | dict(weights=state["weights"] | {"blocks.0.mixer.A_log": torch.zeros(3)})


@pytest.mark.parametrize(
    "change, options, message",
    [
        (dict, ["systems/pure_gdn.py"], "its system is record, not pure_gdn"),
        (without("config"), [], "damaged, or not what a run keeps: it has no config"),
        (lambda state: state | dict(config=dict(other=1)), [], "of another version of record: "),
        (another_weight, [], "other is [2], the model's none"),
        (another_shape, [], "blocks.0.mixer.A_log is [3], the model's [2]"),
        (dict, ["nowhere.py"], "--train-script nowhere.py: expected "),
        (dict, ["tools/packed.py"], "--train-script tools/packed.py: expected "),
        (dict, ["systems/parts.py"], "--train-script systems/parts.py: no system"),
        (dict, ["systems"], "--train-script systems: expected "),
    ],
    ids="system config version weight shape nowhere tool parts folder".split(),
)
def test_what_cannot_be_repacked_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, lively, change, options, message
):
    monkeypatch.chdir(tmp_path)
    _, _, state = trained(tmp_path / "a.ptz", "train_gpt", lively)
    torch.save(change(state), tmp_path / "a.ptz.trained.pt")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    error = repack.main(["a.ptz", *(["--train-script", *options] if options else [])])
    assert error.startswith("repack: error: ") and message in error and "\n" not in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "source, message",
    [("x = (", "never closed"), ("import no_such_module", "No module named")],
)
def test_a_script_with_an_error_in_it_is_one_line(tmp_path, monkeypatch, source, message):
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems" / "own_system.py").write_text(source)
    monkeypatch.setattr(repack, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "systems")
    error = repack.main(["a.ptz", "--train-script", "systems/own_system.py"])
    assert error.startswith("repack: error: --train-script systems/own_system.py: ")
    assert message in error and "\n" not in error
