"""How systems train and calibrate: pure_gdn's chunks and curriculum, the transformer's late loop,
the crawler's late average and second calibration, Hessians of what is shared, looped or looked
up."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from corpus import write_shard
from toys import CURRICULUM, clipped, in_float64, random_ids, rounded, system, tiny_of

import train_gpt
from train_gpt import BOS_ID, Muon


def model_of(name, hp):
    return system(name).GPT(hp)


# ---- chunks of pure_gdn


@pytest.mark.parametrize("layout", ["G S G", "A G S2 A"])
def test_chunked_gradients_are_differences_of_the_chunks_losses(lively, monkeypatch, layout):
    """Truncated backpropagation: the cache is a constant, so each chunk's loss may be moved by
    hand; in float64."""
    hp = tiny_of("pure_gdn", layout=layout, curriculum="0:1x8")
    model = in_float64(monkeypatch, lively(model_of("pure_gdn", hp)))
    model.set_progress(0.0)
    batch = [(random_ids(hp, T=24, starts=(13,)), random_ids(hp, T=24)) for _ in range(2)]
    loss = train_gpt.accumulate(model, batch)
    whole = torch.stack([model(x, y) for x, y in batch]).mean()
    assert loss.item() == pytest.approx(whole.item(), abs=1e-5)
    parameters = list(model.parameters())
    untruncated, pieces = torch.autograd.grad(whole, parameters), []
    with torch.no_grad():
        for x, y in batch:
            cache = model.new_cache(len(x))
            for a, b in zip(x.split(8, 1), y.split(8, 1), strict=True):
                pieces.append((a, b, cache))
                _, cache = model(a, cache=cache)

        def moved(step):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=step)
            total = sum(model(*piece)[0].double().sum() for piece in pieces)
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=step)
            return total.item() / (2 * 2 * 24)

        def along(gradients):
            return sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()

        apart, size = [], sum(p.grad.square().sum() for p in parameters).sqrt().item()
        for _ in range(4):
            direction = [torch.randn_like(p) for p in parameters]
            slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
            assert along([p.grad for p in parameters]) == pytest.approx(slope, abs=0.005 * size)
            apart.append(abs(along(untruncated) - slope) / size)
        assert max(apart) > 0.02


def test_a_chunk_as_long_as_the_row_is_plain_backpropagation(lively, monkeypatch):
    hp = tiny_of("pure_gdn", layout="G S A", curriculum="0:1x64")
    model = in_float64(monkeypatch, lively(model_of("pure_gdn", hp)))
    model.set_progress(0.0)
    batch = [(random_ids(hp, T=64), random_ids(hp, T=64)) for _ in range(3)]
    loss = train_gpt.accumulate(model, batch)
    whole = torch.stack([model(x, y) for x, y in batch]).mean()
    torch.testing.assert_close(loss, whole.detach().to(loss))
    gradients = torch.autograd.grad(whole, list(model.parameters()))
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)


CURRICULA = {
    "0:1x64": [(0, 1, 64)],
    "0.0:2x64": [(0, 2, 64)],
    "0:1x16 0.15:2x32 0.45:3x64": [(0, 1, 16), (0.15, 2, 32), (0.45, 3, 64)],
    "  0:3x1   0.999:1x2 ": [(0, 3, 1), (0.999, 1, 2)],
}
BAD = """| |1|x|0|0:1|0:x64|0:1x|:1x64|0:1x64,0.5:2x64|0:0x64|0:4x64|0:-1x64|0:1x0|0:1x48|0:1x128
|0:1.5x64|0.1:1x64|1:1x64|0:1x64 1.5:2x64|0:1x64 1:2x64|-0.1:1x64|0:1x64 0.5:2x64 0.2:1x64
|0:1x64 0.5|0:1x64 0.5:2x64 y|0:1x64 0.5:1x64 0.5:2x64|nan:1x64"""


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_a_curriculum_is_its_stages(curriculum):
    three = dict(grad_accum_steps=3, train_batch_tokens=3 * 64)
    hp = tiny_of("pure_gdn", curriculum=curriculum, **three)
    stages = CURRICULA[curriculum]
    assert hp.stages() == stages and hp.stage_starts() == [start for start, *_ in stages]
    model = model_of("pure_gdn", hp)
    for progress in (0.0, 0.1, 0.15, 0.3, 0.45, 0.998, 0.999, 1.0):
        _, micro_steps, chunk = [stage for stage in stages if stage[0] <= progress][-1]
        model.set_progress(progress)
        assert (hp.micro_steps_at(progress), model.chunk) == (micro_steps, chunk)


@pytest.mark.parametrize("curriculum", [*BAD.replace("\n", "").split("|"), "0:1x" + "9" * 5000])
def test_a_curriculum_that_is_none_is_refused_by_name(curriculum):
    three = dict(grad_accum_steps=3, train_batch_tokens=3 * 64)
    with pytest.raises(ValueError, match="^CURRICULUM=.*expected"):
        tiny_of("pure_gdn", curriculum=curriculum, **three)


# ---- training


def snapshot(model):
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def train(name, hp, tmp_path, monkeypatch):
    """train() on random tokens: what each step had (passes, chunk, inputs), the weights behind it,
    the audit."""
    tokens = np.random.default_rng(0).integers(2, hp.vocab_size, 9000)
    tokens[::70] = BOS_ID
    write_shard(tmp_path / "fineweb_train_000000.bin", tokens)
    model, steps = model_of(name, hp), []
    weights = [snapshot(model)]
    accumulate, step = train_gpt.accumulate, Muon.step

    def spied_accumulate(model, batch):
        inputs = [x.clone() for x, _ in batch]
        steps.append((model.order, getattr(model, "chunk", None), inputs))
        return accumulate(model, batch)

    def spied_step(optimizer, *args):
        norm = step(optimizer, *args)
        weights.append(snapshot(model))
        return norm

    monkeypatch.setattr(train_gpt, "accumulate", spied_accumulate)
    monkeypatch.setattr(Muon, "step", spied_step)
    monkeypatch.setattr(train_gpt, "validate", lambda *_, **__: dict(val_bpb=1.0, seconds=0.0))
    audit = train_gpt.Audit()
    stream = train_gpt.TokenStream(str(tmp_path), "train", hp.vocab_size)
    validation = SimpleNamespace(tokens=torch.tensor(tokens[:100]))
    _, figures = train_gpt.train(hp, model, stream, validation, audit)
    assert all(check["passed"] for check in audit.checks.values())
    start, *weights = weights
    return SimpleNamespace(
        steps=steps, start=start, weights=weights, model=model, figures=figures, text=tokens
    )


@pytest.mark.parametrize("share, first", [(0.0, 0), (0.35, 4), (0.5, 5), (1.0, 10)])
def test_a_loop_begins_with_its_share_of_the_run(tmp_path, monkeypatch, share, first):
    late = dict(layout="S (A)x2 S", parallel_start_layer=0, enable_looping_at=share)
    hp = tiny_of("transformer", iterations=10, warmup_steps=0, **late)
    run = train("transformer", hp, tmp_path, monkeypatch)
    once, looped = [0, 1, 2], [0, 1, 1, 2]
    assert [order for order, *_ in run.steps] == first * [once] + (10 - first) * [looped]
    assert run.model.order == looped


def test_a_step_before_the_loop_begins(lively):
    """Skips of passes to come have no part in it, and must not stop it."""
    hp = tiny_of("transformer", layout="A (A)x3 A", parallel_start_layer=0)
    model, ids = lively(model_of("transformer", hp)), random_ids(hp, T=33)
    model.set_progress(0.0)
    train_gpt.accumulate(model, [(ids[:, :-1], ids[:, 1:])])
    reached = model.skips.grad.abs().amax((0, 2)) > 0
    assert reached.tolist() == [True, False]  # of five passes there are two skips, of three one
    assert math.isfinite(Muon(model, hp).step(1.0, 0.95))


def test_a_curriculum_is_followed_and_skips_no_token(tmp_path, monkeypatch):
    batch = dict(grad_accum_steps=3, train_batch_tokens=3 * 128)
    stages = dict(curriculum="0:1x16 0.2:2x32 0.45:3x64")
    hp = tiny_of("pure_gdn", layout="G S", iterations=10, warmup_steps=0, **batch | stages)
    run = train("pure_gdn", hp, tmp_path, monkeypatch)
    plan = [(chunk, len(batch)) for _, chunk, batch in run.steps]
    assert plan == 2 * [(16, 1)] + 3 * [(32, 2)] + 5 * [(64, 3)]
    read = torch.cat([x.flatten() for *_, batch in run.steps for x in batch]).numpy()
    assert np.array_equal(read, run.text[: 23 * 128])
    calibration = hp.gptq_calibration_batches * 3 * 128
    assert run.figures["tokens_read"] == 23 * 128 + calibration


def test_all_stages_are_warmed_up(tmp_path, monkeypatch):
    """Each with its chunk and as many micro-batches as it will have."""
    batch = dict(grad_accum_steps=3, train_batch_tokens=3 * 128, curriculum=CURRICULUM)
    hp = tiny_of("pure_gdn", layout="G S", iterations=1, warmup_steps=2, **batch)
    run = train("pure_gdn", hp, tmp_path, monkeypatch)
    plan = [(chunk, len(batch)) for _, chunk, batch in run.steps]
    assert plan == 2 * [(16, 1)] + 2 * [(32, 2)] + 2 * [(64, 3)] + [(16, 1)]


@pytest.mark.parametrize("start", [0.0, 0.55, 0.9, 1.0])
def test_the_average_begins_with_its_share_of_the_run(tmp_path, monkeypatch, start):
    late = dict(layout="S (G)x2", ema_decay=0.6, ema_start=start)
    hp = tiny_of("crawler", iterations=10, warmup_steps=0, **late)
    run = train("crawler", hp, tmp_path, monkeypatch)
    expected = run.start
    for t, raw in enumerate(run.weights):
        decay = min(0.6, (1 + t) / (10 + t)) if t / 10 >= start else 0.0
        expected = {name: decay * expected[name] + (1 - decay) * raw[name] for name in raw}
    for name, p in run.model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), expected[name], atol=1e-6, err_msg=name)
        # an average that begins too late is no failure
        assert np.array_equal(p.detach().numpy(), run.weights[-1][name]) == (start == 1), name


# ---- GPTQ

QUANT = dict(
    layout="A (G S)x2 A",
    matrix_bits=6,
    loop_bits=8,
    embed_bits=5,
)
EMBEDDINGS = "tok_emb.weight", "ngram.table"


def is_looped(name):
    return name.startswith(("blocks.1.", "blocks.2.", "inst_"))


def outer_products(model, batches):
    """X^T X of the inputs of each linear layer, in float64, by our own hooks."""
    names, sums = {id(p): name for name, p in model.named_parameters()}, {}

    def add(module, args):
        X, name = args[0].detach().flatten(0, -2).double(), names[id(module.weight)]
        sums[name] = sums.get(name, 0) + X.T @ X

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    handles = [module.register_forward_pre_hook(add) for module in linears]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return sums


SHARED = {
    "lent mixers": ("layouts", dict(layout="G S G=0 S=1")),
    "loop": ("layouts", dict(layout="A (G S)x3 A")),
    "pairs": ("kv_share", dict(layout="G4")),
    "instructions": ("crawler", QUANT),
    "lanes": ("transformer", dict(layout="A (S)x2 A", parallel_start_layer=2)),
}


@pytest.mark.parametrize("case", SHARED)
def test_hessians_are_sums_over_all_uses(lively, case):
    """Both blocks' inputs of shared weights, all passes of a loop; for each token in the mean."""
    name, options = SHARED[case]
    hp = tiny_of(name, **options)
    model = lively(model_of(name, hp))
    batches = [(random_ids(hp, T=40, starts=(0, 17)), None) for _ in range(2)]
    hessians = train_gpt.collect_hessians(model, batches)
    expected = outer_products(model, batches)
    matrices = {name for name, kind in model.kinds.items() if kind != "scalar"}
    assert set(hessians) == matrices - {"ngram.table"}
    tokens = sum(x.numel() for x, _ in batches)
    for name, H in hessians.items():
        size = expected[name].norm()
        assert (tokens * H.double() - expected[name]).norm() < 1e-5 * size, name


