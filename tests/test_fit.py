"""Every byte used, none over: the artifact and the code end at ARTIFACT_TARGET_BYTES or just below,
and bytes go where they take most off the error of the outputs."""

import contextlib
import re
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from toys import STEP, SYSTEMS, matrices_of, random_ids, system, toy

import train_gpt
from train_gpt import gptq_quantize, quantize

sys.path.append(str(ROOT / "tools"))
import packed  # noqa: E402  (the path comes first)

CODE = [100_000, 23_456]  # bytes of two files


@pytest.fixture(autouse=True)
def code(tmp_path, monkeypatch):
    """What is counted besides the artifact, of known sizes."""
    paths = [tmp_path / "one.py", tmp_path / "two.py"]
    for path, size in zip(paths, CODE, strict=True):
        path.write_bytes(bytes(size))
    monkeypatch.setattr(train_gpt, "code_files", lambda: paths)


def hessians_of(model, spread=1.0) -> dict:
    """Of a token; of correlated inputs whose size differs from tensor to tensor."""
    found = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        if model.kinds[name] != train_gpt.SCALAR:
            X = torch.randn(4 * p.shape[1], p.shape[1]) @ torch.randn(2 * (p.shape[1],))
            found[name] = X.mT @ X / X.numel() * np.exp(spread * np.sin(i))
    return found


def trained_like(name, tmp_path, target, **changes):
    """A toy with rows and columns of different sizes, and its Hessians."""
    torch.manual_seed(0)
    changes = dict(model_dim=48, vocab_size=256, artifact=str(tmp_path / "a.ptz")) | changes
    hp = toy(name, artifact_target_bytes=target, **changes)
    model = system(name).GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_().mul_(0.05 * torch.exp(0.3 * torch.randn(p.shape[-1:])))
    return hp, model, hessians_of(model)


@contextlib.contextmanager
def counted_passes():
    """A list that has an entry for each pass of the quantizer."""
    passes = []

    def quantize_and_count(*args):
        passes.append(args)
        return quantize(*args)

    with mock.patch.object(train_gpt, "quantize", quantize_and_count):
        yield passes


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_target_is_met_from_below_within_a_thousandth(tmp_path, name):
    hp, model, hessians = trained_like(name, tmp_path, 0)
    train_gpt.fit(hp, model, hessians)
    as_set = (tmp_path / "a.ptz").stat().st_size
    for share in 0.8, 1.1:
        target = hp.artifact_target_bytes = int(share * as_set) + sum(CODE)
        train_gpt.fit(hp, model, hessians)
        assert 0.999 * target <= (tmp_path / "a.ptz").stat().st_size + sum(CODE) <= target


def test_without_a_target_the_step_is_as_set(tmp_path):
    hp, model, hessians = trained_like("train_gpt", tmp_path, 0, rounding_step=0.1)
    with counted_passes() as passes:
        train_gpt.fit(hp, model, hessians)
    assert len(passes) == 1
    train_gpt.save_artifact(tmp_path / "b.ptz", model, hp, quantize(model, hessians, 0.1))
    assert (tmp_path / "a.ptz").read_bytes() == (tmp_path / "b.ptz").read_bytes()


def test_what_is_over_the_cap_is_made_to_fit_it(tmp_path, monkeypatch):
    """Without a target too: a run that is too large would be no submission."""
    hp, model, hessians = trained_like("train_gpt", tmp_path, 0)
    train_gpt.fit(hp, model, hessians)
    cap = int(0.9 * (tmp_path / "a.ptz").stat().st_size) + sum(CODE)
    monkeypatch.setattr(train_gpt, "SIZE_LIMIT", cap)
    train_gpt.fit(hp, model, hessians)
    assert 0.999 * cap <= (tmp_path / "a.ptz").stat().st_size + sum(CODE) <= cap


