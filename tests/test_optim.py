"""Optimizer, schedules, averaging and GPTQ against independent truths.

Muon and AdamW   against float64 numpy, several steps; two processes against one
clock            a run under a clock of our own: what is counted, when it stops, how far the rate is down
average          of the weights against the sum of its definition
GPTQ             against its definition in float64 (one column after the other, explicit inverse), against
                 rounding to nearest; Hessians against sums over the inputs that a hook of our own sees
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt
from train_gpt import GPT, Linear, Muon, collect_hessians, gptq_quantize, quantize

ROOT = Path(train_gpt.__file__).resolve().parent


def set_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=generator)


def snapshot(model):
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def gradients(model):
    return {name: p.grad.double().numpy().copy() for name, p in model.named_parameters()}


def is_matrix(name):
    return name.endswith("_proj.weight") and not name.endswith(("a_proj.weight", "b_proj.weight")) \
        or name == "ngram.proj.weight"


# ---- one step


def numpy_muon(W, grad, buffer, lr, momentum, hp):
    """Momentum, Nesterov, rows to length 1, singular values through the five polynomials, decoupled decay."""
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


def test_three_steps_equal_numpy(tiny, lively):
    """All parameters, with gradients, momentum and learning rate that change from step to step."""
    hp = tiny(layout="G S A", grad_clip_norm=0.0, mlp_mult=3.0)
    model = lively(GPT(hp))
    optimizer, expected = Muon(model, hp), snapshot(model)
    buffers = {name: np.zeros_like(p) for name, p in expected.items()}
    moments = {name: [0.0, 0.0] for name in expected}
    for step, (multiplier, momentum) in enumerate([(1.0, 0.9), (0.5, 0.95), (0.25, 0.8)], 1):
        set_gradients(model, step, scale=10.0**-step)
        for name, grad in gradients(model).items():
            if is_matrix(name):
                lr = multiplier * hp.matrix_lr
                expected[name] = numpy_muon(expected[name], grad, buffers[name], lr, momentum, hp)
            else:
                embed = name in ("tok_emb.weight", "ngram.table")
                lr, wd = (hp.tied_embed_lr, hp.embed_wd) if embed else (hp.scalar_lr, 0.0)
                lr *= multiplier
                expected[name] = numpy_adamw(expected[name], grad, moments[name], step, lr, wd, hp)
        optimizer.step(multiplier, momentum)
    for name, p in snapshot(model).items():
        np.testing.assert_allclose(p, expected[name], atol=2e-5, rtol=2e-5, err_msg=name)


def test_a_step_clears_the_gradients(tiny):
    hp = tiny()
    model = GPT(hp)
    optimizer = Muon(model, hp)
    set_gradients(model, 0)
    optimizer.step(1.0, 0.9)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("multiplier", [0.0, 0.5])
def test_the_multiplier_scales_every_learning_rate(tiny, lively, multiplier):
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
        np.testing.assert_allclose(move, multiplier * moves[1.0][name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("scale", [1e-4, 1.0], ids=["below the limit", "above the limit"])
def test_clipping_equals_torch(tiny, lively, scale):
    """Clipping inside the step = clip_grad_norm_ before a step that does not clip; one norm for all."""
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
        np.testing.assert_allclose(results[0][name], results[1][name], atol=2e-6, err_msg=name)


def test_a_hundred_steps_of_decay_alone(tiny, lively):
    """Zero gradients: the matrices and embeddings shrink by (1 - lr wd)^100, all else stays bit for bit."""
    hp = tiny(layout="G S")
    model = lively(GPT(hp))
    start, optimizer = snapshot(model), Muon(model, hp)
    for _ in range(100):
        set_gradients(model, 0, scale=0.0)
        optimizer.step(1.0, 0.95)
    for name, p in snapshot(model).items():
        lr_wd = hp.matrix_lr * hp.muon_wd if is_matrix(name) else \
            hp.tied_embed_lr * hp.embed_wd if name in ("tok_emb.weight", "ngram.table") else 0.0
        factor = np.linalg.norm(p) / np.linalg.norm(start[name])
        assert abs(factor / (1 - lr_wd) ** 100 - 1) < 1e-4, name
        assert lr_wd or (p == start[name]).all()


@pytest.mark.parametrize("options", [
    dict(layout="G2 S G S=2"), dict(layout="A S"), dict(layout="G S G~0"),
    dict(layout="A (A g)x2 A", inst_dim=4, unet_skips=True, attn_gate_dims=4, parallel_start_layer=2),
], ids=["shared", "attention", "keys and values", "looped"])
def test_every_parameter_has_exactly_one_owner(tiny, options):
    hp = tiny(**options)
    model = GPT(hp)
    optimizer = Muon(model, hp)
    owned = [id(p) for group in optimizer.adamw.param_groups for p in group["params"]]
    owned += [id(p) for stack in optimizer.stacks.values() for p in stack]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


# ---- two processes

WORKER = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import train_gpt as t

hp = t.Hyperparameters(**json.loads(sys.argv[2]))
torch.set_num_threads(1)
if t.WORLD_SIZE > 1:
    t.dist.init_process_group("gloo")
torch.manual_seed(0)
model = t.GPT(hp)
with torch.no_grad():
    for p in model.parameters():
        p.copy_(torch.where(p == 0, 0.2 * torch.randn_like(p), p))
optimizer = t.Muon(model, hp)
norms = []
for step in range(4):
    ids = torch.randint(2, hp.vocab_size, (4, 49), generator=torch.Generator().manual_seed(step))
    ids[:, 0] = 1
    share = 4 // t.WORLD_SIZE
    own = ids[t.RANK * share : (t.RANK + 1) * share]
    t.token_nats(model, own[:, :-1], own[:, 1:]).mean().backward()
    norms.append(optimizer.step(1.0 - 0.2 * step, 0.9))
weights = {name: p.detach() for name, p in model.named_parameters()}
torch.save(dict(weights=weights, norms=norms, buffers=sum(b.numel() for b in optimizer.momentum.values())),
           f"{sys.argv[3]}/{t.WORLD_SIZE}.{t.RANK}.pt")
if t.WORLD_SIZE > 1:
    t.dist.destroy_process_group()
"""