@pytest.mark.parametrize("name, layout", [("kv_share", "G2"), ("crawler", "A (G)x2")])
def test_the_hessian_of_n_grams_measures_what_comes_out_of_their_projection(lively, name, layout):
    hp = tiny_of(name, layout=layout)
    model = lively(model_of(name, hp))
    batches = [(random_ids(hp, T=40), None)]
    H = model.calibrate(batches)["ngram.table"].double()
    error = torch.randn(7, hp.ngram_dim).double()
    out = error @ model.ngram.proj.weight.detach().double().T
    torch.testing.assert_close((error @ H * error).sum(1), out.square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("with_hessians", [True, False], ids=["GPTQ", "rounding"])
def test_bits_of_each_tensor(lively, with_hessians):
    """At two deviations the largest value of a tensor is all that its bits can hold; at the least
    step the scales are those of six."""
    hp = tiny_of("crawler", **QUANT)
    model = lively(model_of("crawler", hp))
    batches = [(random_ids(hp, T=40, starts=(0,)), None) for _ in range(3)]
    params = dict(model.named_parameters())
    quantized, at_two = rounded(model, 1e-6), clipped(model, 2.0)
    if with_hessians:
        quantized = train_gpt.quantize(model, model.calibrate(batches), 1e-6)
    assert set(quantized) == {name for name, kind in model.kinds.items() if kind != "scalar"}
    seen = set()
    for name, (q, scale) in quantized.items():
        bits = 5 if name in EMBEDDINGS else 8 if is_looped(name) else 6
        seen.add(bits)
        qmax = 2 ** (bits - 1) - 1
        assert at_two[name][0].abs().max() == qmax >= q.abs().max(), name
        expected = 6 * params[name].detach().double().numpy().std(1, ddof=1) / qmax
        np.testing.assert_allclose(scale.double().numpy(), expected, rtol=1e-3, err_msg=name)
    assert seen == {8, 6, 5}


def test_a_second_calibration_sees_the_looped_blocks_behind_quantized_ones(lively):
    hp = tiny_of("crawler", **QUANT)
    model = lively(model_of("crawler", hp))
    batches = [(random_ids(hp, T=40, starts=(0, 17)), None) for _ in range(3)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    P = model.ngram.proj.weight.detach()
    table = P.T @ P
    first = train_gpt.collect_hessians(model, batches) | {"ngram.table": table}
    second, tokens = model.calibrate(batches), sum(x.numel() for x, _ in batches)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    shipped, quantized = copy.deepcopy(model), train_gpt.quantize(model, first, hp.rounding_step)
    for name, p in shipped.named_parameters():
        if name in first and not is_looped(name):
            q, scale = quantized[name]
            p.data = q.float() * scale.float()[:, None]
        elif name not in first:
            p.data = p.data.half().float()
    expected = outer_products(shipped, batches)
    assert second.keys() == first.keys()
    for name in first:
        if is_looped(name):
            size = expected[name].norm()
            assert (tokens * second[name] - expected[name]).norm() < 2e-3 * size, name
            assert tokens * (second[name] - first[name]).norm() > 2e-2 * size, name
        else:
            assert torch.equal(second[name], first[name]), name