def test_a_target_that_no_step_reaches_is_one_line(tmp_path):
    """The scales and what is not quantized take more. What lies there is all zeros, or nearly."""
    hp, model, hessians = trained_like("train_gpt", tmp_path, sum(CODE) + 1000, layout="G S")
    with pytest.raises(train_gpt.Refused) as error:
        train_gpt.fit(hp, model, hessians)
    size = (tmp_path / "a.ptz").stat().st_size + sum(CODE)
    said = f"ARTIFACT_TARGET_BYTES={sum(CODE) + 1000}: artifact and code still have {size} bytes"
    assert str(error.value) == said
    nothing = {
        name: (torch.zeros_like(q), scale)
        for name, (q, scale) in quantize(model, hessians, 1e9).items()
    }
    least = train_gpt.save_artifact(tmp_path / "b.ptz", model, hp, nothing)
    assert size == pytest.approx(least + sum(CODE), rel=0.01)


def test_bytes_that_jump_end_below_the_target(tmp_path, monkeypatch):
    """Where no step ends within a thousandth: coarser steps, not an error."""
    hp, model, hessians = trained_like("train_gpt", tmp_path, sum(CODE) + 60_000, layout="G S")

    def save(path, model, hp, quantized) -> int:  # in pieces of 50,000
        size = 50_000 * (1 + train_gpt_save(path, model, hp, quantized) // 50_000)
        path.write_bytes(bytes(size))
        return size

    train_gpt_save = train_gpt.save_artifact
    hp.artifact = tmp_path / "a.ptz"
    monkeypatch.setattr(train_gpt, "save_artifact", save)
    train_gpt.fit(hp, model, hessians)
    assert hp.artifact.stat().st_size == 50_000


def entropy_bytes(quantized: dict) -> float:
    total = 0.0
    for q, _ in quantized.values():
        counts = np.unique(q.numpy(), return_counts=True)[1].astype(np.float64)
        total -= (counts * np.log2(counts / counts.sum())).sum() / 8
    return total


def output_error(model, hessians, quantized: dict) -> float:
    params, total = dict(model.named_parameters()), 0.0
    for name, (q, scale) in quantized.items():
        E = params[name].detach().double() - q.double() * scale.double()[:, None]
        total += ((E @ hessians[name].double()) * E).sum().item()
    return total


def test_the_error_of_outputs_is_less_than_at_one_width_with_the_same_bytes(tmp_path):
    """Both by their own entropies, which are made the same by bisection."""
    hp, model, hessians = trained_like("train_gpt", tmp_path, 0, layout="G S")
    ours = quantize(model, hessians, 0.05)
    low, high = 1.0, 60.0
    for _ in range(12):
        width = (low * high) ** 0.5  # of 6 bits; a step of 7 bits has as many deviations
        same = {}
        for name, W in matrices_of(model):
            bits = model.bits(name)
            own = width * (2 ** (bits - 1) - 1) / 31
            same[name] = gptq_quantize(W.detach(), hessians[name], bits, own)
        low, high = (width, high) if entropy_bytes(same) > entropy_bytes(ours) else (low, width)
    assert entropy_bytes(same) == pytest.approx(entropy_bytes(ours), rel=0.01)
    assert output_error(model, hessians, ours) < 0.9 * output_error(model, hessians, same)


def test_each_value_adds_as_much_to_the_error_of_outputs(tmp_path):
    """Of uncorrelated inputs, where GPTQ is rounding: step * step / 12 for each input."""
    hp, model, hessians = trained_like(
        "train_gpt", tmp_path, 0, matrix_bits=8, embed_bits=8, layout="G S"
    )
    hessians = {name: torch.diag(H.diagonal()) for name, H in hessians.items()}
    for name, (q, scale) in quantize(model, hessians, 0.02).items():
        one = {name: (q, scale)}
        per_value = output_error(model, hessians, one) / q.numel()
        uses = 2 if name == "tok_emb.weight" else 1  # it is read, too
        assert per_value == pytest.approx(0.02**2 / 12 / uses, rel=0.1), name


def test_dead_inputs_and_zero_weights_are_packed(tmp_path):
    hp, model, hessians = trained_like("train_gpt", tmp_path, sum(CODE) + 20_000, layout="G S")
    dead, zero = "blocks.0.mlp.up_proj.weight", "blocks.1.mixer.o_proj.weight"
    hessians[dead].zero_()
    torch.nn.init.zeros_(dict(model.named_parameters())[zero])
    train_gpt.fit(hp, model, hessians)
    loaded = dict(train_gpt.load_artifact(hp.artifact, "cpu")[0].named_parameters())
    assert all(p.isfinite().all() for p in loaded.values())
    assert not loaded[zero].any()


def test_a_target_that_is_too_far_ends_with_the_finest_steps(tmp_path):
    """All are then clipped at six standard deviations, where more bits would help nothing; and that
    after less than twelve passes, each of them a line."""
    hp, model, hessians = trained_like("train_gpt", tmp_path, 16_000_000, layout="G S")
    with counted_passes() as passes, mock.patch.object(train_gpt.log, "info") as info:
        train_gpt.fit(hp, model, hessians)
    said = [call.args[0] for call in info.call_args_list]
    line = r"pack: rounding_step:[\d.e-]+ bytes_total:\d+ target:16000000"
    assert len(said) == len(passes) < 12 and all(re.fullmatch(line, text) for text in said)
    finest = {
        name: gptq_quantize(W.detach(), hessians[name], model.bits(name), 6.0)
        for name, W in matrices_of(model)
    }
    train_gpt.save_artifact(tmp_path / "b.ptz", model, hp, finest)
    found, wanted = (
        dict(train_gpt.load_artifact(tmp_path / name, "cpu")[0].named_parameters())
        for name in ("a.ptz", "b.ptz")
    )
    assert all(torch.equal(found[name], p) for name, p in wanted.items())


def test_a_size_that_fits_is_not_searched_for(tmp_path):
    """One pass where the first ends within a thousandth below the target; more where it is over."""
    hp, model, hessians = trained_like("train_gpt", tmp_path, 0, rounding_step=0.05)
    with counted_passes() as passes:
        train_gpt.fit(hp, model, hessians)
        hp.artifact_target_bytes = (tmp_path / "a.ptz").stat().st_size + sum(CODE) + 150
        train_gpt.fit(hp, model, hessians)  # the target is in the artifact too
    assert len(passes) == 2
    hp.artifact_target_bytes -= 500
    with counted_passes() as passes:
        train_gpt.fit(hp, model, hessians)
    assert len(passes) > 1


@pytest.mark.parametrize("start", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("bits", [4.0, 2.0, 0.5])
def test_the_target_is_met_from_wherever_the_search_begins(tmp_path, start, bits):
    """Also from where all is clipped, or all is zero; at any number of bits a value."""
    hp, model, hessians = trained_like("train_gpt", tmp_path, 0, layout="G S", rounding_step=1e9)
    train_gpt.fit(hp, model, hessians)
    values = sum(W.numel() for _, W in matrices_of(model))
    least = (tmp_path / "a.ptz").stat().st_size + sum(CODE)
    target = hp.artifact_target_bytes = int(least + bits * values / 8)
    hp.rounding_step = start
    train_gpt.fit(hp, model, hessians)
    assert 0.98 * target <= (tmp_path / "a.ptz").stat().st_size + sum(CODE) <= target


def calibrated(name, tmp_path):
    """A toy with noise on all its weights, and on the table of n-grams what forty steps of AdamW
    leave there; with as many rows as at full size; and the Hessians of a calibration."""
    torch.manual_seed(0)
    rows = system(name).Hyperparameters().ngram_vocab_size
    own = dict(model_dim=64, vocab_size=256, ngram_vocab_size=rows)
    hp = toy(name, artifact=str(tmp_path / "a.ptz"), **own)
    model = system(name).GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.07 * torch.randn_like(p))
        model.ngram.table.normal_(std=0.17)
    batches = [(random_ids(hp, B=8, T=64, starts=(0, 17)), None) for _ in range(2)]
    return hp, model, model.calibrate(batches)


@pytest.mark.parametrize("name", ["kv_share", "gdn_hybrid", "crawler"])
def test_after_a_calibration_the_table_of_n_grams_keeps_values(tmp_path, name):
    """At three bits a value: nothing is rounded to zero as a whole, and each tensor adds about as
    much to the error of the outputs of a token, for a value and input of it."""
    hp, model, hessians = calibrated(name, tmp_path)
    hp.rounding_step = 1e9
    train_gpt.fit(hp, model, hessians)
    values = sum(W.numel() for _, W in matrices_of(model))
    hp.artifact_target_bytes = (tmp_path / "a.ptz").stat().st_size + sum(CODE) + 3 * values // 8
    hp.rounding_step = STEP
    train_gpt.fit(hp, model, hessians)
    classes = system(name).Hyperparameters, system(name).GPT
    loaded = dict(train_gpt.load_artifact(hp.artifact, "cpu", *classes)[0].named_parameters())
    error = {}
    for name, W in matrices_of(model):
        E = (W.detach() - loaded[name].detach()).double()
        error[name] = ((E @ hessians[name].double()) * E).sum().item() / W.numel()
        assert (loaded[name] != 0).float().mean() > 0.1, name
    assert (loaded["ngram.table"] != 0).float().mean() > 0.5
    assert max(error.values()) < 10 * min(error.values()), error


def test_rows_of_more_bits_have_smaller_steps(tmp_path):
    """The others those that are given."""
    hp, model, hessians = trained_like("hybrid_1895", tmp_path, 0)
    bits, table = model.bits("tok_emb.weight"), model.tok_emb.weight.detach()
    H = hessians["tok_emb.weight"]
    step = table.std(1).max() / 6  # of 7 bits, so that none is clipped
    q, scale = quantize(model, hessians, step * (2 * H.diagonal().mean()).sqrt())["tok_emb.weight"]
    assert set(bits.tolist()) == {7, 8}
    expected = torch.where(bits == 7, 1, 63 / 127) * step
    torch.testing.assert_close(scale.float(), expected, rtol=2e-3, atol=0)


CODED = {
    "one symbol": np.full(1000, 7),
    "one value": np.array([-128]),
    "all symbols": np.arange(-128, 128).repeat(4),
    "one value in a million": np.r_[np.full(999_999, -3), [127]],
    "normal": np.random.default_rng(0).normal(0, 2.4, 100_000).round().clip(-31, 31),
}


@pytest.mark.parametrize("name", CODED)
def test_what_is_coded_comes_back_in_the_bytes_of_its_entropy(tmp_path, name):
    """Read by tools/packed.py; two words stand at the end."""
    ints = [CODED[name].astype(np.int8), np.int8([3, -3, 3, 0])]
    counts, code = train_gpt.range_code(ints)
    assert counts == [[int((q == x).sum()) for x in [*range(128), *range(-128, 0)]] for q in ints]
    found = packed.decode(tmp_path, code, counts, [q.shape for q in ints])
    assert all((a == b).all() for a, b in zip(ints, found, strict=True))
    entropy = entropy_bytes({i: (torch.from_numpy(q), None) for i, q in enumerate(ints)})
    assert entropy - 1 <= len(code) <= 1.0005 * entropy + 8


def test_a_tensor_of_one_symbol_and_one_of_a_rare_value_are_packed(tmp_path):
    hp, model, hessians = trained_like("train_gpt", tmp_path, 0, layout="G S")
    quantized = quantize(model, hessians, STEP)
    one, rare = (quantized[f"blocks.{i}.mlp.up_proj.weight"][0] for i in (0, 1))
    one.fill_(-5)
    rare.zero_()[-1, -1] = 31
    train_gpt.save_artifact(hp.artifact, model, hp, quantized)
    loaded = dict(train_gpt.load_artifact(hp.artifact, "cpu")[0].named_parameters())
    for name, (q, scale) in quantized.items():
        assert torch.equal(loaded[name], q * scale.float()[:, None]), name