def run_worker(tmp_path, hp, processes):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env |= dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")
    command = [sys.executable, *launcher, str(script), str(ROOT), json.dumps(asdict(hp)), str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(tmp_path / f"{processes}.{rank}.pt") for rank in range(processes)]


def test_two_ranks_equal_one(tmp_path, tiny):
    """Each rank on its half of the batch; stacks of odd and even size, and of one matrix."""
    hp = tiny(layout="G S S=1", grad_clip_norm=0.3)
    (alone,), ranks = run_worker(tmp_path, hp, 1), run_worker(tmp_path, hp, 2)
    for name, expected in alone["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        assert (ranks[0]["weights"][name] - expected).abs().max() < 1e-5, name
    for rank in ranks:
        torch.testing.assert_close(rank["norms"], alone["norms"], atol=1e-5, rtol=1e-4)
        assert rank["buffers"] < 0.75 * alone["buffers"]  # the momentum is shared out
    stacks = Muon(GPT(hp), hp).stacks.values()
    assert {len(stack) % 2 for stack in stacks} == {0, 1} and min(map(len, stacks)) == 1


# ---- schedules


@pytest.mark.parametrize("warmdown, min_lr", [(0.75, 0.1), (0.5, 0.0), (1.0, 0.2)])
def test_learning_rate_is_flat_then_linear_then_at_its_floor(tiny, warmdown, min_lr):
    hp = tiny(warmdown_frac=warmdown, min_lr=min_lr)
    grid = np.linspace(0, 1, 1001)
    values = np.array([train_gpt.lr_multiplier(hp, p) for p in grid])
    line = np.interp(grid, [0, 1 - warmdown, 1], [1, 1, 0])
    np.testing.assert_allclose(values, np.maximum(line, min_lr), atol=1e-9)
    assert values[0] == 1 and values[-1] == min_lr


def test_learning_rate_without_warmdown_is_constant(tiny):
    hp = tiny(warmdown_frac=0.0, min_lr=0.1)
    assert {train_gpt.lr_multiplier(hp, p) for p in (0.0, 0.5, 0.999)} == {1.0}


def test_momentum_rises_to_its_value_and_stays(tiny):
    hp = tiny(muon_momentum_warmup_start=0.8, muon_momentum=0.96, muon_momentum_warmup_frac=0.25)
    grid = np.linspace(0, 1, 101)
    values = [train_gpt.muon_momentum(hp, p) for p in grid]
    np.testing.assert_allclose(values, np.interp(grid, [0, 0.25], [0.8, 0.96]), atol=1e-9)
    hp = tiny(muon_momentum=0.9, muon_momentum_warmup_frac=0.0)
    assert train_gpt.muon_momentum(hp, 0.0) == pytest.approx(0.9)


@pytest.mark.parametrize("ms_per_step", [100, 261, 4000])
@pytest.mark.parametrize("min_lr", [0.0, 0.1])
def test_the_learning_rate_has_come_down_when_600_seconds_are_over(tiny, min_lr, ms_per_step):
    hp = tiny(max_wallclock_seconds=600.0, gptq_reserve_seconds=8.0, iterations=20_000, min_lr=min_lr)
    step, seconds, multiplier = 0, 0.0, None
    while seconds + ms_per_step / 1000 <= train_gpt.train_budget(hp):
        multiplier = train_gpt.lr_multiplier(hp, train_gpt.training_progress(hp, step, seconds))
        step, seconds = step + 1, seconds + ms_per_step / 1000
    assert 592 - 2 * ms_per_step / 1000 < seconds <= 592
    assert min_lr <= multiplier <= min_lr + 0.05


@pytest.mark.parametrize("wallclock", [0.0, 600.0])
def test_the_learning_rate_comes_down_with_iterations_too(tiny, wallclock):
    """100 steps are over long before the clock is, or there is no clock."""
    hp = tiny(max_wallclock_seconds=wallclock, iterations=100, warmdown_frac=0.5, min_lr=0.0)
    progress = [train_gpt.training_progress(hp, step, 0.1 * step) for step in range(100)]
    values = [train_gpt.lr_multiplier(hp, p) for p in progress]
    np.testing.assert_allclose(values, np.minimum(1, (100 - np.arange(100)) / 50), atol=1e-9)


# ---- a whole run, under our own clock


class Run:
    """train() on random tokens; an optimizer step takes the next of `durations`, a validation takes an hour."""

    def __init__(self, hp, tmp_path, monkeypatch, durations=(0.0,)):
        self.now, self.calls, self.weights, self.validations = 0.0, [], [], 0
        shard = np.random.default_rng(0).integers(2, hp.vocab_size, 5000, dtype=np.uint16)
        shard[::100] = 1
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(shard)
        (tmp_path / "fineweb_train_000000.bin").write_bytes(header.tobytes() + shard.tobytes())
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
            return dict(val_bpb=1.0)

        stream = train_gpt.TokenStream(str(tmp_path), "train", hp.vocab_size)
        with monkeypatch.context() as patch:
            patch.setattr(Muon, "step", step)
            patch.setattr(train_gpt, "validate", validate)
            patch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: self.now))
            self.audit = train_gpt.Audit()
            self.figures = train_gpt.train(hp, model, stream, None, self.audit)
        self.calls, self.weights = self.calls[hp.warmup_steps :], self.weights[hp.warmup_steps :]


