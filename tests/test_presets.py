"""What the presets add to the model and its training, against independent truths.

formulas    the whole network written again in float64, one token after the other: shared keys and values, loops,
            instructions, U-Net skips, LN scale, lanes, sparse gates
memory      a text in pieces scores as the text in one piece; gradients against differences of the loss
presets     causality, documents, gradients and parameter counts of each
training    curriculum, loops that begin late, average that begins late; GPTQ of looped blocks by our own hooks
runs        each preset as a user starts it, then its artifact in a new process
"""

import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import brotli
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from corpus import write_corpus, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import train_gpt
from train_gpt import BOS_ID, GPT, PRESETS, Hyperparameters, Muon, parse_layout, stages, token_nats

BARE = dict(ngram_vocab_size=0, smear_dims=0)
GATED = dict(num_heads=4, num_kv_heads=2, attn_gate_dims=5)
PUBLISHED = dict(record=33_862_953, baseline=17_059_912, kv_share=33_909_825, crawler=14_487_088,
                 transformer=35_945_671)  # parameters
SYSTEMS = ["record", "baseline", "kv_share", "pure_gdn", "crawler", "transformer"]


def toy(preset, **changes):
    """The preset at a toy size: its layout and options as they are."""
    hp = Hyperparameters(**PRESETS[preset])
    sizes = {name: value for name, value in TINY.items() if name not in ("layout", "mlp_mult", "grad_accum_steps")}
    sizes |= dict(ngram_vocab_size=hp.ngram_vocab_size and 128, smear_dims=hp.smear_dims and 8, num_heads=4,
                  num_kv_heads=2, train_batch_tokens=3 * 128, inst_dim=hp.inst_dim and 4,
                  grad_accum_steps=3, curriculum=hp.curriculum and "0:1x16 0.15:2x32 0.45:3x64")
    hp = Hyperparameters(**(PRESETS[preset] | sizes | changes))
    hp.validate()
    return hp


def random_ids(hp, B=2, T=48, starts=()):
    """Ordinary tokens, BOS at `starts` of each row."""
    ids = torch.randint(2, hp.vocab_size, (B, T))
    ids[:, list(starts)] = BOS_ID
    return ids


def other(hp, tokens):
    """A different ordinary token for each."""
    return 2 + (tokens - 2 + torch.randint(1, hp.vocab_size - 2, tokens.shape)) % (hp.vocab_size - 2)


# ---- layout

