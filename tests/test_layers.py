"""Attention with a sink as it is packed for CUDA, and what hybrid_1895 does to weights and bits
before they are quantized. The formulas of both mixers are in test_formulas.py."""

import copy
import inspect

import hybrid_1895
import layers
import numpy as np
import pytest
import torch
from streams import count_documents
from toys import STEP, clipped, in_float64, random_ids, rounded, tiny_of

import train_gpt

# ---- attention with a sink


def attention_with_a_sink(q, k, v, sink, doc):
    """One query after the other: softmax over the sink and the tokens of its document so far."""
    group, out = q.shape[2] // k.shape[2], torch.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        kv, seen = h // group, (doc[b] == doc[b, t]) & (torch.arange(len(doc[b])) <= t)
        keys = torch.cat((sink[kv][None], k[b, seen, kv]))
        shares = (keys @ q[b, t, h] / q.shape[3] ** 0.5).softmax(0)
        out[b, t, h] = shares[1:] @ v[b, seen, kv]  # the sink's value is zero
    return out


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    """varlen_attn with more keys than queries, as FlashAttention has it: the last of both stand at
    the same place."""
    names = [*inspect.signature(train_gpt.varlen_attn).parameters]
    assert names[:7] == "query key value cu_seq_q cu_seq_k max_q max_k".split()

    def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
        assert window_size == (-1, 0) and enable_gqa
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert cu_seq_q[-1] == len(query) and cu_seq_k[-1] == len(key) == len(value)
        assert cu_seq_q.diff().max() <= max_q and cu_seq_k.diff().max() <= max_k
        lengths = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
        parts = zip(
            query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True
        )
        out = []
        for q, k, v in parts:  # [tokens, heads, D]
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
            scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
            scores = scores.masked_fill(~seen, -torch.inf)
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        return torch.cat(out)

    monkeypatch.setattr(train_gpt, "varlen_attn", varlen)


def sink_inputs():
    """Float64 with gradients: q, k, v, sink; and the number of each token's document, some of them
    of one token."""
    ids = random_ids(tiny_of("train_gpt"), B=3, T=14, starts=(4, 5))
    ids[1, 4:6], ids[2, 0] = 9, train_gpt.BOS_ID
    shapes = (3, 14, 4, 8), (3, 14, 2, 8), (3, 14, 2, 8), (2, 8)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return inputs, (ids == train_gpt.BOS_ID).cumsum(1)


@pytest.mark.parametrize("room", [0, 1, 9])
@pytest.mark.parametrize("path", ["masked", "varlen"])
def test_a_sink_is_one_more_key_without_a_value(varlen_on_cpu, path, room):
    """Outputs, and gradients of all inputs; there may be room for more documents."""
    inputs, doc = sink_inputs()
    most, weights = count_documents(doc) + room, torch.randn(3, 14, 4, 8).double()
    y = getattr(layers, f"{path}_sink_attention")(*inputs, doc, most)
    expected = attention_with_a_sink(*inputs, doc)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    found, wanted = (torch.autograd.grad((x * weights).sum(), inputs) for x in (y, expected))
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=0)
    assert found[3].abs().min() > 1e-3


def test_sinks_refuse_more_documents_than_there_is_room_for(varlen_on_cpu):
    inputs, doc = sink_inputs()
    with pytest.raises(RuntimeError, match="more documents than expected"):
        layers.varlen_sink_attention(*inputs, doc, count_documents(doc) - 1)


@pytest.mark.cuda
def test_sinks_on_the_gpu_are_those_of_the_cpu():
    """Also with documents of one token, and room for more of them."""
    q, k, v = (torch.randn(2, 200, n, 64).bfloat16() for n in (4, 2, 2))
    sink, doc = torch.randn(2, 64).bfloat16(), torch.zeros(2, 200, dtype=torch.long)
    doc[0, 70:], doc[1, 1:], doc[1, 150:] = 1, 1, 2
    weights, results = torch.randn(2, 200, 4, 64), []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v, sink)]
        y = layers.sink_attention(*inputs, doc.to(device), 9)
        loss = (y.float() * weights.to(device)).sum()
        results.append([y, *torch.autograd.grad(loss, inputs)])
    for x, y in zip(*results, strict=True):
        assert (x - y.cpu().float()).square().mean() < (0.011 * x).square().mean()


# ---- before quantization