@pytest.mark.parametrize("durations", [(0.1,), (0.05, 0.2, 0.1)], ids=["even steps", "uneven steps"])
def test_a_run_ends_inside_its_budget_with_the_learning_rate_down(tiny, tmp_path, monkeypatch, durations):
    hp = tiny(layout="S", iterations=20_000, max_wallclock_seconds=6.0, gptq_reserve_seconds=1.0,
              warmup_steps=3, min_lr=0.1, val_loss_every=7, muon_momentum=0.97, train_batch_tokens=128)
    run = Run(hp, tmp_path, monkeypatch, durations)
    spent = sum((durations * 100)[hp.warmup_steps :][: len(run.calls)])
    assert 5.0 - 2 * max(durations) - 1e-6 <= spent <= 5.0 + 1e-6  # validation and warm-up are not counted
    assert run.figures["wallclock_seconds"] == pytest.approx(spent, abs=1e-3)
    assert run.figures["step_stop"] == len(run.calls)
    assert run.validations == (len(run.calls) - 1) // 7 + 2  # every 7th step, from 0, and the end
    assert run.calls[0] == pytest.approx((1.0, hp.muon_momentum_warmup_start))
    assert run.calls[-1][0] <= hp.min_lr + 0.05 and run.calls[-1][1] == pytest.approx(0.97)


