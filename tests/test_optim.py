"""Optimizer, schedules and averaging against independent truths.

Muon and AdamW   against float64 numpy, several steps, of every system; two processes against one
clock            a run under a clock of our own: what counts, when it stops, how low the rate is
average          of the weights against the sum of its definition
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from corpus import write_shard
from streams import all_in_float64
from toys import SYSTEMS, system, toy

import train_gpt
from train_gpt import GPT, Muon


@pytest.fixture
def exact(monkeypatch):
    yield from all_in_float64(monkeypatch)


def set_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=generator)


def snapshot(model):
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def gradients(model):
    return {name: p.grad.double().numpy().copy() for name, p in model.named_parameters()}


def is_matrix(name):
    return re.search(
        r"\.[qkvgo]_proj\.weight$|(up|down|ngram\.|inst_(in|out\.\d+))(_?proj)?\.weight$", name
    )


def is_embedding(name):
    return name in ("tok_emb.weight", "ngram.table")


# ---- one step


def numpy_muon(W, grad, buffer, lr, momentum, hp):
    """Momentum, Nesterov, rows to length 1, singular values through the five polynomials, decoupled
    decay."""
    buffer[:] = momentum * buffer + grad
    update = grad + momentum * buffer
    update = update / np.linalg.norm(update, axis=1, keepdims=True)
    U, s, Vt = np.linalg.svd(update, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for a, b, c in train_gpt.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    update = (U * s) @ Vt * np.sqrt(max(1.0, W.shape[0] / W.shape[1]))
    return W - lr * hp.muon_wd * W - lr * update


def numpy_adamw(p, grad, state, step, lr, wd, hp):
    state[0] = hp.beta1 * state[0] + (1 - hp.beta1) * grad
    state[1] = hp.beta2 * state[1] + (1 - hp.beta2) * grad**2
    m, v = state[0] / (1 - hp.beta1**step), state[1] / (1 - hp.beta2**step)
    return p - lr * wd * p - lr * m / (np.sqrt(v) + hp.adam_eps)


def three_steps(hp, model) -> tuple[dict, dict]:
    """What three steps make of a model, and what they should; with gradients, momentum and learning
    rate that change from step to step."""
    optimizer, expected = Muon(model, hp), snapshot(model)
    buffers = {name: np.zeros_like(p) for name, p in expected.items()}
    moments = {name: [0.0, 0.0] for name in expected}
    for step, (multiplier, momentum) in enumerate([(1.0, 0.9), (0.5, 0.95), (0.25, 0.8)], 1):
        set_gradients(model, step, scale=10.0**-step)
        for name, grad in gradients(model).items():
            p = expected[name]
            if is_matrix(name):
                lr = multiplier * hp.matrix_lr
                expected[name] = numpy_muon(p, grad, buffers[name], lr, momentum, hp)
            else:
                of_embeddings = (hp.tied_embed_lr, hp.embed_wd)
                lr, wd = of_embeddings if is_embedding(name) else (hp.scalar_lr, 0.0)
                expected[name] = numpy_adamw(p, grad, moments[name], step, multiplier * lr, wd, hp)
        optimizer.step(multiplier, momentum)
    return snapshot(model), expected


def test_three_steps_equal_numpy(tiny, lively):
    """In float32, of which polar_express makes some thousand times its rounding."""
    hp = tiny(layout="G S A", grad_clip_norm=0.0, mlp_mult=3.0)
    weights, expected = three_steps(hp, lively(GPT(hp)))
    for name, p in weights.items():
        np.testing.assert_allclose(p, expected[name], atol=2e-5, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", SYSTEMS)
def test_three_steps_of_every_system_equal_numpy_in_float64(lively, exact, name):
    hp = toy(name, grad_clip_norm=0.0)
    weights, expected = three_steps(hp, lively(system(name).GPT(hp)))
    for name, p in weights.items():
        np.testing.assert_allclose(p, expected[name], atol=1e-9, rtol=0, err_msg=name)


def test_a_step_clears_the_gradients(tiny):
    hp = tiny()
    model = GPT(hp)
    optimizer = Muon(model, hp)
    set_gradients(model, 0)
    optimizer.step(1.0, 0.9)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("multiplier", [0.0, 0.5])
def test_the_multiplier_scales_every_learning_rate(tiny, lively, exact, multiplier):
    """Update and decay are both proportional to the learning rate, so a first step is too."""
    moves = {}
    for m in (1.0, multiplier):
        torch.manual_seed(0)
        hp = tiny()
        model = lively(GPT(hp))
        start, optimizer = snapshot(model), Muon(model, hp)
        set_gradients(model, 1)
        optimizer.step(m, 0.9)
        moves[m] = {name: p - start[name] for name, p in snapshot(model).items()}
    for name, move in moves[multiplier].items():
        assert np.abs(moves[1.0][name]).max() > 1e-4, name
        np.testing.assert_allclose(move, multiplier * moves[1.0][name], atol=1e-12, err_msg=name)


@pytest.mark.parametrize("scale", [1e-4, 1.0], ids=["below the limit", "above the limit"])
def test_clipping_equals_torch(tiny, lively, exact, scale):
    """Clipping inside the step = clip_grad_norm_ before a step that does not clip; one norm for
    all."""
    results = []
    for inside in (True, False):
        torch.manual_seed(0)
        hp = tiny(grad_clip_norm=0.3 if inside else 0.0)
        model = lively(GPT(hp))
        optimizer = Muon(model, hp)
        for step in range(3):
            set_gradients(model, step, scale * 10.0**step)
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if not inside:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            returned = optimizer.step(1.0, 0.9)
            if inside:
                torch.testing.assert_close(returned, norm)
        results.append(snapshot(model))
    for name in results[0]:
        np.testing.assert_allclose(results[0][name], results[1][name], atol=1e-9, err_msg=name)


@pytest.mark.parametrize("name, layout", [("train_gpt", "G S"), ("kv_share", "G2")])
def test_a_hundred_steps_of_decay_alone(lively, name, layout):
    """Zero gradients: the matrices and embeddings shrink by (1 - lr wd)^100, all else stays bit for
    bit."""
    hp = toy(name, layout=layout)
    model = lively(system(name).GPT(hp))
    start, optimizer = snapshot(model), Muon(model, hp)
    for _ in range(100):
        set_gradients(model, 0, scale=0.0)
        optimizer.step(1.0, 0.95)
    for name, p in snapshot(model).items():
        lr_wd = hp.matrix_lr * hp.muon_wd if is_matrix(name) else 0.0
        lr_wd = hp.tied_embed_lr * hp.embed_wd if is_embedding(name) else lr_wd
        factor = np.linalg.norm(p) / np.linalg.norm(start[name])
        assert abs(factor / (1 - lr_wd) ** 100 - 1) < 1e-4, name
        assert lr_wd or (p == start[name]).all()


OWNED = [
    ("layouts", dict(layout="G2 S G S=2")),
    ("train_gpt", dict(layout="A S")),
    *((name, {}) for name in SYSTEMS),
    ("kv_share", dict(layout="G2", ngram_vocab_size=0)),
    ("transformer", dict(layout="A (A)x2 A", parallel_start_layer=2)),
]


@pytest.mark.parametrize("name, options", OWNED, ids=lambda x: x if isinstance(x, str) else None)
def test_every_parameter_has_exactly_one_owner(name, options):
    hp = toy(name, **options)
    model = system(name).GPT(hp)
    optimizer = Muon(model, hp)
    owned = [id(p) for group in optimizer.adamw.param_groups for p in group["params"]]
    owned += [id(p) for stack in optimizer.stacks.values() for p in stack]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


# ---- two processes

WORKER = """
import importlib, json, sys
import torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/systems"]
import train_gpt as t