LAYOUTS = {  # (kind, owner, shared) of each block, the order of the passes
    "G": ([("G", 0, "")], [0]),
    "  s2   a ": ([("s", 0, ""), ("s", 1, ""), ("a", 2, "")], [0, 1, 2]),
    "A12": ([("A", i, "") for i in range(12)], [*range(12)]),
    "G S G~0 s~1 g=0": ([("G", 0, ""), ("S", 1, ""), ("G", 0, "~"), ("s", 1, "~"), ("g", 0, "=")], [0, 1, 2, 3, 4]),
    "A S2 A2=0": ([("A", 0, ""), ("S", 1, ""), ("S", 2, ""), ("A", 0, "="), ("A", 0, "=")], [0, 1, 2, 3, 4]),
    "A (G s)x2 A": ([("A", 0, ""), ("G", 1, ""), ("s", 2, ""), ("A", 3, "")], [0, 1, 2, 1, 2, 3]),
    "(A)x9": ([("A", 0, "")], [0] * 9),
    "(G S2)x3 g~0": ([("G", 0, ""), ("S", 1, ""), ("S", 2, ""), ("g", 0, "~")], [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]),
    "a A (A~0 A=0)x2": ([("a", 0, ""), ("A", 1, ""), ("A", 0, "~"), ("A", 0, "=")], [0, 1, 2, 3, 2, 3]),
    "A (A)x2 A2": ([("A", i, "") for i in range(4)], [0, 1, 1, 2, 3]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    assert parse_layout(layout) == LAYOUTS[layout]


@pytest.mark.parametrize("layout", [
    "", "   ", "X", "B2", "G0", "G00", "G100", "G-1", "GS", "5G", "G=", "G~", "G=x", "G=0", "G~0", "G S=0", "G S~0",
    "G G=1", "G G~1", "G G=-1", "G G=0=0", "G G=0~0", "G G~~0", "G G=0 G=1", "G G~0 G~1", "G G~0 G=1", "A g=0", "S A=0",
    "(A)", "(A)x", "(A)x0", "(A)x1", "(A)x10", "(A)xx2", "()x2", "( )x2", "(A x2", "A)x2", "((A)x2)x2", "(A)x2 (A)x2",
    "(A))x2", "2(A)", "(A)3", "A, A", "A;S", "G\x00", "G G=0.", "Ａ", "G²", "(A)x2 G=5", "None", "=0", "~", "()", "(("])
def test_bad_layouts_are_named(layout):
    with pytest.raises(ValueError, match="LAYOUT="):
        parse_layout(layout)
    with pytest.raises(ValueError, match="LAYOUT="):
        Hyperparameters.from_env(dict(PRESET="demo", LAYOUT=layout))


def test_a_layout_with_an_endless_number_is_named():
    with pytest.raises(ValueError, match="LAYOUT="):
        parse_layout("G G=" + "1" * 5000)


@settings(max_examples=400, deadline=None)
@given(st.text("GSAgsa=~()x01239 ", max_size=14) | st.text(max_size=8))
def test_any_text_is_a_layout_or_named(text):
    try:
        blocks, order = parse_layout(text)
    except ValueError as error:
        assert str(error).startswith("LAYOUT=")
        return
    assert blocks and {*order} == {*range(len(blocks))}
    for i, (kind, owner, shared) in enumerate(blocks):
        assert (owner == i) == (shared == "") and owner <= i and blocks[owner][2] == ""
        assert blocks[owner][0].upper() == kind.upper() in "GSA" and shared in ("", "=", "~")


@st.composite
def written_layouts(draw):
    """A layout, and what it means, made together."""
    blocks, order, texts = [], [], []
    sizes = draw(st.sampled_from([(1, 0, 0), (2, 0, 0), (0, 1, 0), (0, 2, 1), (2, 2, 0), (1, 2, 2)]))
    loops = draw(st.integers(2, 9))
    for group, size in enumerate(sizes):
        first, parts = len(blocks), []
        for _ in range(size):
            kind, count = draw(st.sampled_from("GSAgsa")), draw(st.integers(1, 12))
            owners = [i for i, b in enumerate(blocks) if b[2] == "" and b[0].upper() == kind.upper()]
            shared = draw(st.sampled_from("=~")) if owners and draw(st.booleans()) else ""
            owner = draw(st.sampled_from(owners)) if shared else None
            blocks += [(kind, len(blocks) + n if owner is None else owner, shared) for n in range(count)]
            number = str(count) if count > 1 or draw(st.booleans()) else ""
            parts.append(kind + number + (f"{shared}{owner}" if shared else ""))
        if size:
            text = draw(st.sampled_from([" ", "  "])).join(parts)
            texts.append(f"({text})x{loops}" if group == 1 else text)
            order += [*range(first, len(blocks))] * (loops if group == 1 else 1)
    return " ".join(texts), blocks, order


@settings(max_examples=200, deadline=None)
@given(written_layouts())
def test_a_layout_means_what_it_was_written_for(written):
    text, blocks, order = written
    assert parse_layout(text) == (blocks, order)


# ---- formulas: the network again, in float64, one token after the other


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def slow_delta_net(W, n, hp):
    """Gated DeltaNet over one document. W: weights by name; n: [T, D], normalised."""
    d, y = hp.gdn_head_dim, {}
    for name in "qkv":
        x, taps = n @ W(f"{name}_proj.weight").T, W(f"{name}_conv1d")
        rows = [sum(taps[:, 3 - back] * x[t - back] for back in range(min(3, t) + 1)) for t in range(len(x))]
        y[name] = torch.stack([row * sigmoid(row) for row in rows])
    out = torch.zeros(len(n), hp.gdn_heads * d).double()
    for h in range(hp.gdn_heads):
        mine, S = slice(h * d, (h + 1) * d), torch.zeros(d, d).double()
        for t in range(len(n)):
            dt = torch.log(1 + (n[t] @ W("a_proj.weight")[h] + W("dt_bias")[h]).exp())
            beta = sigmoid(n[t] @ W("b_proj.weight")[h]) * (2 if hp.allow_neg_eigval else 1)
            k, q = (y[name][t, mine] / y[name][t, mine].norm() for name in "kq")
            S = (-W("A_log")[h].exp() * dt).exp() * S
            S = S + beta * torch.outer(k, y["v"][t, mine] - S.T @ k)
            gate = n[t] @ W("g_proj.weight")[mine].T
            out[t, mine] = rms(S.T @ q / d**0.5) * W("o_norm") * gate * sigmoid(gate)
    return out @ W("o_proj.weight").T


def slow_attention(W, n, hp, window):
    """Attention over one document, with exclusive values and the sparse gate."""
    d, pairs = hp.head_dim, hp.rope_dims // 2
    frequencies = torch.tensor([hp.rope_base ** (-i / pairs) for i in range(pairs)]).double()

    def turned(x, t):
        z = torch.complex(x[:pairs], x[pairs : 2 * pairs]) * torch.polar(torch.ones(pairs).double(), -t * frequencies)
        return torch.cat((z.real, z.imag, x[2 * pairs :]))

    q, k, v = (n @ W(f"{name}_proj.weight").T for name in "qkv")
    out = torch.zeros(len(n), hp.num_heads * d).double()
    for h in range(hp.num_heads):
        mine = slice(h * d, (h + 1) * d)
        shared = slice(h * hp.num_kv_heads // hp.num_heads * d, (h * hp.num_kv_heads // hp.num_heads + 1) * d)
        for t in range(len(n)):
            seen, query = range(max(0, t - window + 1), t + 1), turned(rms(q[t, mine]), t) * W("q_gain")[h]
            scores = torch.stack([query @ turned(rms(k[j, shared]), j) / d**0.5 for j in seen])
            y = sum(p * v[j, shared] for p, j in zip(scores.softmax(0), seen, strict=True))
            if hp.xsa:
                own = v[t, shared] / v[t, shared].norm()
                y = y - (y @ own) * own
            if hp.attn_gate_dims:
                y = y * sigmoid(W("attn_gate")[h] @ n[t, : hp.attn_gate_dims])
            out[t, mine] = y
    return out @ W("o_proj.weight").T


def slow_embedding(P, hp, ids):
    x = P["tok_emb.weight"][ids]
    if hp.ngram_vocab_size:
        last = hp.ngram_vocab_size - 1
        for t, token in enumerate(ids):
            bigram = 36313 * token ^ 27191 * ids[t - 1]
            trigram = bigram ^ 51497 * ids[t - 2]
            rows = bigram % last if t >= 1 else last, trigram % last if t >= 2 else last
            x[t] += P["ngram.proj.weight"] @ P["ngram.table"][list(rows)].sum(0)
    if hp.smear_dims:
        gate = sigmoid(x[:, : hp.smear_dims] @ P["smear_gate"])
        x[1:] += P["smear_lambda"] * gate[1:, None] * x[:-1].clone()
    return rms(x)


def slow_model(model, hp, blocks, order, ids):
    """Logits of one document, a list of ids, by the passes of `order` through blocks as in LAYOUTS."""
    P = {name: p.detach().double() for name, p in model.state_dict().items()}
    looped = [i for i in range(len(blocks)) if LAYOUTS[hp.layout][1].count(i) > 1]
    x = x0 = slow_embedding(P, hp, ids)
    lane, skips, half, loop = None, [], len(order) // 2, 0
    for step, i in enumerate(order):
        kind, owner, shared = blocks[i]
        c = 1 / math.sqrt(i + 1) if hp.ln_scale else 1.0
        if hp.parallel_start_layer and i >= hp.parallel_start_layer and lane is None:
            lane = x  # before the skip, which is for the other lane only
        if hp.unet_skips and half <= step < 2 * half:
            weight, gate = P["skips"][:, step - half]
            x = (1 - sigmoid(gate)) * weight * skips.pop() + sigmoid(gate) * x
        if hp.inst_dim and looped and i == looped[0]:
            x = x + x @ P["inst_in.weight"].T @ P[f"inst_out.{loop}.weight"].T
            loop += 1

        def W(name, i=i, owner=owner, shared=shared):
            lent = shared == "=" or shared == "~" and re.match("[kv]_(proj|conv1d)", name)
            return P[f"blocks.{owner if lent else i}.mixer.{name}"]

        def mlp(x, i=i, c=c):
            up = c * rms(x) @ P[f"blocks.{i}.mlp.up_proj.weight"].T
            out = torch.where(up > 0, up, up / 2).square() @ P[f"blocks.{i}.mlp.down_proj.weight"].T
            return P[f"blocks.{i}.mlp_scale"] * out

        u = P[f"blocks.{i}.resid_mix"][0] * x + P[f"blocks.{i}.resid_mix"][1] * x0
        window = hp.window_size if kind in "Ss" else len(ids)
        mixed = slow_delta_net(W, c * rms(u), hp) if kind in "Gg" else slow_attention(W, c * rms(u), hp, window)
        mixed = P[f"blocks.{i}.mixer_scale"] * mixed
        if lane is None:
            x = u + mixed
            x = x + mlp(x) if kind.isupper() else x
        else:
            out = mlp(lane) if kind.isupper() else 0
            (r0, p00, p10), (r1, p01, p11) = P[f"blocks.{i}.lanes"]
            x, lane = r0 * x + p00 * mixed + p10 * out, r1 * lane + p01 * mixed + p11 * out
        if hp.unet_skips and step < half:
            skips.append(x)
    x = x if lane is None else (x + lane) / 2
    return hp.logit_softcap * torch.tanh(rms(x) @ P["tok_emb.weight"].T / hp.logit_softcap)


FORMULAS = {
    "keys and values": dict(layout="G S G~0 s~1 g=0"),
    "no MLP": dict(layout="  s2   a ", rope_dims=16),
    "loop": dict(layout="A (G s)x2 A", allow_neg_eigval=True),
    "instructions": dict(layout="A (G s)x2 A", inst_dim=4),
    "instructions and skips": dict(layout="(G S2)x3 g~0", inst_dim=4, unet_skips=True) | BARE,
    "odd skips": dict(layout="A (A)x2 A2", unet_skips=True),
    "LN scale": dict(layout="G S G~0 s~1 g=0", ln_scale=True),
    "sparse gate": dict(layout="a A (A~0 A=0)x2", ln_scale=True) | GATED,
    "sparse gate without XSA": dict(layout="  s2   a ", xsa=False) | GATED,
    "lanes": dict(layout="A (A)x2 A2", parallel_start_layer=2, ln_scale=True) | GATED,
    "lanes without an MLP": dict(layout="G S G~0 s~1 g=0", parallel_start_layer=1),
    "lanes and loop": dict(layout="A (G s)x2 A", parallel_start_layer=1, ln_scale=True),
    "lanes and skips": dict(layout="A (A)x2 A2", parallel_start_layer=2, unet_skips=True, ln_scale=True) | GATED,
}


@pytest.mark.parametrize("looping", [True, False], ids=["looping", "once"])
@pytest.mark.parametrize("name", FORMULAS)
@torch.no_grad()
def test_the_model_is_its_formula(tiny, lively, name, looping):
    hp = tiny(**FORMULAS[name] | dict(window_size=6))
    model = lively(GPT(hp))
    model.order = model.orders[looping]
    blocks, order = LAYOUTS[hp.layout]
    ids = random_ids(hp, B=1, T=20, starts=(0, 8))
    documents = ids[0, :8].tolist(), ids[0, 8:].tolist()
    order = order if looping else [*range(len(blocks))]
    expected = torch.cat([slow_model(model, hp, blocks, order, document) for document in documents])
    torch.testing.assert_close(model(ids)[0].double(), expected, atol=2e-4, rtol=2e-4)


def test_the_new_parameters_start_as_stated(tiny):
    hp = tiny(layout="A (A)x2 A2", parallel_start_layer=2, unet_skips=True, inst_dim=4, **GATED)
    model = GPT(hp)
    assert model.skips.shape == (2, 2, 32) and (model.skips[0] == 1).all() and (model.skips[1] == 0).all()
    assert [block.lanes is None for block in model.blocks] == [True, True, False, False]
    for block in model.blocks[2:]:
        assert torch.equal(block.lanes, torch.tensor([[1.1, 1, 1], [1.1, 1, 1]]))
    assert all((block.mixer.attn_gate == 0).all() and block.mixer.attn_gate.shape == (4, 5) for block in model.blocks)
    assert len(model.inst_out) == 2 and all((out.weight == 0).all() for out in model.inst_out)
    torch.testing.assert_close(model.inst_in.weight @ model.inst_in.weight.T, torch.eye(4), atol=1e-5, rtol=0)


# ---- memory

MEMORIES = {
    "G": dict(layout="G"), "S": dict(layout="S"), "G2 bare": dict(layout="G2", **BARE),
    "window 1": dict(layout="S2", window_size=1), "window 2": dict(layout="S g", window_size=2, allow_neg_eigval=True),
    "no smear": dict(layout="g S", smear_dims=0), "no n-grams": dict(layout="g S", ngram_vocab_size=0),
    "shared": dict(layout="G S G~0 s~1 g=0"), "A": dict(layout="A2 S"),
    "loop": dict(layout="A (G s)x2 A", inst_dim=4, unet_skips=True, ln_scale=True),
    "lanes": dict(layout="S (A)x2 G A", parallel_start_layer=2, unet_skips=True, **GATED),
}


def in_chunks(model, ids, chunk):
    """Logits of ids, their memory carried from chunk to chunk; and the memory."""
    memory = model.new_memory(len(ids))
    return torch.cat([model(part, memory) for part in ids.split(chunk, 1)], 1), memory


def packed_ids(hp, T=70):
    """Rows that begin with BOS, inside a document, and with BOS at, before and behind borders of chunks."""
    ids = random_ids(hp, B=4, T=T)
    for row, starts in enumerate([(0, 7, 8, 30), (), (6, 21, 63, 64), (1, 2, 20, 42, 62, 69)]):
        ids[row, [start for start in starts if start < T]] = BOS_ID
    return ids


@pytest.mark.parametrize("name, looping", [*((name, True) for name in MEMORIES), ("loop", False), ("lanes", False)])
@torch.no_grad()
def test_a_text_in_chunks_is_the_text(tiny, lively, monkeypatch, name, looping):
    """In float64, but for angles, decay and logits: float32 rounds the same sums in another order."""
    monkeypatch.setattr(train_gpt, "COMPUTE_DTYPE", torch.float64)
    hp = tiny(eval_seq_len=70, **MEMORIES[name])
    model = lively(GPT(hp)).double()
    model.order = model.orders[looping]
    ids = packed_ids(hp)
    whole = model(ids)
    for chunk in (1, 3, 7, 64, 70):
        logits, memory = in_chunks(model, ids, chunk)
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
        assert [m.shape for m in memory] == [m.shape for m in model.new_memory(4)]


@pytest.mark.parametrize("name", ["shared", "loop", "lanes"])
@torch.no_grad()
def test_memory_is_true_in_float32_too(tiny, lively, name):
    hp = tiny(eval_seq_len=70, **MEMORIES[name])
    model = lively(GPT(hp))
    ids = packed_ids(hp)
    for chunk in (7, 64):
        torch.testing.assert_close(in_chunks(model, ids, chunk)[0], model(ids), atol=3e-4, rtol=0)


@torch.no_grad()
def test_memory_of_full_attention_is_a_window_of_eval_seq_len(tiny, lively):
    """Token by token, A is S whose window is as long as its memory."""
    hp = tiny(layout="A2", eval_seq_len=16)
    model, windowed = lively(GPT(hp)), GPT(tiny(layout="S2", window_size=16))
    windowed.load_state_dict(model.state_dict())
    ids = packed_ids(hp, T=50)
    logits = in_chunks(model, ids, 1)[0]
    torch.testing.assert_close(logits, windowed(ids), atol=3e-4, rtol=0)
    assert (logits - model(ids))[1, 40:].abs().max() > 0.01


@pytest.mark.parametrize("name", MEMORIES)
@torch.no_grad()
def test_the_past_matters_until_bos_and_not_behind_it(tiny, lively, name):
    hp = tiny(eval_seq_len=70, **MEMORIES[name])
    model = lively(GPT(hp))
    past, future = random_ids(hp, T=30), random_ids(hp, T=20)
    pasts = past, other(hp, past)
    one, two = (in_chunks(model, torch.cat((p, future), 1), 30)[0][:, 30:] for p in pasts)
    if hp.window_size > 1:
        assert ((one - two)[:, :2].abs().amax((-1, -2)) > 1e-3).all()
    future[:, 0] = BOS_ID
    one, two = (in_chunks(model, torch.cat((p, future), 1), 30)[0][:, 30:] for p in pasts)
    assert torch.equal(one, two)
    assert torch.equal(one, in_chunks(model, future, 20)[0])


def test_no_gradient_reaches_the_chunk_before(tiny, lively):
    hp = tiny(eval_seq_len=70, **MEMORIES["loop"])
    model, seen = lively(GPT(hp)), []
    model.tok_emb.register_forward_hook(lambda module, args, out: (out.retain_grad(), seen.append(out))[0])
    memory = model.new_memory(2)
    for part in random_ids(hp, T=20).split(10, 1):
        logits = model(part, memory)
        assert not any(m.requires_grad for m in memory)
    logits.square().sum().backward()
    assert seen[0].grad is None and (seen[1].grad[:, -10:].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", ["shared", "loop", "lanes"])
def test_chunked_gradients_are_differences_of_the_chunks_losses(tiny, lively, monkeypatch, name):
    """Truncated backpropagation: memory is a constant, so each chunk's loss may be moved by hand; in float64."""
    monkeypatch.setattr(train_gpt, "COMPUTE_DTYPE", torch.float64)
    hp = tiny(**MEMORIES[name])
    model = lively(GPT(hp)).double()
    batch = [(random_ids(hp, T=24, starts=(13,)), random_ids(hp, T=24)) for _ in range(2)]
    loss = train_gpt.accumulate(model, train_gpt.scorer(model), batch, 8)
    whole = torch.stack([token_nats(model, x, y) for x, y in batch]).mean()
    assert loss.item() == pytest.approx(whole.item(), abs=1e-5)
    parameters = list(model.parameters())
    untruncated, pieces = torch.autograd.grad(whole, parameters), []
    with torch.no_grad():
        for x, y in batch:
            memory = model.new_memory(len(x))
            for a, b in zip(x.split(8, 1), y.split(8, 1), strict=True):
                pieces.append((a, b, [m.clone() for m in memory]))
                model(a, memory)

        def moved(step):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=step)
            total = sum(token_nats(model, a, b, list(memory)).double().sum() for a, b, memory in pieces)
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=step)
            return total.item() / (2 * 2 * 24)

        def along(gradients):
            return sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()

        apart = []
        for _ in range(4):
            direction = [torch.randn_like(p) for p in parameters]
            slope, scale = (moved(1e-4) - moved(-1e-4)) / 2e-4, sum(p.grad.square().sum() for p in parameters).sqrt()
            assert along([p.grad for p in parameters]) == pytest.approx(slope, abs=0.005 * scale.item())
            apart.append(abs(along(untruncated) - slope) / scale.item())
        assert max(apart) > 0.02


def test_a_chunk_as_long_as_the_row_is_plain_backpropagation(tiny, lively):
    hp = tiny(layout="G S A")
    model = lively(GPT(hp))
    batch = [(random_ids(hp, T=24), random_ids(hp, T=24)) for _ in range(3)]
    loss = train_gpt.accumulate(model, train_gpt.scorer(model), batch, 24)
    whole = torch.stack([token_nats(model, x, y) for x, y in batch]).mean()
    torch.testing.assert_close(loss, whole.detach())
    for p, grad in zip(model.parameters(), torch.autograd.grad(whole, list(model.parameters())), strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)


# ---- presets


@pytest.mark.parametrize("preset", SYSTEMS)
@torch.no_grad()
def test_a_preset_sees_no_later_token_and_no_other_document(lively, preset):
    hp = toy(preset)
    model = lively(GPT(hp))
    ids = random_ids(hp, T=50, starts=(0, 20))
    logits = model(ids)
    for j in (1, 16, 21, 33, 49):
        changed = ids.clone()
        changed[:, j:] = other(hp, ids[:, j:].clamp_min(2))
        moved = model(changed)
        assert torch.equal(moved[:, :j], logits[:, :j]), f"a token from {j} on moved an earlier logit"
        assert ((moved - logits)[:, j].abs().amax(-1) > 1e-3).all()
    changed = ids.clone()
    changed[:, :20] = other(hp, ids[:, :20].clamp_min(2))  # also one that began before the row
    assert torch.equal(model(changed)[:, 20:], logits[:, 20:])
    torch.testing.assert_close(model(ids[:, 20:]), logits[:, 20:], atol=5e-4, rtol=0)


@pytest.mark.parametrize("preset", SYSTEMS)
def test_every_parameter_of_a_preset_learns_within_two_steps(preset):
    hp = toy(preset)
    model, reached = GPT(hp), set()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, nats_of = Muon(model, hp), train_gpt.scorer(model)
    for _, micro_steps, chunk in (stages(hp)[0], stages(hp)[-1]):
        ids = random_ids(hp, B=4 * micro_steps, T=65, starts=(30,))
        batch = [(x[:, :-1], x[:, 1:]) for x in ids.split(4)]
        train_gpt.accumulate(model, nats_of, batch, chunk)
        reached |= {name for name, p in model.named_parameters() if p.grad.abs().max() > 0}
        optimizer.step(1.0, 0.95)
    assert reached == set(start)
    assert not [name for name, p in model.named_parameters() if torch.equal(p, start[name])]
    assert optimizer.reached() == len(start)


def test_a_step_before_the_loop_begins(tiny):
    """Skips of passes to come have no part in it, and must not stop it."""
    hp = tiny(layout="A (A)x2 A", unet_skips=True, enable_looping_at=0.35)
    model, ids = GPT(hp), random_ids(hp, T=33)
    model.order = model.orders[0]
    train_gpt.accumulate(model, train_gpt.scorer(model), [(ids[:, :-1], ids[:, 1:])], 32)
    assert math.isfinite(Muon(model, hp).step(1.0, 0.95))


@pytest.mark.parametrize("name, changes", [
    ("INST_DIM", dict(layout="A (A)x2 A", inst_dim=4, enable_looping_at=0.35)),
    ("INST_DIM", dict(layout="A", inst_dim=4)),
    ("UNET_SKIPS", dict(layout="A", unet_skips=True)),
    ("ENABLE_LOOPING_AT", dict(layout="A2", enable_looping_at=0.35)),
    ("GPTQ_PHASES", dict(layout="A2", gptq_phases=2)),
    ("PARALLEL_START_LAYER", dict(layout="A2", parallel_start_layer=2)),
], ids=["instructions before the loop", "instructions without a loop", "nothing to skip", "nothing to loop",
        "nothing to collect again", "nothing in lanes"])
def test_parameters_that_no_gradient_would_reach_are_refused(tiny, name, changes):
    with pytest.raises(ValueError, match=name):
        tiny(**changes)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(preset):
    with torch.device("meta"):
        model = GPT(Hyperparameters(**PRESETS[preset]))
    assert abs(sum(p.numel() for p in model.parameters()) / PUBLISHED[preset] - 1) < 0.01


def test_shared_keys_and_values_are_stored_once(lively, tmp_path):
    hp = toy("kv_share")
    model = lively(GPT(hp))
    train_gpt.save_artifact(tmp_path / "model.ptz", model, hp)
    raw = brotli.decompress((tmp_path / "model.ptz").read_bytes()[56:])
    names = [name for name, *_ in json.loads(raw[4 : 4 + int.from_bytes(raw[:4], "little")])["tensors"]]
    # a block: 7 projections, 3 convolutions, 3 vectors, 2 of the MLP, 3 scales; a follower has 4 of another
    assert len(names) == len({*names}) == 5 * 18 + 5 * 14 + 5
    assert not [name for name in names if re.match(r"blocks\.[13579]\.mixer\.[kv]_", name)]
    loaded, _ = train_gpt.load_artifact(tmp_path / "model.ptz", "cpu")
    for i in range(0, 10, 2):
        owner, follower = loaded.blocks[i].mixer, loaded.blocks[i + 1].mixer
        for name in ("k_proj", "v_proj", "k_conv1d", "v_conv1d"):
            assert getattr(owner, name) is getattr(follower, name)
        for name in ("q_proj", "g_proj", "o_proj", "q_conv1d"):
            assert getattr(owner, name) is not getattr(follower, name)
    ids = random_ids(hp)
    assert torch.equal(loaded(ids), train_gpt.dequantized(model, train_gpt.quantize(model, hp))(ids))


@torch.no_grad()
def test_chunks_of_a_length_share_one_graph(tiny):
    """Memory comes back laid out as it went in: a second graph a chunk would near the limit of recompilations."""
    torch._dynamo.reset()
    hp = tiny(layout="G A (S g)x2 S", window_size=6)
    model, graphs = GPT(hp), CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=False)
    memory = model.new_memory(2)
    for chunk in random_ids(hp, B=2, T=64).split(16, 1):
        compiled(chunk, memory)
    assert graphs.frame_count == 1


# ---- training


@pytest.mark.parametrize("curriculum, plan", [
    ("", [(0, 3, 64)]), ("0:1x64", [(0, 1, 64)]),
    ("0:1x16 0.15:2x32 .45:3x64", [(0, 1, 16), (0.15, 2, 32), (0.45, 3, 64)]),
    ("  0:3x1   0.999:1x2 ", [(0, 3, 1), (0.999, 1, 2)]), ("0.0:2x64", [(0, 2, 64)]),
    *((bad, None) for bad in (
        "1", "x", "0", "0:1", "0:x64", "0:1x", ":1x64", "0:1x64,0.5:2x64", "0:0x64", "0:4x64", "0:-1x64", "0:1x0",
        "0:1x48", "0:1x128", "0:1.5x64", "0.1:1x64", "1:1x64", "0:1x64 1.5:2x64", "0:1x64 1:2x64", "-0.1:1x64",
        "0:1x64 0.5:2x64 0.2:1x64", "0:1x64 0.5", "0:1x64 0.5:2x64 y", "0:1x64 0.5:1x64 0.5:2x64", "nan:1x64", " ",
        "0:1x" + "9" * 5000)),
], ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_a_curriculum_is_its_stages_or_named(tiny, curriculum, plan):
    hp = tiny(curriculum=curriculum, grad_accum_steps=3, train_batch_tokens=3 * 64)
    if plan:
        assert stages(hp) == plan
    else:
        with pytest.raises(ValueError, match="CURRICULUM="):
            stages(hp)


def snapshot(model):
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def train(hp, tmp_path, monkeypatch):
    """train() on random tokens: what each step had (looping, chunk, inputs), the weights behind it, the audit."""
    tokens = np.random.default_rng(0).integers(2, hp.vocab_size, 9000)
    tokens[::70] = BOS_ID
    write_shard(tmp_path / "fineweb_train_000000.bin", tokens)
    model, steps = GPT(hp), []
    weights = [snapshot(model)]
    accumulate, step = train_gpt.accumulate, Muon.step

    def spied_accumulate(model, nats_of, batch, chunk):
        steps.append((model.order == model.orders[1], chunk, [x.clone() for x, _ in batch]))
        return accumulate(model, nats_of, batch, chunk)

    def spied_step(optimizer, *args):
        norm = step(optimizer, *args)
        weights.append(snapshot(model))
        return norm

    monkeypatch.setattr(train_gpt, "accumulate", spied_accumulate)
    monkeypatch.setattr(Muon, "step", spied_step)
    monkeypatch.setattr(train_gpt, "validate", lambda *_, **__: dict(val_bpb=1.0))
    audit = train_gpt.Audit()
    train_gpt.train(hp, model, train_gpt.TokenStream(str(tmp_path), "train", hp.vocab_size), None, audit)
    return SimpleNamespace(steps=steps, start=weights[0], weights=weights[1:], model=model, audit=audit.checks,
                           text=tokens)


@pytest.mark.parametrize("share, first", [(0.0, 0), (0.35, 4), (0.5, 5), (1.0, 10)])
def test_a_loop_begins_with_its_share_of_the_run(tiny, tmp_path, monkeypatch, share, first):
    hp = tiny(layout="S (G)x2 S", iterations=10, warmup_steps=0, enable_looping_at=share, unet_skips=True)
    run = train(hp, tmp_path, monkeypatch)
    assert [looping for looping, *_ in run.steps] == first * [False] + (10 - first) * [True]
    assert run.model.order == run.model.orders[1] and all(check["passed"] for check in run.audit.values())


def test_a_curriculum_is_followed_and_skips_no_token(tiny, tmp_path, monkeypatch):
    hp = tiny(layout="G S", iterations=10, warmup_steps=0, grad_accum_steps=3, train_batch_tokens=3 * 128,
              curriculum="0:1x16 0.2:2x32 0.45:3x64")
    run = train(hp, tmp_path, monkeypatch)
    plan = [(chunk, len(batch)) for _, chunk, batch in run.steps]
    assert plan == 2 * [(16, 1)] + 3 * [(32, 2)] + 5 * [(64, 3)]
    read = torch.cat([x.flatten() for *_, batch in run.steps for x in batch]).numpy()
    assert np.array_equal(read, run.text[: 23 * 128])
    assert run.audit["schedule"]["tokens_read"] == 23 * 128 + hp.gptq_calibration_batches * 3 * 128
    assert all(check["passed"] for check in run.audit.values())


@pytest.mark.parametrize("start", [0.0, 0.55, 0.9, 1.0])
def test_the_average_begins_with_its_share_of_the_run(tiny, tmp_path, monkeypatch, start):
    hp = tiny(layout="S", iterations=10, warmup_steps=0, ema_decay=0.6, ema_start=start)
    run = train(hp, tmp_path, monkeypatch)
    expected = run.start
    for t, raw in enumerate(run.weights):
        decay = min(0.6, (1 + t) / (10 + t)) if t / 10 >= start else 0.0
        expected = {name: decay * expected[name] + (1 - decay) * raw[name] for name in raw}
    for name, p in run.model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), expected[name], atol=1e-6, err_msg=name)
        assert np.array_equal(p.detach().numpy(), run.weights[-1][name]) == (start == 1)
    assert all(check["passed"] for check in run.audit.values())  # an average that begins too late is no failure