def test_a_run_without_a_clock_follows_its_iterations(tiny, tmp_path, monkeypatch):
    hp = tiny(layout="S", iterations=20, max_wallclock_seconds=0.0, warmdown_frac=1.0, min_lr=0.0)
    run = Run(hp, tmp_path, monkeypatch, (100.0,))
    np.testing.assert_allclose([multiplier for multiplier, _ in run.calls], 1 - np.arange(20) / 20, atol=1e-9)


def test_warm_up_leaves_no_trace_in_the_weights(tiny, tmp_path, monkeypatch):
    run = Run(tiny(layout="G S", iterations=2, warmup_steps=3), tmp_path, monkeypatch)
    for name, p in run.at_first_step.items():
        assert (p == run.start[name]).all(), name


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9965])
def test_a_run_leaves_the_average_of_its_weights(tiny, tmp_path, monkeypatch, decay):
    """Sum of (1 - d_t) d_{t+1} ... d_n w_t, plus d_0 ... d_n of the start; d_t = min(d, (1+t)/(10+t))."""
    hp = tiny(layout="G S", iterations=12, ema_decay=decay)
    run = Run(hp, tmp_path, monkeypatch)
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(12)]
    shares = [(1 - decays[t]) * np.prod(decays[t + 1 :]) for t in range(12)]
    assert sum(shares) + np.prod(decays) == pytest.approx(1) and np.prod(decays) < 1e-5
    for name, p in snapshot(run.model).items():
        expected = sum(share * weights[name] for share, weights in zip(shares, run.weights, strict=True))
        np.testing.assert_allclose(p, expected + np.prod(decays) * run.start[name], atol=1e-5, err_msg=name)


def test_a_run_that_diverges_raises(tiny, tmp_path, monkeypatch):
    with pytest.raises(FloatingPointError, match="step 1"):
        monkeypatch.setattr(train_gpt, "token_nats", lambda model, x, y: model(x)[..., 0] * float("nan"))
        Run(tiny(layout="S"), tmp_path, monkeypatch)


# ---- GPTQ