world, system = t.world, importlib.import_module(sys.argv[4])
torch.set_default_dtype(torch.float64)  # so that what differs is wrong
world.dtype, torch.Tensor.float = torch.float64, torch.Tensor.double
hp = system.Hyperparameters(**json.loads(sys.argv[2]))
torch.set_num_threads(1)
if world.size > 1:
    t.dist.init_process_group("gloo")
torch.manual_seed(0)
model = system.GPT(hp)
with torch.no_grad():
    for p in model.parameters():
        p.copy_(torch.where(p == 0, 0.2 * torch.randn_like(p), p))
optimizer = t.Muon(model, hp)
norms = []
for step in range(4):
    ids = torch.randint(2, hp.vocab_size, (4, 49), generator=torch.Generator().manual_seed(step))
    ids[:, 0] = 1
    share = 4 // world.size
    own = ids[world.rank * share : (world.rank + 1) * share]
    model(own[:, :-1], own[:, 1:]).mean().backward()
    norms.append(optimizer.step(1.0 - 0.2 * step, 0.9))
weights = {name: p.detach() for name, p in model.named_parameters()}
found = dict(weights=weights, norms=norms, reached=optimizer.reached(),
             buffers=sum(b.numel() for b in optimizer.momentum.values()))
torch.save(found, f"{sys.argv[3]}/{world.size}.{world.rank}.pt")
if world.size > 1:
    t.dist.destroy_process_group()