SMALL = dict(layout="G A (A)x2 G", num_heads=4, num_kv_heads=2, parallel_start_layer=2)


def batches_of(hp, *ids):
    return [(torch.tensor(row), None) for row in ids]


@torch.no_grad()
def test_rotated_values_leave_the_function_and_spread_outliers(lively, monkeypatch):
    """In float64, as values and their output projections are rotated in float32."""
    hp = tiny_of("hybrid_1895", **SMALL)
    model = in_float64(monkeypatch, lively(hybrid_1895.GPT(hp)))
    v = model.blocks[1].mixer.v_proj.weight
    v[3] *= 30  # one channel of the first head
    ids, before = random_ids(hp, T=40, starts=(0, 17)), copy.deepcopy(model)
    model.rotate_values()
    torch.testing.assert_close(model(ids), before(ids), atol=1e-11, rtol=0)
    changed = [n for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
               if not torch.equal(p, q)]  # fmt: skip
    assert changed == [f"blocks.{i}.mixer.{x}_proj.weight" for i in (1, 2) for x in "vo"]
    assert v.std(1)[:16].max() < 1.5 * v.std(1)[:16].min()


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_hadamard_matrices(n):
    H = hybrid_1895.hadamard(n)
    torch.testing.assert_close(H @ H, torch.eye(n))
    torch.testing.assert_close(H.abs(), torch.full((n, n), n**-0.5))
    assert torch.equal(H, H.T)


def test_bits_of_frequent_tokens_and_of_outputs_of_attention(lively):
    """At calibration the commonest inputs become the frequent ones; of equals the first."""
    hp = tiny_of("hybrid_1895", **SMALL, frequent_tokens=3)
    model = lively(hybrid_1895.GPT(hp))
    assert model.bits("tok_emb.weight").tolist() == [8, 8, 8] + 61 * [7]
    hessians = model.calibrate(batches_of(hp, [[5, 9, 9, 9]], [[7, 5, 9, 8]]))
    assert hp.is_frequent().nonzero().flatten().tolist() == [5, 7, 9]
    bits = [8 if token in (5, 7, 9) else 7 for token in range(64)]
    assert model.bits("tok_emb.weight").tolist() == bits
    quantized, table = clipped(model, 1.0), model.tok_emb.weight
    assert quantized["tok_emb.weight"][0].abs().amax(1).tolist() == [2 ** (b - 1) - 1 for b in bits]
    largest = {name: q.abs().max().item() for name, (q, _) in quantized.items()}
    outputs = {name for name, value in largest.items() if value == 63}
    assert outputs == {f"blocks.{i}.mixer.o_proj.weight" for i in (1, 2)}
    assert {x for name, x in largest.items() if ".mixer" in name} == {31, 63}
    for quantized in train_gpt.quantize(model, hessians, 1e-6), rounded(model, 1e-6):
        steps = quantized["tok_emb.weight"][1].float()  # at the least clip width
        expected = 6 * table.std(1) / (2.0 ** (torch.tensor(bits) - 1) - 1)
        torch.testing.assert_close(steps, expected, rtol=1e-3, atol=0)


def test_what_is_frequent_is_kept_with_the_artifact(lively, tmp_path):
    """And with what a run keeps before it quantizes: tools/repack.py goes on from hyperparameters,
    weights and Hessians."""
    hp = tiny_of("hybrid_1895", **SMALL, frequent_tokens=3)
    model = lively(hybrid_1895.GPT(hp))
    hessians = model.calibrate(batches_of(hp, [[5, 9, 9, 9]], [[7, 5, 9, 8]]))
    quantized = train_gpt.quantize(model, hessians, STEP)
    train_gpt.save_artifact(tmp_path / "model.ptz", model, hp, quantized)
    loaded, found = train_gpt.load_artifact(
        tmp_path / "model.ptz", "cpu", hybrid_1895.Hyperparameters, hybrid_1895.GPT
    )
    assert found.frequent == hp.frequent and loaded.hp.is_frequent()[[5, 7, 9]].all()
    train_gpt.save_state(tmp_path / "state.pt", hp, model)
    config = torch.load(tmp_path / "state.pt", weights_only=True)["config"]
    again = hybrid_1895.GPT(hybrid_1895.Hyperparameters(**config))
    again.load_state_dict(model.state_dict())
    repacked = train_gpt.quantize(again, hessians, STEP)
    assert all(torch.equal(q, repacked[name][0]) for name, (q, _) in quantized.items())