def correlated(rows, cols, seed=0):
    """Inputs whose columns are mixtures of few strong and many weak directions, of unlike size."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((cols, cols)) * np.linspace(2, 0.05, cols)[:, None]
    X = rng.standard_normal((rows, cols)) @ mix * np.exp(0.5 * rng.standard_normal(cols))
    W = rng.standard_normal((24, cols)) * np.exp(rng.standard_normal((24, 1)))
    return torch.from_numpy(X).float(), torch.from_numpy(W).float()


def nearest(W, scale, bits):
    qmax = 2 ** (bits - 1) - 1
    return (W.double() / scale.double()[:, None]).round().clamp(-qmax, qmax)


def output_error(X, W, q, scale):
    return ((W.double() - q.double() * scale.double()[:, None]) @ X.double().T).norm().item()


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("rows, cols", [(2000, 16), (2000, 128), (2000, 129), (2000, 300), (60, 200)])
def test_gptq_beats_rounding_to_nearest_on_correlated_inputs(rows, cols, bits):
    X, W = correlated(rows, cols)
    q, scale = gptq_quantize(W, X.T @ X, bits, 6.0)
    assert q.dtype == torch.int8 and q.shape == W.shape
    assert scale.dtype == torch.float16 and scale.shape == (24,)
    assert q.abs().max() <= 2 ** (bits - 1) - 1
    assert output_error(X, W, q, scale) < 0.8 * output_error(X, W, nearest(W, scale, bits), scale)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["identity", "diagonal"])
def test_gptq_rounds_to_nearest_where_inputs_are_uncorrelated(kind, bits):
    _, W = correlated(1, 200)
    H = torch.eye(200) * 3 if kind == "identity" else torch.diag(torch.rand(200) + 0.01)
    q, scale = gptq_quantize(W, H, bits, 5.0)
    assert (q == nearest(W, scale, bits)).float().mean() > 0.9999  # but for ties


def slow_gptq(W, H, scale, bits):
    """Columns by falling diag H: round one, let the rest make up for it, strike it from the inverse."""
    qmax = 2 ** (bits - 1) - 1
    W, H, s = W.double().numpy().copy(), H.double().numpy().copy(), scale.double().numpy()
    order = np.argsort(-np.diag(H), kind="stable")
    inverse = np.linalg.inv(H + 0.01 * np.diag(H).mean() * np.eye(len(H)))
    q = np.zeros_like(W)
    for n, j in enumerate(order):
        q[:, j] = np.clip(np.round(W[:, j] / s), -qmax, qmax)
        rest = order[n + 1 :]
        W[:, rest] -= np.outer((W[:, j] - q[:, j] * s) / inverse[j, j], inverse[j, rest])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.from_numpy(q)


@pytest.mark.parametrize("bits, cols", [(6, 20), (4, 20), (8, 140), (6, 140)])
def test_gptq_equals_its_definition(bits, cols):
    X, W = correlated(500, cols, seed=1)
    H = X.T @ X
    q, scale = gptq_quantize(W, H, bits, 4.0)
    expected = slow_gptq(W, H, scale, bits)
    assert (q == expected).float().mean() > 0.999  # float32 may round a near tie the other way
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
    """A column whose input is always zero becomes zero and changes nothing else; a zero row stays zero."""
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


def batches_of(hp, n=3):
    ids = torch.randint(2, hp.vocab_size, (n, 2, 41))
    ids[:, :, [0, 17]] = 1
    return [(x[:, :-1], x[:, 1:]) for x in ids]


def test_hessians_are_the_sums_over_the_inputs(tiny, lively):
    """By hand: every input row of every matrix, both uses of a shared mixer, in float64."""
    hp = tiny(layout="G S G S=1")
    model, batches, expected = lively(GPT(hp)), batches_of(hp), {}
    names = {id(p): name for name, p in model.named_parameters()}

    def add(module, args):
        X = args[0].detach().reshape(-1, args[0].shape[-1]).double()
        name = names[id(module.weight)]
        expected[name] = expected.get(name, 0) + torch.einsum("na,nb->ab", X, X)

    handles = [m.register_forward_pre_hook(add) for m in model.modules() if isinstance(m, Linear)]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for handle in handles:
        handle.remove()
    hessians = collect_hessians(model, batches)
    for name, hessian in hessians.items():
        assert hessian.dtype == torch.float32 and torch.isfinite(hessian).all()
        if name != "ngram.table":
            torch.testing.assert_close(hessian.double(), expected[name], atol=1e-3, rtol=1e-4)
    assert set(hessians) == set(quantize(model, hp))  # every quantized tensor has one
    matrices = {name for name in names.values() if is_matrix(name)}
    assert set(hessians) == matrices | {"tok_emb.weight", "ngram.table"}
    assert not any(module._forward_hooks for module in model.modules())
    rows = torch.randn(5, hp.ngram_dim)  # errors of table rows, as the projection lets them through
    through = model.ngram.proj(rows).square().sum()
    torch.testing.assert_close(((rows @ hessians["ngram.table"]) * rows).sum(), through, rtol=1e-4, atol=1e-4)


def test_gptq_helps_every_matrix_of_the_model(tiny, lively):
    hp = tiny(layout="G S G S=1")
    model = lively(GPT(hp))
    hessians = collect_hessians(model, batches_of(hp))
    best, plain = quantize(model, hp, hessians), quantize(model, hp)
    params = dict(model.named_parameters())
    assert best.keys() == plain.keys()
    for name, (q, scale) in best.items():
        assert torch.equal(scale, plain[name][1])
        errors = []
        for values in (q, plain[name][0]):
            difference = params[name].detach().double() - values.double() * scale.double()[:, None]
            errors.append(((difference @ hessians[name].double()) * difference).sum().item())
        assert errors[0] < errors[1], name
        bits, sigmas = (7, 15.0) if name in ("tok_emb.weight", "ngram.table") else (6, 12.85)
        qmax = 2 ** (bits - 1) - 1
        assert q.abs().max() <= qmax, name
        torch.testing.assert_close(scale.float(), sigmas * params[name].std(1) / qmax, rtol=0.05, atol=0)


def test_quantizing_without_a_hessian_of_a_matrix_raises(tiny, lively):
    hp = tiny()
    model = lively(GPT(hp))
    hessians = collect_hessians(model, batches_of(hp))
    del hessians["blocks.2.mixer.v_proj.weight"]
    with pytest.raises(KeyError, match="blocks.2.mixer.v_proj.weight"):
        quantize(model, hp, hessians)
