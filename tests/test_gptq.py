"""GPTQ against its definition in float64 (one column after the other, explicit inverse) and against
rounding to nearest; Hessians against sums over the inputs that hooks of our own see.
"""

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import STEP, SYSTEMS, as_packed, of_layout, random_ids, system, toy

from train_gpt import (
    GPT,
    Linear,
    collect_hessians,
    gptq_quantize,
    quantize,
)

FLOAT32 = 2.0**-24  # relative error of one rounding


def correlated(rows, cols, seed=0):
    """Inputs whose columns are mixtures of few strong and many weak directions, of unlike size."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((cols, cols)) * np.linspace(2, 0.05, cols)[:, None]
    X = rng.standard_normal((rows, cols)) @ mix * np.exp(0.5 * rng.standard_normal(cols))
    W = rng.standard_normal((24, cols)) * np.exp(rng.standard_normal((24, 1)))
    return torch.from_numpy(X).float(), torch.from_numpy(W).float()


def in_units(W, scale):
    """The weights in steps of their rows, float64."""
    return W.double() / scale.double()[:, None]


def nearest(W, scale, bits):
    qmax = 2 ** (bits - 1) - 1
    return in_units(W, scale).round().clamp(-qmax, qmax)


def rounded(W, bits, sigmas):
    """Each value as the nearest multiple of the scale of its row."""
    qmax = 2 ** (bits - 1) - 1
    scale = (sigmas * W.std(dim=1) / qmax).clamp_min(2**-24).half()
    return (W / scale.float()[:, None]).round().clamp(-qmax, qmax).to(torch.int8), scale


def output_error(X, W, q, scale):
    return ((W.double() - q.double() * scale.double()[:, None]) @ X.double().T).norm().item()


# ---- one matrix


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(
    "rows, cols", [(2000, 16), (2000, 128), (2000, 129), (2000, 300), (60, 200)]
)
def test_gptq_beats_rounding_to_nearest_on_correlated_inputs(rows, cols, bits):
    X, W = correlated(rows, cols)
    q, scale = gptq_quantize(W, X.T @ X, bits, 6.0)
    assert q.dtype == torch.int8 and q.shape == W.shape
    assert scale.dtype == torch.float16 and scale.shape == (24,)
    assert q.abs().max() <= 2 ** (bits - 1) - 1
    assert output_error(X, W, q, scale) < 0.8 * output_error(X, W, nearest(W, scale, bits), scale)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("sigmas", [1.0, 5.0, 20.0])
def test_rounding_to_nearest_is_the_nearest_multiple_of_the_scale(bits, sigmas):
    """But for ties, which the rounding of a quotient to float32 may turn; beyond the largest value,
    that one."""
    _, W = correlated(1, 200)
    W[3] = 0
    q, scale = gptq_quantize(W, torch.eye(200), bits, sigmas)
    assert q.dtype == torch.int8 and scale.dtype == torch.float16 and (q[3] == 0).all()
    units, qmax = in_units(W, scale), 2 ** (bits - 1) - 1
    assert ((units.clamp(-qmax, qmax) - q).abs() <= 0.5 + FLOAT32 * units.abs()).all()


@given(rows=st.integers(1, 9), cols=st.integers(2, 40), bits=st.integers(2, 8), seed=st.integers(0))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rounding_to_nearest_is_gptq_with_the_identity_as_hessian(rows, cols, bits, seed):
    """To the last bit: no column has anything to make up for another. Rows of zeros, rows of one
    value and rows that are clipped too."""
    rng = np.random.default_rng(seed % 2**32)
    W = rng.standard_normal((rows, cols)) * np.exp(3 * rng.standard_normal((rows, 1)))
    W[rng.random(rows) < 0.1] = 0.0
    W[rng.random(rows) < 0.1] = 0.25
    W, sigmas = torch.from_numpy(W).float(), float(rng.uniform(1.0, 20.0))
    ours, theirs = (
        rounded(W, bits, sigmas),
        gptq_quantize(W, torch.eye(cols), bits, sigmas),
    )
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["identity", "diagonal"])
def test_gptq_rounds_to_nearest_where_inputs_are_uncorrelated(kind, bits):
    _, W = correlated(1, 200)
    H = torch.eye(200) * 3 if kind == "identity" else torch.diag(torch.rand(200) + 0.01)
    q, scale = gptq_quantize(W, H, bits, 5.0)
    plain, plain_scale = rounded(W, bits, 5.0)
    assert torch.equal(q, plain) and torch.equal(scale, plain_scale)


def values_to_round(W, H, q, scale):
    """Columns by falling diag H: round one, let the rest make up for it, strike it from the
    inverse. Returns, in steps, what each column was when it was rounded to q, and the condition of
    the damped H."""
    W, H, s = W.double().numpy().copy(), H.double().numpy().copy(), scale.double().numpy()
    order = np.argsort(-np.diag(H), kind="stable")
    damped = H + 0.01 * np.diag(H).mean() * np.eye(len(H))
    inverse, q, values = np.linalg.inv(damped), q.double().numpy(), np.zeros_like(W)
    for n, j in enumerate(order):
        values[:, j] = W[:, j] / s
        rest = order[n + 1 :]
        W[:, rest] -= np.outer((W[:, j] - q[:, j] * s) / inverse[j, j], inverse[j, rest])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.from_numpy(values), np.linalg.cond(damped)


@pytest.mark.parametrize("bits, cols", [(6, 20), (4, 20), (8, 140), (6, 140), (6, 270)])
def test_gptq_equals_its_definition(bits, cols):
    """Every value is the nearest to what its column was when its turn came, give or take what an
    inverse in float32 leaves of it: the condition of H times a rounding."""
    X, W = correlated(500, cols, seed=1)
    H = X.T @ X
    q, scale = gptq_quantize(W, H, bits, 4.0)
    values, condition = values_to_round(W, H, q, scale)
    error = FLOAT32 * condition * values.abs().max()
    assert error < 0.02, "float32 says too little of this H"
    qmax = 2 ** (bits - 1) - 1
    assert ((values.clamp(-qmax, qmax) - q).abs() <= 0.5 + error).all()
    assert (q != nearest(W, scale, bits)).float().mean() > 0.1


@pytest.mark.parametrize("bits, sigmas", [(6, 12.85), (8, 20.0), (4, 1.0)])
def test_gptq_scale_is_a_multiple_of_the_rows_deviation(bits, sigmas):
    X, W = correlated(500, 300)
    q, scale = gptq_quantize(W, X.T @ X, bits, sigmas)
    expected = sigmas * W.double().numpy().std(axis=1) / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(scale.double().numpy(), expected, rtol=3e-3)
    assert (q.abs().max() == 2 ** (bits - 1) - 1) == (sigmas == 1.0)  # one sigma clips


def test_gptq_changes_neither_weights_nor_hessian():
    X, W = correlated(500, 40)
    X[:, 3] = 0
    H = X.T @ X
    copies = W.clone(), H.clone()
    gptq_quantize(W, H, 6, 6.0)
    assert torch.equal(W, copies[0]) and torch.equal(H, copies[1])


def test_gptq_of_dead_inputs_and_zero_rows():
    """A column whose input is always zero becomes zero and changes nothing else; a zero row stays
    zero."""
    X, W = correlated(500, 150)
    W[3] = 0
    alive = torch.ones(150, dtype=torch.bool)
    alive[[0, 77, 149]] = False
    X[:, ~alive] = 0
    q, scale = gptq_quantize(W, X.T @ X, 6, 6.0)
    assert (q[:, ~alive] == 0).all() and (q[3] == 0).all() and (scale > 0).all()
    assert output_error(X, W, q, scale) < 0.8 * output_error(X, W, nearest(W, scale, 6), scale)
    q, scale = gptq_quantize(W, torch.zeros(150, 150), 6, 6.0)
    assert (q == 0).all() and torch.isfinite(scale).all()


# ---- a model


def batches_of(hp, n=3):
    ids = [random_ids(hp, T=41, starts=(0, 17)) for _ in range(n)]
    return [(x[:, :-1], x[:, 1:]) for x in ids]


def is_matrix(name):
    return name.endswith("_proj.weight") and not name.endswith(("a_proj.weight", "b_proj.weight"))


def test_hessians_are_means_over_the_tokens(lively):
    """By hand: every input row of every matrix, both uses of a shared mixer, in float64. A sum of n
    products in float32 is off by n roundings of their absolute values at most."""
    hp, model = of_layout("G S G S=1")
    batches, expected, sizes, counts = batches_of(hp), {}, {}, {}
    lively(model)
    names = {id(p): name for name, p in model.named_parameters()}

    def add(module, args):
        X = args[0].detach().reshape(-1, args[0].shape[-1]).double()
        name = names[id(module.weight)]
        expected[name] = expected.get(name, 0) + torch.einsum("na,nb->ab", X, X)
        sizes[name] = sizes.get(name, 0) + torch.einsum("na,nb->ab", X.abs(), X.abs())
        counts[name] = counts.get(name, 0) + len(X)

    handles = [m.register_forward_pre_hook(add) for m in model.modules() if isinstance(m, Linear)]
    hessians = collect_hessians(model, batches)  # the very inputs that it sees
    for handle in handles:
        handle.remove()
    tokens = sum(x.numel() for x, _ in batches)
    for name, hessian in hessians.items():
        assert hessian.dtype == torch.float32 and torch.isfinite(hessian).all()
        bound = (counts[name] + 2) * FLOAT32 * sizes[name]
        assert ((hessian.double() * tokens - expected[name]).abs() <= bound).all(), name
    assert set(hessians) == set(toys.rounded(model))  # every quantized tensor has one
    matrices = {name for name in names.values() if is_matrix(name)}
    assert set(hessians) == matrices | {"tok_emb.weight"}
    assert counts["blocks.1.mixer.q_proj.weight"] == 2 * counts["blocks.0.mixer.q_proj.weight"]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", SYSTEMS)
def test_hessians_are_the_same_for_a_batch_twice_over(lively, name):
    """So that a step of rounding means the same however much is calibrated on."""
    hp = toy(name)
    model = lively(system(name).GPT(hp))
    batches = batches_of(hp, 1)
    once, twice = (collect_hessians(model, batches * n) for n in (1, 2))
    assert once.keys() == twice.keys()
    for name, H in once.items():
        torch.testing.assert_close(twice[name], H, rtol=0, atol=1e-5 * H.abs().max().item())


@pytest.mark.parametrize("name", ["kv_share", "crawler", "gdn_hybrid"])
def test_errors_of_table_rows_count_as_the_projection_lets_them_through(lively, name):
    hp = toy(name)
    model = lively(system(name).GPT(hp))
    H = model.calibrate(batches_of(hp))["ngram.table"]
    rows = torch.randn(5, hp.ngram_dim)
    through = model.ngram.proj(rows).square().sum()
    torch.testing.assert_close(((rows @ H) * rows).sum(), through, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_quantized_tensor_of_a_system_has_a_hessian(lively, name):
    hp = toy(name)
    model = lively(system(name).GPT(hp))
    hessians = model.calibrate(batches_of(hp))
    plain, ours = toys.rounded(model), quantize(model, hessians, STEP)
    assert hessians.keys() == plain.keys() == ours.keys()
    large = {name for name, p in model.named_parameters() if p.ndim == 2 and p.numel() >= 512}
    assert large <= hessians.keys()


@pytest.mark.parametrize(
    "name, layout", [("train_gpt", "G S G S"), ("layouts", "G S G S=1"), ("kv_share", "G4")]
)
def test_gptq_helps_every_matrix_of_the_model(lively, name, layout):
    """All rows have multiples of the step over the RMS of the inputs, which for the embedding count
    twice, but for those whose deviation is so large that six of them would not fit."""
    hp = toy(name, layout=layout)
    model = lively(system(name).GPT(hp))
    hessians = model.calibrate(batches_of(hp))
    params, step = dict(model.named_parameters()), 0.05
    for name, (q, scale) in quantize(model, hessians, step).items():
        W, H = params[name].detach().double(), hessians[name].double()
        bits, errors = 7 if name in ("tok_emb.weight", "ngram.table") else 6, []
        for values in (q, nearest(W, scale, bits)):
            difference = W - values.double() * scale.double()[:, None]
            errors.append(((difference @ H) * difference).sum().item())
        assert errors[0] < errors[1], name
        deviations, qmax = W.std(1), 2 ** (bits - 1) - 1
        assert q.abs().max() <= qmax, name
        uses = 2 if name == "tok_emb.weight" else 1
        by_inputs = step / (uses * H.diagonal().mean()).sqrt()
        expected = torch.maximum(by_inputs, 6 * deviations / qmax)
        torch.testing.assert_close(scale.double(), expected, rtol=1e-3, atol=0)


def test_with_uncorrelated_inputs_every_tensor_is_rounded_to_nearest(tiny, lively):
    """At the bits of each, and what is not quantized goes through float16."""
    model = lively(GPT(tiny(matrix_bits=5, embed_bits=4)))
    quantized, params = toys.rounded(model), dict(model.named_parameters())
    for name, (q, scale) in quantized.items():
        W, bits = params[name].detach(), model.bits(name)
        qmax = 2 ** (bits - 1) - 1
        uses = 2 if name == "tok_emb.weight" else 1
        sigmas = (qmax * STEP / uses**0.5 / W.std(1)).clamp(min=6)  # [rows]
        expected, expected_scale = rounded(W, bits, sigmas)
        assert (q != expected).float().mean() < 1e-3, name  # where the quotient is a tie
        torch.testing.assert_close(scale, expected_scale, rtol=1e-3, atol=0)
    bits = {name: model.bits(name) for name in quantized}
    assert {bits.pop("tok_emb.weight")} == {4} and set(bits.values()) == {5}
    for name, p in as_packed(model, quantized).named_parameters():
        if name in quantized:
            q, scale = quantized[name]
            assert torch.equal(p, q.float() * scale.float()[:, None]), name
        else:
            assert torch.equal(p, params[name].half().float()), name


def test_quantizing_without_a_hessian_of_a_matrix_raises(tiny, lively):
    hp = tiny()
    model = lively(GPT(hp))
    hessians = collect_hessians(model, batches_of(hp))
    del hessians["blocks.2.mixer.v_proj.weight"]
    with pytest.raises(KeyError, match="blocks.2.mixer.v_proj.weight"):
        quantize(model, hessians, STEP)


def test_a_hessian_that_rounding_made_indefinite_is_damped_more():
    """What 1 % of the mean diagonal does not mend; with that the result is GPTQ's of the mended."""
    X, W = torch.randn(200, 16), torch.randn(8, 16)
    H = X.T @ X
    mean = H.diagonal().mean()
    low = torch.linalg.eigvalsh(H)[0]
    indefinite = H - (low + 0.05 * mean) * torch.eye(16)
    q, scale = gptq_quantize(W, indefinite, 4, 4.0)
    damped = indefinite + 0.1 * indefinite.diagonal().mean() * torch.eye(16)
    expected, _ = gptq_quantize(W, damped, 4, 4.0)
    assert (q == expected).float().mean() > 0.9 and scale.isfinite().all()


def test_a_hessian_of_no_numbers_is_an_error():
    H = torch.full((8, 8), torch.nan)
    with pytest.raises(RuntimeError, match="cholesky"):
        gptq_quantize(torch.randn(4, 8), H, 4, 4.0)