"""


def run_worker(tmp_path, name, hp, processes):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launcher = [ROOT / "tools" / "ranks.py", str(processes)] if processes > 1 else []
    of_a_rank = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    env = {name: value for name, value in os.environ.items() if name not in of_a_rank}
    env |= dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")
    arguments = [str(ROOT), json.dumps(asdict(hp)), str(tmp_path), name]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *arguments],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(tmp_path / f"{processes}.{rank}.pt") for rank in range(processes)]


@pytest.mark.parametrize("name, layout", [("layouts", "G S S=1"), ("crawler", "A (A G)x2 A")])
def test_two_ranks_equal_one(tmp_path, name, layout):
    """Each rank on its half of the batch; stacks of odd and even size, and of one matrix."""
    hp = toy(name, layout=layout, num_heads=2, num_kv_heads=1, grad_clip_norm=0.3)
    (alone,), ranks = run_worker(tmp_path, name, hp, 1), run_worker(tmp_path, name, hp, 2)
    for tensor, expected in alone["weights"].items():
        first, second = (rank["weights"][tensor] for rank in ranks)
        assert torch.equal(first, second), tensor
        assert (first - expected).abs().max() < 1e-9, tensor
    for rank in ranks:
        torch.testing.assert_close(rank["norms"], alone["norms"], atol=1e-9, rtol=0)
        assert rank["buffers"] < 0.75 * alone["buffers"]  # the momentum is shared out
        assert rank["reached"] == alone["reached"] == len(alone["weights"])
    sizes = {len(stack) for stack in Muon(system(name).GPT(hp), hp).stacks.values()}
    assert {size % 2 for size in sizes} == {0, 1} and max(sizes - {1}) > 2
    assert name == "layouts" or 1 in sizes


def test_a_parameter_is_reached_by_its_first_gradient(tiny):
    """Of a matrix, an embedding and a scale, each alone."""
    hp = tiny()
    model = GPT(hp)
    optimizer, names = Muon(model, hp), []
    for name in ("blocks.1.mixer.k_proj.weight", "tok_emb.weight", "blocks.0.mlp_scale"):
        set_gradients(model, 0, scale=0.0)
        dict(model.named_parameters())[name].grad[0] = 1e-3
        optimizer.step(1.0, 0.9)
        names.append(name)
        assert optimizer.reached() == len(names)


# ---- schedules


@pytest.mark.parametrize("warmdown, min_lr", [(0.75, 0.1), (0.5, 0.0), (1.0, 0.2)])
def test_learning_rate_is_flat_then_linear_then_at_its_floor(tiny, warmdown, min_lr):
    hp = tiny(warmdown_frac=warmdown, min_lr=min_lr)
    grid = np.linspace(0, 1, 1001)
    values = np.array([hp.lr_multiplier(p) for p in grid])
    line = np.interp(grid, [0, 1 - warmdown, 1], [1, 1, 0])
    np.testing.assert_allclose(values, np.maximum(line, min_lr), atol=1e-9)
    assert values[0] == 1 and values[-1] == min_lr


def test_learning_rate_without_warmdown_is_constant(tiny):
    hp = tiny(warmdown_frac=0.0, min_lr=0.1)
    assert {hp.lr_multiplier(p) for p in (0.0, 0.5, 0.999)} == {1.0}


def test_momentum_rises_to_its_value_and_stays(tiny):
    hp = tiny(muon_momentum_warmup_start=0.8, muon_momentum=0.96, muon_momentum_warmup_frac=0.25)
    grid = np.linspace(0, 1, 101)
    values = [hp.momentum_at(p) for p in grid]
    np.testing.assert_allclose(values, np.interp(grid, [0, 0.25], [0.8, 0.96]), atol=1e-9)
    hp = tiny(muon_momentum=0.9, muon_momentum_warmup_frac=0.0)
    assert hp.momentum_at(0.0) == pytest.approx(0.9)


@pytest.mark.parametrize("ms_per_step", [100, 261, 4000])
@pytest.mark.parametrize("min_lr", [0.0, 0.1])
def test_the_learning_rate_has_come_down_when_600_seconds_are_over(tiny, min_lr, ms_per_step):
    limits = dict(max_wallclock_seconds=600.0, gptq_reserve_seconds=8.0, iterations=20_000)
    hp = tiny(min_lr=min_lr, **limits)
    step, seconds, multiplier = 0, 0.0, None
    while seconds + ms_per_step / 1000 <= hp.train_seconds():
        multiplier = hp.lr_multiplier(hp.progress(step, seconds))
        step, seconds = step + 1, seconds + ms_per_step / 1000
    assert 592 - 2 * ms_per_step / 1000 < seconds <= 592
    assert min_lr <= multiplier <= min_lr + 0.05


@pytest.mark.parametrize("wallclock", [0.0, 600.0])
def test_the_learning_rate_comes_down_with_iterations_too(tiny, wallclock):
    """100 steps are over long before the clock is, or there is no clock."""
    hp = tiny(max_wallclock_seconds=wallclock, iterations=100, warmdown_frac=0.5, min_lr=0.0)
    values = [hp.lr_multiplier(hp.progress(step, 0.1 * step)) for step in range(100)]
    np.testing.assert_allclose(values, np.minimum(1, (100 - np.arange(100)) / 50), atol=1e-9)


# ---- a whole run, under our own clock


class Run:
    """train() on random tokens; an optimizer step takes the next of `durations`, a validation takes
    an hour."""

    def __init__(self, hp, tmp_path, monkeypatch, durations=(0.0,)):
        self.now, self.calls, self.weights, self.validations = 0.0, [], [], 0
        tokens = np.random.default_rng(0).integers(2, hp.vocab_size, 5000)
        tokens[::100] = train_gpt.BOS_ID
        write_shard(tmp_path / "fineweb_train_000000.bin", tokens)
        torch.manual_seed(0)
        model = self.model = GPT(hp)
        self.start = snapshot(model)
        real_step = Muon.step

        def step(optimizer, multiplier, momentum):
            if len(self.calls) == hp.warmup_steps:
                self.at_first_step = snapshot(model)
            grad_norm = real_step(optimizer, multiplier, momentum)
            self.now += durations[len(self.calls) % len(durations)]
            self.calls.append((multiplier, momentum))
            self.weights.append(snapshot(model))
            return grad_norm

        def validate(*_, **__):
            self.now += 3600.0
            self.validations += 1
            return dict(val_bpb=1.0, seconds=3600.0)

        stream = train_gpt.TokenStream(str(tmp_path), "train", hp.vocab_size)
        validation = SimpleNamespace(tokens=torch.from_numpy(tokens[:200]))
        with monkeypatch.context() as patch:
            patch.setattr(Muon, "step", step)
            patch.setattr(train_gpt, "validate", validate)
            patch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: self.now))
            self.audit = train_gpt.Audit()
            _, self.figures = train_gpt.train(hp, model, stream, validation, self.audit)
        self.calls, self.weights = self.calls[hp.warmup_steps :], self.weights[hp.warmup_steps :]


UNEVEN = [(0.1,), (0.05, 0.2, 0.1)]


@pytest.mark.parametrize("durations", UNEVEN, ids=["even steps", "uneven steps"])
def test_a_run_ends_inside_its_budget_with_the_learning_rate_down(
    tiny, tmp_path, monkeypatch, durations
):
    limits = dict(iterations=20_000, max_wallclock_seconds=6.0, gptq_reserve_seconds=1.0)
    options = dict(warmup_steps=3, min_lr=0.1, val_loss_every=7, muon_momentum=0.97)
    hp = tiny(layout="S", train_batch_tokens=128, **limits, **options)
    run = Run(hp, tmp_path, monkeypatch, durations)
    # validation and warm-up are not counted
    spent = sum((durations * 100)[hp.warmup_steps :][: len(run.calls)])
    assert 5.0 - 2 * max(durations) - 1e-6 <= spent <= 5.0 + 1e-6
    assert run.figures["wallclock_seconds"] == pytest.approx(spent, abs=1e-3)
    assert run.figures["step_stop"] == len(run.calls)
    assert run.validations == (len(run.calls) - 1) // 7 + 2  # every 7th step, from 0, and the end
    assert run.calls[0] == pytest.approx((1.0, hp.muon_momentum_warmup_start))
    assert run.calls[-1][0] <= hp.min_lr + 0.05 and run.calls[-1][1] == pytest.approx(0.97)


def test_a_run_without_a_clock_follows_its_iterations(tiny, tmp_path, monkeypatch):
    hp = tiny(layout="S", iterations=20, max_wallclock_seconds=0.0, warmdown_frac=1.0, min_lr=0.0)
    run = Run(hp, tmp_path, monkeypatch, (100.0,))
    multipliers = [multiplier for multiplier, _ in run.calls]
    np.testing.assert_allclose(multipliers, 1 - np.arange(20) / 20, atol=1e-9)


def test_warm_up_leaves_no_trace_in_the_weights(tiny, tmp_path, monkeypatch):
    run = Run(tiny(layout="G S", iterations=2, warmup_steps=3), tmp_path, monkeypatch)
    for name, p in run.at_first_step.items():
        assert (p == run.start[name]).all(), name


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9965])
def test_a_run_leaves_the_average_of_its_weights(tiny, tmp_path, monkeypatch, decay):
    """Sum of (1 - d_t) d_{t+1} ... d_n w_t, plus d_0 ... d_n of the start; d_t = min(d, (1 + t) /
    (10 + t))."""
    hp = tiny(layout="G S", iterations=12, ema_decay=decay)
    run = Run(hp, tmp_path, monkeypatch)
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(12)]
    shares = [(1 - decays[t]) * np.prod(decays[t + 1 :]) for t in range(12)]
    assert sum(shares) + np.prod(decays) == pytest.approx(1) and np.prod(decays) < 1e-5
    for name, p in snapshot(run.model).items():
        weights = [weights[name] for weights in run.weights]
        expected = sum(share * w for share, w in zip(shares, weights, strict=True))
        expected = expected + np.prod(decays) * run.start[name]
        np.testing.assert_allclose(p, expected, atol=1e-5, err_msg=name)


def test_a_run_that_diverges_raises(tiny, tmp_path, monkeypatch):
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *args: forward(*args) * float("nan"))
    with pytest.raises(train_gpt.Refused, match="step 1"):
        Run(tiny(layout="S"), tmp_path, monkeypatch)