# ---- GPTQ

QUANT = dict(layout="A (G s)x2 A", inst_dim=4, matrix_bits=6, loop_bits=8, embed_bits=5, matrix_clip_sigmas=1.5,
             mlp_clip_sigmas=2.0, embed_clip_sigmas=2.5)


def is_looped(name):
    return name.startswith(("blocks.1.", "blocks.2.", "inst_"))


def outer_products(model, batches):
    """X^T X of the inputs of each linear layer, in float64, by our own hooks."""
    names, sums = {id(p): name for name, p in model.named_parameters()}, {}

    def add(module, args):
        X, name = args[0].detach().flatten(0, -2).double(), names[id(module.weight)]
        sums[name] = sums.get(name, 0) + X.T @ X

    handles = [m.register_forward_pre_hook(add) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("options", [FORMULAS["keys and values"], QUANT], ids=["shared", "looped"])
def test_hessians_are_sums_over_all_uses(tiny, lively, options):
    """Both blocks' inputs of shared keys, all passes of a loop."""
    hp = tiny(**options)
    model = lively(GPT(hp))
    batches = [(random_ids(hp, T=40, starts=(17,)), None) for _ in range(2)]
    hessians, expected = train_gpt.collect_hessians(model, batches), outer_products(model, batches)
    for name in hessians.keys() - {"ngram.table"}:
        torch.testing.assert_close(hessians[name].double(), expected[name], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("with_hessians", [True, False], ids=["GPTQ", "rounding"])
def test_bits_and_sigmas_of_each_tensor(tiny, lively, with_hessians):
    """One sigma or two clip: the largest value of a tensor is all that its bits can hold."""
    hp = tiny(**QUANT)
    model = lively(GPT(hp))
    batches = [(random_ids(hp, T=40), None) for _ in range(3)]
    hessians = train_gpt.collect_hessians(model, batches) if with_hessians else None
    quantized, params = train_gpt.quantize(model, hp, hessians), dict(model.named_parameters())
    seen = set()
    for name, (q, scale) in quantized.items():
        bits, sigmas = (8 if is_looped(name) else 6), (2.0 if ".mlp." in name else 1.5)
        if name in ("tok_emb.weight", "ngram.table"):
            bits, sigmas = 5, 2.5
        seen.add((bits, sigmas))
        assert q.abs().max() == 2 ** (bits - 1) - 1, name
        expected = sigmas * params[name].detach().double().numpy().std(1, ddof=1) / (2 ** (bits - 1) - 1)
        np.testing.assert_allclose(scale.double().numpy(), expected, rtol=1e-3, err_msg=name)
    assert seen == {(8, 2.0), (8, 1.5), (6, 2.0), (6, 1.5), (5, 2.5)}


def test_a_second_phase_sees_the_looped_blocks_behind_quantized_ones(tiny, lively):
    hp = tiny(**QUANT)
    model = lively(GPT(hp))
    batches = [(random_ids(hp, T=40, starts=(17,)), None) for _ in range(3)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = train_gpt.collect_hessians(model, batches)
    second = train_gpt.loop_aware_hessians(model, hp, first, batches)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    shipped = copy.deepcopy(model)
    for name, p in shipped.named_parameters():
        if name in first and not is_looped(name):
            q, scale = train_gpt.quantize(model, hp, first)[name]
            p.data = q.float() * scale.float()[:, None]
        elif name not in first:
            p.data = p.data.half().float()
    expected = outer_products(shipped, batches)
    assert second.keys() == first.keys()
    for name in first:
        if is_looped(name):
            size = expected[name].norm()
            assert (second[name] - expected[name]).norm() < 2e-3 * size, name
            assert (second[name] - first[name]).norm() > 2e-2 * size, name
        else:
            assert torch.equal(second[name], first[name]), name


# ---- runs

SMALL = dict(
    MODEL_DIM="32", GDN_HEADS="2", GDN_HEAD_DIM="16", NUM_HEADS="2", NUM_KV_HEADS="1", HEAD_DIM="16", WINDOW_SIZE="24",
    ROPE_DIMS="8", TRAIN_SEQ_LEN="64", TRAIN_BATCH_TOKENS="384", GRAD_ACCUM_STEPS="3", EVAL_SEQ_LEN="64",
    EVAL_STRIDE="32", VAL_BATCH_SIZE="4096", ITERATIONS="12", WARMUP_STEPS="1", MAX_WALLCLOCK_SECONDS="0",
    EVAL_CHUNK="16", EVAL_ROWS="4", TTT_CHUNK_TOKENS="128", TTT_LORA_RANK="4", GPTQ_CALIBRATION_BATCHES="4",
    TIED_EMBED_INIT_STD="0.05", ARTIFACT="model.ptz", RUN_ID="run")
NGRAMS = dict(NGRAM_VOCAB_SIZE="256", NGRAM_DIM="16")
RUNS = dict(
    record=NGRAMS, baseline=dict(ROPE_DIMS="16"), kv_share=NGRAMS, crawler=NGRAMS | dict(INST_DIM="4"), transformer={},
    pure_gdn=dict(CURRICULUM="0:1x16 0.15:2x32 0.45:3x64"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Environment that names a tiny corpus."""
    facts = write_corpus(tmp_path_factory.mktemp("corpus"), train_tokens=12_000, val_tokens=700)
    return {name.upper(): str(value) for name, value in facts.items()}


def start(folder: Path, **env) -> str:
    """What a run of train_gpt.py prints."""
    inherited = {k: v for k, v in os.environ.items() if k.lower() not in vars(Hyperparameters())}
    env = inherited | env | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], cwd=folder, env=env, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout


@pytest.mark.parametrize("preset", RUNS)
def test_a_run_of_a_preset_and_its_artifact(corpus, tmp_path, preset):
    log = start(tmp_path, PRESET=preset, **(SMALL | RUNS[preset] | corpus))
    checks = json.loads(log.splitlines()[-1].removeprefix("audit: "))
    assert len(checks) >= 15 and all(check["passed"] for check in checks.values())
    # progress is n/12: two steps of one micro-batch, four of two, six of three
    micro_batches = 2 * 1 + 4 * 2 + 6 * 3 if preset == "pure_gdn" else 12 * 3
    assert checks["schedule"]["tokens_read"] == 128 * (micro_batches + 4 * 3)
    enabled = re.findall(r"layer_loop:enabled step:(\d+) frac:\S+ passes:(.*)", log)
    passes = "[0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]"
    assert enabled == ([("5", passes)] if preset == "transformer" else [])
    if preset == "pure_gdn":
        assert re.findall(r"warmup_step:1/1 .*chunk:(\d+)", log) == ["16", "32", "64"]
    final = r"final_int\d_(sliding_window|stream)\w*_exact .*"
    bpb = re.search(final, log)[0]
    assert ("_ttt_" in bpb) == (preset in ("record", "kv_share", "transformer"))
    again = start(tmp_path, EVAL_ONLY="1", ARTIFACT="model.ptz", RUN_ID="again")
    assert re.search(final, again)[0] == bpb
    submission = json.loads((tmp_path / "submission.json").read_text())
    assert f"val_bpb:{submission['own_text']['val_bpb']:.8f}" == bpb.split()[-1]
