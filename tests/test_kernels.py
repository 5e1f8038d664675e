"""The kernels against independent truths.

gated_delta_rule   against a float64 loop over tokens and fla's naive recurrence: outputs, state,
                   gradients
fla's custom ops   their wiring (order of arguments, results and gradients, fakes, torch.compile),
                   with fla's functions replaced by the loop under fla's own signatures; on a GPU
                   the real kernels
window_attention   against a float64 loop over tokens; the packing for varlen_attn likewise
polar_express      on matrices of known singular values and vectors
"""

import ast
import inspect
import itertools
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from streams import count_documents
from torch._subclasses import FakeTensorMode

import train_gpt
from train_gpt import (
    BOS_ID,
    gated_delta_rule,
    polar_express,
    torch_gated_delta_rule,
    varlen_window_attention,
    window_attention,
)

with warnings.catch_warnings():  # fla warns where there is no GPU
    warnings.simplefilter("ignore")
    from fla.ops.gated_delta_rule import chunk as fla_chunk
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def rms_ratio(x, reference):
    """Norm of the difference over the norm of the reference, in float64."""
    x, reference = x.detach().cpu().double(), reference.detach().cpu().double()
    return ((x - reference).norm() / reference.norm().clamp_min(1e-30)).item()


# ---- gated delta rule


def loop_delta_rule(q, k, v, g, beta, initial_state):
    """The definition in float64: decay, write what the key does not recall, read."""
    q, k, v, g, beta, S = (x.double() for x in (q, k, v, g, beta, initial_state))
    outputs = []
    for t in range(q.shape[1]):
        S = S * g[:, t].exp()[:, :, None, None]
        recalled = torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - recalled))
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / q.shape[-1] ** 0.5)
    return torch.stack(outputs, 1), S


def delta_inputs(T, B=2, H=2, K=16, V=24, beta_max=1.0, resets=(), dtype=torch.float32):
    """Normalised q and k; log decays from 0 to strong, -60 at `resets`; beta is unlike g."""
    g = -F.softplus(2 * torch.randn(B, T, H) - 2)
    for t in resets:
        g[:, t] = -60.0
    return tuple(
        x.to(dtype).requires_grad_()
        for x in (
            F.normalize(torch.randn(B, T, H, K), dim=-1),
            F.normalize(torch.randn(B, T, H, K), dim=-1),
            torch.randn(B, T, H, V),
            g,
            beta_max * torch.rand(B, T, H),
            torch.randn(B, H, K, V),
        )
    )


def run_and_differentiate(f, inputs, weights=None):
    """Output, final state and the gradients of a random function of both, in this order."""
    o, state = f(*inputs)[:2]
    generator = torch.Generator().manual_seed(1)
    do, dstate = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (o, state)
    )
    wo, ws = weights or (1.0, 1.0)
    loss = wo * (o * do.to(o)).sum() + ws * (state * dstate.to(state)).sum()
    gradients = torch.autograd.grad(loss, [x for x in inputs if x is not None])
    return [o, state, *gradients]


def assert_same(results, references, tolerance):
    names = ["o", "final_state", *(f"d{name}" for name in NAMES)]
    errors = {name: rms_ratio(x, y) for name, x, y in zip(names, results, references, strict=False)}
    assert [tuple(x.shape) for x in results] == [tuple(y.shape) for y in references]
    assert max(errors.values()) <= tolerance, errors


CASES = {
    "T=1": dict(T=1),
    "T=31": dict(T=31),
    "T=32": dict(T=32),
    "T=33": dict(T=33),
    "T=63": dict(T=63),
    "T=64": dict(T=64),
    "T=65": dict(T=65),
    "T=75": dict(T=75),
    "T=1000": dict(T=1000, B=1, H=2, K=8, V=12),
    "K>V": dict(T=75, K=24, V=8),
    "K=V=64": dict(T=75, B=1, K=64, V=64),
    "one head": dict(T=75, B=3, H=1),
    "beta to 2": dict(T=130, beta_max=2.0),
    "resets": dict(T=100, resets=(0, 1, 20, 31, 32, 64, 99)),
    "resets at every second token": dict(T=100, resets=range(0, 100, 2)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_delta_rule_equals_the_token_loop(case):
    inputs = delta_inputs(**case)
    results = run_and_differentiate(gated_delta_rule, inputs)
    assert_same(results, run_and_differentiate(loop_delta_rule, inputs), 1e-4)


@pytest.mark.parametrize("beta_max", [1.0, 2.0])
@pytest.mark.parametrize("T", [1, 64, 75])
def test_delta_rule_equals_flas_recurrence(T, beta_max):
    inputs = delta_inputs(T, beta_max=beta_max)

    def fla(q, k, v, g, beta, state):  # by name: the orders of fla's two naive functions differ
        return naive_recurrent_gated_delta_rule(
            q=q, k=k, v=v, beta=beta, g=g, initial_state=state, output_final_state=True
        )

    assert_same(
        run_and_differentiate(gated_delta_rule, inputs), run_and_differentiate(fla, inputs), 1e-4
    )


def test_delta_rule_without_a_state_starts_at_zero():
    *inputs, state = delta_inputs(75)
    zeros = torch.zeros_like(state).requires_grad_()
    results = run_and_differentiate(gated_delta_rule, inputs)
    references = run_and_differentiate(loop_delta_rule, (*inputs, zeros))
    assert_same(results, references[:-1], 1e-4)


def test_delta_rule_is_exact_in_float64():
    inputs = delta_inputs(100, beta_max=2.0, resets=(3, 40), dtype=torch.float64)
    results = run_and_differentiate(gated_delta_rule, inputs)
    assert_same(results, run_and_differentiate(loop_delta_rule, inputs), 1e-12)
    assert {x.dtype for x in results} == {torch.float64}


def test_delta_rule_keeps_its_types_under_bfloat16():
    q, k, v, g, beta, state = delta_inputs(40)
    o, final = gated_delta_rule(q.bfloat16(), k.bfloat16(), v.bfloat16(), g, beta, state)
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    reference = loop_delta_rule(q.bfloat16(), k.bfloat16(), v.bfloat16(), g, beta, state)
    assert rms_ratio(o, reference[0]) < 0.01 and rms_ratio(final, reference[1]) < 1e-4


@pytest.mark.parametrize("cut", [1, 31, 32, 40, 64, 74])
def test_delta_rule_split_in_two_is_the_whole(cut):
    *inputs, state = delta_inputs(75)
    whole, end = gated_delta_rule(*inputs, state)
    first, middle = gated_delta_rule(*(x[:, :cut] for x in inputs), state)
    second, final = gated_delta_rule(*(x[:, cut:] for x in inputs), middle)
    assert_same([torch.cat((first, second), 1), final], [whole, end], 1e-5)


def test_delta_rule_accepts_any_chunk_length():
    inputs = delta_inputs(75)
    reference = run_and_differentiate(loop_delta_rule, inputs)
    for chunk in (1, 7, 64, 100):
        results = run_and_differentiate(
            lambda *x, n=chunk: torch_gated_delta_rule(*x, chunk=n), inputs
        )
        assert_same(results, reference, 1e-4)


# ---- fla's kernels as custom ops


def first_parameters(function):
    return list(inspect.signature(function).parameters)


def returned_names(function):
    tree = ast.parse(inspect.getsource(function))
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return [element.id for element in returns[-1].value.elts]


def test_fla_has_the_signatures_that_the_custom_ops_rely_on():
    forward, backward = fla_chunk.chunk_gated_delta_rule_fwd, fla_chunk.chunk_gated_delta_rule_bwd
    assert first_parameters(forward)[:5] == ["q", "k", "v", "g", "beta"]
    assert {"scale", "initial_state", "output_final_state"} <= set(first_parameters(forward))
    assert returned_names(forward) == ["g", "o", "A", "final_state", "initial_state", "g_input"]
    assert first_parameters(backward)[:6] == ["q", "k", "v", "g", "beta", "A"]
    assert {"scale", "initial_state", "do", "dht"} <= set(first_parameters(backward))
    assert returned_names(backward) == ["dq", "dk", "dv", "db", "dg", "dh0", "dA_log", "ddt_bias"]
    assert inspect.signature(forward).parameters["chunk_size"].default == 64  # columns of A


@pytest.fixture
def fla_on_cpu(monkeypatch):
    """fla's two functions with fla's signatures, results and demands (contiguous inputs), by the
    token loop. As in fla the forward hands the backward chunk-wise sums of g, in units of log 2,
    and the matrix A."""
    real_forward = fla_chunk.chunk_gated_delta_rule_fwd
    real_backward = fla_chunk.chunk_gated_delta_rule_bwd

    def bind(function, args, kwargs):
        """The arguments by the names that fla gives them; what is left out must be left so."""
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        a = SimpleNamespace(**bound.arguments)
        assert all(x.is_contiguous() for x in vars(a).values() if isinstance(x, torch.Tensor))
        assert a.chunk_size == 64 and not a.state_v_first and not a.use_gate_in_kernel
        assert a.cu_seqlens is a.cp_context is a.A_log is a.dt_bias is None
        return a

    def chunk_sums(g, sign=1):  # sign -1 undoes it
        padded = F.pad(g, (0, 0, 0, -g.shape[1] % 64)).unflatten(1, (-1, 64))
        before = torch.zeros_like(padded[:, :, :1])
        steps = padded.cumsum(2) if sign > 0 else padded.diff(dim=2, prepend=before)
        return steps.flatten(1, 2)[:, : g.shape[1]].contiguous()

    def make_A(k, beta):
        """In place of fla's inverse any function of the inputs, of its shape and type."""
        column = k.sum(-1, keepdim=True) * beta.unsqueeze(-1).to(k.dtype)
        return column.expand(*k.shape[:3], 64).contiguous()

    def forward(*args, **kwargs):
        a = bind(real_forward, args, kwargs)
        assert a.output_final_state
        o, final_state = loop_delta_rule(a.q, a.k, a.v, a.g, a.beta, a.initial_state)
        o = (o * a.scale * a.q.shape[-1] ** 0.5).to(a.v.dtype)
        g_sum = chunk_sums(a.g) / math.log(2)
        return g_sum, o, make_A(a.k, a.beta), final_state.float(), a.initial_state, None

    def backward(*args, **kwargs):
        a = bind(real_backward, args, kwargs)
        assert a.A.dtype == a.k.dtype and torch.equal(a.A, make_A(a.k, a.beta))
        g = chunk_sums(a.g.double() * math.log(2), -1)

        def differentiate():
            inputs = a.q, a.k, a.v, g, a.beta, a.initial_state
            inputs = [x.detach().double().requires_grad_() for x in inputs]
            o, final_state = loop_delta_rule(*inputs)
            o = o * a.scale * a.q.shape[-1] ** 0.5
            return torch.autograd.grad((o, final_state), inputs, (a.do.double(), a.dht.double()))

        # inside a custom op autograd is off, for this thread
        with ThreadPoolExecutor(1) as other_thread:
            dq, dk, dv, dg, db, dh0 = other_thread.submit(differentiate).result()
        gradients = dq.to(a.q), dk.to(a.k), dv.to(a.v), db.to(a.beta), dg.float(), dh0.float()
        return *gradients, None, None

    monkeypatch.setattr(fla_chunk, "chunk_gated_delta_rule_fwd", forward)
    monkeypatch.setattr(fla_chunk, "chunk_gated_delta_rule_bwd", backward)


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)], ids=["both", "output", "state"]
)
def test_custom_op_gradients_are_the_token_loops(fla_on_cpu, weights):
    inputs = delta_inputs(75)
    results = run_and_differentiate(train_gpt.fla_gated_delta_rule, inputs, weights)
    assert_same(results, run_and_differentiate(loop_delta_rule, inputs, weights), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_custom_op_makes_its_inputs_contiguous(fla_on_cpu, name):
    inputs = delta_inputs(20)
    strided = [
        x.detach().mT.contiguous().mT.requires_grad_() if n == name else x
        for n, x in zip(NAMES, inputs, strict=True)
    ]
    assert not strided[NAMES.index(name)].is_contiguous()
    results = run_and_differentiate(train_gpt.fla_gated_delta_rule, strided)
    assert_same(results, run_and_differentiate(loop_delta_rule, inputs), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_custom_ops_pass_the_checks_of_torch(fla_on_cpu, dtype):
    """Schema, registered autograd, fakes against real results, both ways traced by AOTAutograd."""
    q, k, v, g, beta, state = delta_inputs(40)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    tolerances = dict(rtol=1e-3, atol=1e-3)
    torch.library.opcheck(train_gpt.fla_gated_delta_rule, (q, k, v, g, beta, state), **tolerances)
    with torch.no_grad():
        o, final, g_sum, A = train_gpt.fla_gated_delta_rule(q, k, v, g, beta, state)
        torch.library.opcheck(
            train_gpt.fla_gated_delta_rule_backward,
            (q, k, v, g_sum, beta, A, state, torch.ones_like(o), torch.ones_like(final)),
            test_utils=("test_schema", "test_faketensor"),
            **tolerances,
        )


def test_fakes_have_the_shapes_and_types_of_fla():
    B, T, H, K, V = 2, 75, 3, 16, 24
    with FakeTensorMode():
        q, k = (torch.empty(B, T, H, K, dtype=torch.bfloat16) for _ in range(2))
        v = torch.empty(B, T, H, V, dtype=torch.bfloat16)
        g, beta, state = torch.empty(B, T, H), torch.empty(B, T, H), torch.empty(B, H, K, V)
        o, final, g_sum, A = train_gpt.fla_gated_delta_rule(q, k, v, g, beta, state)
        gradients = train_gpt.fla_gated_delta_rule_backward(
            q, k, v, g_sum, beta, A, state, o, final
        )
    facts = [(tuple(x.shape), x.dtype) for x in (o, final, g_sum, A, *gradients)]
    bf16, fp32 = torch.bfloat16, torch.float32
    qk, per_head = ((B, T, H, K), bf16), ((B, T, H), fp32)
    assert facts == [
        ((B, T, H, V), bf16),
        ((B, H, K, V), fp32),
        per_head,
        ((B, T, H, 64), bf16),
        qk,
        qk,
        ((B, T, H, V), bf16),
        per_head,
        per_head,
        ((B, H, K, V), fp32),
    ]


def test_custom_op_compiles_into_one_graph(fla_on_cpu):
    def f(q, k, v, g, beta, state):
        k, g = F.normalize(k, dim=-1), -g.square()
        o, final, _, _ = train_gpt.fla_gated_delta_rule(q * 2, k, v, g, beta, state)
        return o.sin(), final

    inputs = delta_inputs(40)
    compiled = torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same(run_and_differentiate(compiled, inputs), run_and_differentiate(f, inputs), 1e-5)


# ---- window attention


def loop_attention(q, k, v, window, doc):
    """Softmax attention of one token after the other, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    group, doc, rows = q.shape[2] // k.shape[2], doc.tolist(), []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = [j for j in range(q.shape[1]) if 0 <= t - j < window and doc[b][j] == doc[b][t]]
            for h in range(q.shape[2]):
                p = torch.softmax(k[b, seen, h // group] @ q[b, t, h] / q.shape[-1] ** 0.5, 0)
                rows.append(p @ v[b, seen, h // group])
    return torch.stack(rows).view(q.shape)


def attention_inputs(T, H=4, Hkv=2, B=2, D=8):
    q, k, v = (torch.randn(B, T, n, D, requires_grad=True) for n in (H, Hkv, Hkv))
    starts = torch.rand(B, T) < 0.15
    return q, k, v, starts.cumsum(1)


@pytest.mark.parametrize(
    "heads", [(4, 2), (3, 3), (3, 1)], ids=["4/2 heads", "3/3 heads", "3/1 heads"]
)
@pytest.mark.parametrize("window", [1, 5, 24, 1000, sys.maxsize])
@pytest.mark.parametrize("T", [1, 24])
def test_window_attention_equals_the_token_loop(T, window, heads):
    q, k, v, doc = attention_inputs(T, *heads)
    out = window_attention(q, k, v, window, doc, doc.numel())
    reference = loop_attention(q, k, v, window, doc)
    torch.testing.assert_close(out.double(), reference, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(reference)
    gradients = torch.autograd.grad((out * weights.float()).sum(), (q, k, v))
    references = torch.autograd.grad((reference * weights).sum(), (q, k, v))
    for x, y in zip(gradients, references, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 4, 9])
def test_window_attention_sees_exactly_the_window(window):
    q, k, v, doc = attention_inputs(40)
    doc = torch.zeros_like(doc)
    out = window_attention(q, k, v, window, doc, len(doc))
    for j in (0, 17, 39):
        k2, v2 = k.detach().clone(), v.detach().clone()
        k2[:, j], v2[:, j] = torch.randn_like(k2[:, j]), torch.randn_like(v2[:, j])
        moved = (window_attention(q, k2, v2, window, doc, len(doc)) != out).flatten(2).any(2)
        assert moved.all(0).nonzero().flatten().tolist() == list(range(j, min(j + window, 40)))
        assert torch.equal(moved.any(0), moved.all(0))


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    """varlen_attn as torch documents it, by the token loop; a window of -1 has no limit."""
    assert first_parameters(train_gpt.varlen_attn)[:7] == [
        "query",
        "key",
        "value",
        "cu_seq_q",
        "cu_seq_k",
        "max_q",
        "max_k",
    ]
    assert {"window_size", "enable_gqa"} <= set(first_parameters(train_gpt.varlen_attn))

    def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
        assert enable_gqa and cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
        lengths = cu_seq_q.diff()
        assert cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query)
        assert (lengths >= 0).all() and lengths.max() <= max_q
        left, right = window_size
        assert right == 0 and max_q == max_k
        doc = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
        window = left + 1 if left >= 0 else sys.maxsize
        return loop_attention(query[None], key[None], value[None], window, doc)[0]

    monkeypatch.setattr(train_gpt, "varlen_attn", varlen)


@pytest.mark.parametrize("window", [1, 5, 23, 24, 25, sys.maxsize])
def test_packing_for_varlen_attention_equals_the_token_loop(varlen_on_cpu, window):
    q, k, v, doc = attention_inputs(24, B=3)
    for documents in (doc, torch.zeros_like(doc)):
        out = varlen_window_attention(q, k, v, window, documents, count_documents(documents))
        torch.testing.assert_close(out, loop_attention(q, k, v, window, documents))


def test_packing_refuses_more_documents_than_it_has_room_for(varlen_on_cpu):
    q, k, v = (torch.randn(1, 200, 1, 4) for _ in range(3))
    varlen_window_attention(q, k, v, 8, torch.arange(200)[None], 200)
    with pytest.raises(RuntimeError, match="more documents than expected"):
        varlen_window_attention(q, k, v, 8, torch.arange(200)[None], 199)


def test_packing_has_room_for_rows_shorter_than_a_document(varlen_on_cpu):
    q, k, v, doc = attention_inputs(5, B=300)
    out = varlen_window_attention(q, k, v, 8, torch.zeros_like(doc), 300)
    torch.testing.assert_close(out, loop_attention(q, k, v, 8, torch.zeros_like(doc)))


# ---- polar express


def known_spectrum(batch, rows, cols, least=1e-3):
    """U diag(s) V^T, s log-uniform and no less than `least` of the Frobenius norm."""
    n = min(rows, cols)
    U = torch.linalg.qr(torch.randn(*batch, rows, n, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(*batch, cols, n, dtype=torch.float64))[0]
    floor = torch.tensor(least * n**0.5, dtype=torch.float64).log()
    s = (floor * torch.rand(*batch, n, dtype=torch.float64)).exp()
    return U, s, V


@pytest.mark.parametrize(
    "shape",
    [(8, 8), (40, 16), (16, 40), (1, 12), (12, 1), (2, 3, 24, 12), (5, 12, 24)],
    ids=lambda shape: "x".join(map(str, shape)),
)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_polar_express_flattens_the_spectrum(shape, scale):
    U, s, V = known_spectrum(shape[:-2], *shape[-2:])
    G = scale * (U * s.unsqueeze(-2)) @ V.mT
    out = polar_express(G.float())
    assert out.shape == G.shape
    values = torch.linalg.svdvals(out.double())
    assert values.min() > 0.849 and values.max() < 1.151
    between = (
        U.mT @ out.double() @ V
    )  # in the basis of the singular vectors: diagonal, their new values
    diagonal = between.diagonal(dim1=-2, dim2=-1)
    assert (diagonal > 0.849).all() and (diagonal < 1.151).all()
    torch.testing.assert_close(between, torch.diag_embed(diagonal), atol=2e-3, rtol=0)


def test_the_band_of_polar_express_is_tight():
    """From a fine grid of [1e-3, 1] the polynomials go to [0.859, 1.141], to both ends of it."""
    s = torch.logspace(-3, 0, 4001, dtype=torch.float64).clamp(max=1 - 1e-9)
    values = polar_express(torch.diag_embed(torch.stack((s, (1 - s * s).sqrt()), -1)).float())[
        :, 0, 0
    ]
    assert 0.857 < values.min() < 0.862 and 1.138 < values.max() < 1.143


def test_polar_express_of_a_batch_is_that_of_each_matrix():
    G = torch.randn(3, 20, 12)
    singles = torch.stack([polar_express(x) for x in G])
    torch.testing.assert_close(polar_express(G), singles, atol=1e-5, rtol=1e-5)


def test_polar_express_goes_on_after_the_fifth_step():
    """More steps narrow the band, and fewer than five are not yet there."""
    U, s, V = known_spectrum((4,), 16, 16)
    G = ((U * s.unsqueeze(-2)) @ V.mT).float()
    spread = {
        n: (torch.linalg.svdvals(polar_express(G, n)) - 1).abs().max().item() for n in (2, 5, 8)
    }
    assert spread[2] > 0.3 and spread[5] < 0.151 and spread[8] < spread[5]


def test_polar_express_of_zero_is_zero():
    assert torch.equal(polar_express(torch.zeros(2, 8, 12)), torch.zeros(2, 8, 12))


# ---- documents, for fla's convolution


@pytest.mark.parametrize("room", [0, 5])
@pytest.mark.parametrize("share", [0.003, 0.1, 1.0])
def test_chunks_cover_each_document_once_and_nothing_else(share, room):
    B, T = 3, 200
    doc = (torch.rand(B, T) < share).long().cumsum(1)
    lengths = [len(run) for row in doc.tolist() for run in runs(row)]
    bounds = train_gpt.document_bounds(doc, len(lengths) + room)
    assert bounds.diff().tolist() == lengths + [0] * room
    spans = []
    for i, number in train_gpt.conv_chunks(bounds, B * T).tolist():
        start, end = bounds[i] + 64 * number, min(bounds[i] + 64 * number + 64, bounds[i + 1])
        spans += [(start.item(), end.item())] if start < end else []
    assert [place for span in spans for place in range(*span)] == list(range(B * T))
    assert len(spans) == sum(math.ceil(length / 64) for length in lengths)


def runs(row: list[int]) -> list[list[int]]:
    return [list(group) for _, group in itertools.groupby(row)]


# ---- on a GPU


@pytest.mark.cuda
def test_the_convolution_on_the_gpu_equals_the_cpu():
    ids = torch.full((2, 200), BOS_ID + 1)
    ids[0, [0, 1, 64, 66]], ids[1, [3, 131, 199]] = BOS_ID, BOS_ID
    x, dy = torch.randn(2, 200, 96).bfloat16(), torch.randn(2, 200, 96)
    weight, results = torch.randn(96, 4), []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        ctx = train_gpt.make_context(ids.to(device), train_gpt.Hyperparameters(), 20)
        inputs = [x.to(device, dtype).requires_grad_(), weight.to(device).requires_grad_()]
        y = train_gpt.short_conv(*inputs, ctx)
        loss = (y.float() * dy.to(device)).sum()
        results.append([y, *torch.autograd.grad(loss, inputs)])
    for exact, found in zip(*results, strict=True):
        assert rms_ratio(found, exact) < 0.01


@pytest.mark.cuda
@pytest.mark.parametrize(
    "case",
    [dict(T=75), dict(T=64), dict(T=257, resets=(0, 50, 64, 200)), dict(T=130, beta_max=2.0)],
    ids=["T=75", "T=64", "resets", "beta to 2"],
)
def test_fla_on_the_gpu_equals_the_torch_reference(case):
    q, k, v, g, beta, state = delta_inputs(K=64, V=64, **case)
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
    gpu = [x.detach().cuda().requires_grad_() for x in (q, k, v, g, beta, state)]
    reference = [x.detach().double().requires_grad_() for x in (q, k, v, g, beta, state)]
    results = run_and_differentiate(gated_delta_rule, gpu)
    assert results[0].dtype == torch.bfloat16 and results[1].dtype == torch.float32
    assert_same(results, run_and_differentiate(gated_delta_rule, reference), 0.03)


@pytest.mark.cuda
@pytest.mark.parametrize("window", [2, 64, 100, sys.maxsize])
def test_window_attention_on_the_gpu_equals_the_cpu(window):
    T, D = 200, 64
    q, k, v = (torch.randn(2, T, n, D).bfloat16().requires_grad_() for n in (4, 2, 2))
    doc = torch.zeros(2, T, dtype=torch.long)
    doc[0, 70:], doc[1, 1:], doc[1, 150:] = 1, 1, 2
    weights = torch.randn(2, T, 4, D)
    results = {}
    for device in ("cpu", "cuda"):
        inputs = [
            x.detach()
            .to(device, torch.float32 if device == "cpu" else torch.bfloat16)
            .requires_grad_()
            for x in (q, k, v)
        ]
        out = window_attention(*inputs, window, doc.to(device), doc.numel())
        results[device] = [
            out,
            *torch.autograd.grad((out.float() * weights.to(device)).sum(), inputs),
        ]
    for x, y in zip(results["cuda"], results["cpu"], strict=True):
        # bf16 alone makes 0.0043 on a CPU, a window of 99 instead of 100 makes 0.026
        assert rms_ratio(x, y) < 0.011
