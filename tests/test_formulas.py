"""The network written again from its formulas, one document, one token after the other, in float64:
layers, then the whole of each system.

The model is compared twice: with all its arithmetic in float64, to 1e-9; and in float32, as it
runs, to 2e-4.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import documents, in_float64, random_ids, system, tiny_of

import train_gpt
from train_gpt import GPT, make_context


def context(ids, hp):
    return make_context(ids, hp)


def by_document(ids, x, f):
    """f over the documents of x: [B, T, ...], put together again."""
    parts = [[f(x[b, start:end]) for start, end in documents(row)] for b, row in enumerate(ids)]
    return torch.stack([torch.cat(row) for row in parts])


def weights_of(module):
    """name -> weight, in float64."""
    values = {name: p.detach().double() for name, p in module.state_dict().items()}
    return values.__getitem__


# ---- formulas


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def silu(x):
    return x * sigmoid(x)


def positive(x):
    return torch.where(x > 0, x + 1, x.exp())


def slow_conv(x, taps, activation=silu):
    """x: [T, n] of one document; taps: [n, size], the last of the token itself."""
    rows, last = [], taps.shape[1] - 1
    for t in range(len(x)):
        row = sum(taps[:, last - back] * x[t - back] for back in range(min(last, t) + 1))
        rows.append(activation(row))
    return torch.stack(rows)


def slow_delta_net(W, n, hp):
    """Gated DeltaNet over one document. W: weights by name; n: [T, D], normalised. Queries and keys
    of hybrid_1895 are positive."""
    d, y, group = hp.gdn_head_dim, {}, hp.gdn_heads // hp.gdn_key_heads
    for name in "qkv":
        activation = positive if hp.system == "hybrid_1895" and name != "v" else silu
        y[name] = slow_conv(n @ W(f"{name}_proj.weight").T, W(f"{name}_conv1d"), activation)
    out = torch.zeros(len(n), hp.gdn_heads * d).double()
    for h in range(hp.gdn_heads):
        mine, S = slice(h * d, (h + 1) * d), torch.zeros(d, d).double()
        shared = slice(h // group * d, (h // group + 1) * d)
        for t in range(len(n)):
            dt = torch.log(1 + (n[t] @ W("a_proj.weight")[h] + W("dt_bias")[h]).exp())
            beta = sigmoid(n[t] @ W("b_proj.weight")[h])
            k, q = (y[name][t, shared] / y[name][t, shared].norm() for name in "kq")
            S = (-W("A_log")[h].exp() * dt).exp() * S
            S = S + beta * torch.outer(k, y["v"][t, mine] - S.T @ k)
            gate = n[t] @ W("g_proj.weight")[mine].T
            o = S.T @ q / d**0.5
            o = rms(o) * W("o_norm") if getattr(hp, "o_norm", True) else o
            out[t, mine] = o * silu(gate)
    return out @ W("o_proj.weight").T


def slow_attention(W, n, hp, window, gated=False, sink=False):
    """Attention over one document, the outputs of heads gated, and a key without a value, if a
    system has these."""
    d, pairs = hp.head_dim, hp.rope_dims // 2
    frequencies = [hp.rope_base ** (-i / pairs) for i in range(pairs)]
    frequencies = torch.tensor(frequencies, dtype=torch.float64)

    def turned(x, t):
        z = torch.complex(x[:pairs], x[pairs : 2 * pairs])
        z = z * torch.polar(torch.ones(pairs).double(), -t * frequencies)
        return torch.cat((z.real, z.imag, x[2 * pairs :]))

    q, k, v = (n @ W(f"{name}_proj.weight").T for name in "qkv")
    out = torch.zeros(len(n), hp.num_heads * d).double()
    for h in range(hp.num_heads):
        kv = h // (hp.num_heads // hp.num_kv_heads)
        mine, shared = slice(h * d, (h + 1) * d), slice(kv * d, (kv + 1) * d)
        keys = [turned(rms(k[t, shared]), t) for t in range(len(n))]
        for t in range(len(n)):
            seen = range(max(0, t - window + 1), t + 1)
            query = turned(rms(q[t, mine]), t) * W("q_gain")[h]
            scores = [query @ keys[j] / d**0.5 for j in seen]
            scores += [query[hp.rope_dims :] @ W("sink")[kv] / d**0.5] if sink else []
            shares = torch.stack(scores).softmax(0)[: len(seen)]
            y = sum(p * v[j, shared] for p, j in zip(shares, seen, strict=True))
            if hp.xsa:
                own = v[t, shared] / v[t, shared].norm()
                y = y - (y @ own) * own
            if gated:
                y = y * sigmoid(W("attn_gate")[h] @ n[t, : hp.attn_gate_dims])
            out[t, mine] = y
    return out @ W("o_proj.weight").T


def slow_ngrams(table, ids):
    """Sum of the two rows of each token of one document, looked up with Python's integers."""
    last, rows = len(table) - 1, []
    for t, token in enumerate(ids):
        bigram = 36313 * token ^ 27191 * ids[t - 1] if t >= 1 else None
        trigram = bigram ^ 51497 * ids[t - 2] if t >= 2 else None
        keys = [last if key is None else key % last for key in (bigram, trigram)]
        rows.append(table[keys].sum(0))
    return torch.stack(rows)


LENT = "k_proj.weight", "v_proj.weight", "k_conv1d", "v_conv1d"  # within a pair
HAS = dict(  # what a system adds
    train_gpt=(),
    layouts=(),
    pure_gdn=(),
    baseline=("skips",),
    gdn_hybrid=("n-grams",),
    kv_share=("n-grams", "pairs"),
    crawler=("n-grams", "skips", "LN scale", "instructions"),
    transformer=("skips", "LN scale", "gate", "lanes"),
    hybrid_1895=("skips", "LN scale", "sink", "side by side"),
)


def slow_model(name, model, hp, blocks, order, ids):
    """Logits of one document, a list of ids, by the passes of `order` through `blocks`."""
    P, has = weights_of(model), HAS[name]
    x = P("tok_emb.weight")[ids]
    if "n-grams" in has and hp.ngram_vocab_size:
        x = x + slow_ngrams(P("ngram.table"), ids) @ P("ngram.proj.weight").T
    if getattr(hp, "smear_dims", 0):
        gate = sigmoid(x[:, : hp.smear_dims] @ P("smear_gate"))
        before = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
        x = x + P("smear_lambda") * gate[:, None] * before
    x = x0 = rms(x)
    lane, skips, half, loops = None, [], len(order) // 2, 0
    for step, i in enumerate(order):
        kind, owner = blocks[i]
        c = 1 / math.sqrt(i + 1) if "LN scale" in has else 1.0
        if "lanes" in has and lane is None and 0 < hp.parallel_start_layer <= i:
            lane = x  # before the skip, which is for the other lane only
        if "skips" in has and half <= step < 2 * half:
            weight, gate = P("skips")[:, step - half]
            x = (1 - sigmoid(gate)) * weight * skips.pop() + sigmoid(gate) * x
        if "instructions" in has and i == min(j for j in order if order.count(j) > 1):
            x = x + x @ P("inst_in.weight").T @ P(f"inst_out.{loops}.weight").T
            loops += 1

        def W(part, i=i, owner=owner):
            lender = i - i % 2 if "pairs" in has and part in LENT else owner
            return P(f"blocks.{lender}.mixer.{part}")

        def mlp(x, i=i, c=c):
            up = c * rms(x) @ P(f"blocks.{i}.mlp.up_proj.weight").T
            hidden = torch.where(up > 0, up, up / 2).square()
            return P(f"blocks.{i}.mlp_scale") * (hidden @ P(f"blocks.{i}.mlp.down_proj.weight").T)

        u = P(f"blocks.{i}.resid_mix")[0] * x + P(f"blocks.{i}.resid_mix")[1] * x0
        if kind == "G":
            mixed = slow_delta_net(W, c * rms(u), hp)
        else:
            window = hp.window_size if kind == "S" else len(ids)
            mixed = slow_attention(W, c * rms(u), hp, window, "gate" in has, "sink" in has)
        mixed = P(f"blocks.{i}.mixer_scale") * mixed
        if lane is not None:
            out, ((a, b, c), (d, e, f)) = mlp(lane), P(f"blocks.{i}.lanes")
            x, lane = a * x + b * mixed + c * out, d * lane + e * mixed + f * out
        elif "side by side" in has and 0 < hp.parallel_start_layer <= i:
            x = u + mixed + mlp(u)
        else:
            x = u + mixed
            if not (name == "crawler" and kind == "G"):
                x = x + mlp(x)
        skips += [x] if step < half else []
    x = x if lane is None else (x + lane) / 2
    logits = rms(x) @ P("tok_emb.weight").T
    return hp.logit_softcap * torch.tanh(logits / hp.logit_softcap)


# ---- layers


def test_short_conv_is_its_formula(tiny):
    hp = tiny()
    ids, x = random_ids(hp, T=40, starts=(0, 1, 2, 4, 7, 20)), torch.randn(2, 40, 24)
    weight = torch.randn(24, 4)
    expected = by_document(ids, x.double(), lambda d: slow_conv(d, weight.double()))
    found = F.silu(train_gpt.short_conv(x, weight, context(ids, hp)))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)

    def conv1d(d):
        y = F.conv1d(F.pad(d.T[None], (3, 0)), weight.double()[:, None], groups=24)[0].T
        return y * sigmoid(y)

    torch.testing.assert_close(by_document(ids, x.double(), conv1d), expected)


@pytest.mark.parametrize("vocab_size", [64, 65_536])
@pytest.mark.parametrize("rows", [2, 127, 3072])
def test_the_ngram_lookup_is_that_of_pythons_integers(vocab_size, rows):
    hp = system("kv_share").Hyperparameters(
        vocab_size=vocab_size, ngram_vocab_size=rows, ngram_dim=16, model_dim=32
    )
    ngram = system("parts").NgramEmbedding(hp)
    nn.init.normal_(ngram.table)
    ids = random_ids(hp, T=40, starts=(0, 1, 2, 4, 7, 20))
    ids[:, 30:34] = vocab_size - 1
    W = weights_of(ngram)
    rows = by_document(ids, ids, lambda document: slow_ngrams(W("table"), document.tolist()))
    found = ngram(ids, context(ids, hp)).double()
    torch.testing.assert_close(found, rows @ W("proj.weight").T, atol=1e-5, rtol=1e-5)


def test_gated_delta_net_is_its_formula(tiny, lively, monkeypatch):
    hp = tiny(layout="G", gdn_heads=6, gdn_key_heads=3)
    layer = lively(GPT(hp)).blocks[0].mixer
    W = weights_of(layer)
    ids, x = random_ids(hp, T=50, starts=(0, 1, 9, 33)), torch.randn(2, 50, hp.model_dim)
    expected = by_document(ids, x.double(), lambda d: slow_delta_net(W, d, hp))
    y, _ = layer(x, 50, context(ids, hp), None)
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-4)
    y, _ = in_float64(monkeypatch, layer)(x.double(), 50, context(ids, hp), None)
    torch.testing.assert_close(y, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("xsa", [True, False], ids=["xsa", "no xsa"])
@pytest.mark.parametrize("kind, window", [("S", 6), ("A", 50)])
def test_attention_is_its_formula(tiny, lively, monkeypatch, kind, window, xsa):
    hp = tiny(layout=kind, window_size=6, num_heads=4, num_kv_heads=2, xsa=xsa)
    layer = lively(GPT(hp)).blocks[0].mixer
    W = weights_of(layer)
    ids, x = random_ids(hp, T=50, starts=(0, 1, 9, 33)), torch.randn(2, 50, hp.model_dim)
    expected = by_document(ids, x.double(), lambda d: slow_attention(W, d, hp, window))
    y, state = layer(x, 50, context(ids, hp), None)
    assert state is None
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-4)
    y, _ = in_float64(monkeypatch, layer)(x.double(), 50, context(ids, hp), None)
    torch.testing.assert_close(y, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("xsa", [True, False], ids=["xsa", "no xsa"])
@torch.no_grad()
def test_exclusive_attention_is_orthogonal_to_its_own_value(tiny, lively, xsa):
    hp = tiny(layout="S", num_heads=4, num_kv_heads=2, xsa=xsa)
    model, seen = lively(GPT(hp)), {}
    mixer = model.blocks[0].mixer
    mixer.o_proj.register_forward_pre_hook(lambda module, args: seen.update(y=args[0]))
    mixer.v_proj.register_forward_hook(lambda module, args, out: seen.update(v=out))
    model(random_ids(hp))
    y, v = (seen[name].unflatten(-1, (-1, hp.head_dim)) for name in ("y", "v"))
    own = F.normalize(v.repeat_interleave(2, 2), dim=-1)  # heads 0 and 1 share one, 2 and 3
    along = (y * own).sum(-1)
    assert along.abs().max() < 1e-5 if xsa else along.abs().mean() > 0.1


# ---- models


def own(kinds):
    """Blocks with mixers of their own."""
    return [(kind, i) for i, kind in enumerate(kinds)]


GROUPS = dict(num_heads=4, num_kv_heads=2)
MODELS = {  # system, options, (kind, owner) of each block, order of the passes
    "record": ("train_gpt", {}, own("GGSGS"), [0, 1, 2, 3, 4]),
    "all kinds": (
        "layouts",
        dict(layout="G S A G S=1", logit_softcap=2.0) | GROUPS,
        [*own("GSAG"), ("S", 1)],
        [0, 1, 2, 3, 4],
    ),
    "bare": (
        "train_gpt",
        dict(layout="S G", xsa=False, rope_dims=0, mlp_mult=3.0, gdn_heads=3, gdn_key_heads=3),
        own("SG"),
        [0, 1],
    ),
    "whole heads turned": ("train_gpt", dict(layout="S A2", rope_dims=16), own("SAA"), [0, 1, 2]),
    "loop": ("layouts", dict(layout="A (G S)x2 A"), own("AGSA"), [0, 1, 2, 1, 2, 3]),
    "loop of lent mixers": (
        "layouts",
        dict(layout="A G (A=0 G=1)x2"),
        [*own("AG"), ("A", 0), ("G", 1)],
        [0, 1, 2, 3, 2, 3],
    ),
    "baseline": ("baseline", dict(layout="A4", rope_dims=16) | GROUPS, own("AAAA"), [0, 1, 2, 3]),
    "odd passes": ("baseline", dict(layout="A5"), own("AAAAA"), [0, 1, 2, 3, 4]),
    "pure_gdn": ("pure_gdn", dict(layout="G2 S") | GROUPS, own("GGS"), [0, 1, 2]),
    "kv_share": ("kv_share", dict(layout="G4"), own("GGGG"), [0, 1, 2, 3]),
    "kv_share without n-grams": (
        "kv_share",
        dict(layout="G2", ngram_vocab_size=0),
        own("GG"),
        [0, 1],
    ),
    "kv_share without a SmearGate": (
        "kv_share",
        dict(layout="G4"),
        own("GGGG"),
        [0, 1, 2, 3],
    ),
    "crawler": ("crawler", dict(layout="A (A G)x2 A"), own("AAGA"), [0, 1, 2, 1, 2, 3]),
    "crawler that begins with its loop": (
        "crawler",
        dict(layout="(G S2)x3 A") | GROUPS,
        own("GSSA"),
        [0, 1, 2, 0, 1, 2, 0, 1, 2, 3],
    ),
    "crawler of lent mixers": (
        "crawler",
        dict(layout="A G (A=0 G=1)x2"),
        [*own("AG"), ("A", 0), ("G", 1)],
        [0, 1, 2, 3, 2, 3],
    ),
    "transformer": (
        "transformer",
        dict(layout="A (A)x2 A2", parallel_start_layer=2) | GROUPS,
        own("AAAA"),
        [0, 1, 1, 2, 3],
    ),
    "transformer in one lane": (
        "transformer",
        dict(layout="A S (A=0)x2", parallel_start_layer=0, xsa=False) | GROUPS,
        [*own("AS"), ("A", 0)],
        [0, 1, 2, 2],
    ),
    "lanes of two blocks, even passes": (
        "transformer",
        dict(layout="A (S)x3 A S", parallel_start_layer=2),
        own("ASAS"),
        [0, 1, 1, 1, 2, 3],
    ),
    "lanes with a delta rule": (
        "transformer",
        dict(layout="G (S)x2 G A", parallel_start_layer=2),
        own("GSGA"),
        [0, 1, 1, 2, 3],
    ),
    "gdn_hybrid": (
        "gdn_hybrid",
        dict(layout="G S G S=1", rope_dims=16) | GROUPS,
        [*own("GSG"), ("S", 1)],
        [0, 1, 2, 3],
    ),
    "hybrid_1895": (
        "hybrid_1895",
        dict(layout="G A (A)x2 A G", parallel_start_layer=3, gdn_heads=4, gdn_key_heads=2) | GROUPS,
        own("GAAAG"),
        [0, 1, 2, 2, 3, 4],
    ),
    "hybrid_1895, other convolutions": (
        "hybrid_1895",
        dict(layout="A (G A=0)x2", parallel_start_layer=0, conv_size=3, o_norm=True, xsa=False),
        [*own("AG"), ("A", 0)],
        [0, 1, 2, 1, 2],
    ),
}
LATE = "transformer", "hybrid_1895"  # systems whose loop begins late
ONCE = [name for name, (which, *_) in MODELS.items() if which in LATE]


@pytest.mark.parametrize(
    "name, looping", [*((name, True) for name in MODELS), *((name, False) for name in ONCE)]
)
@torch.no_grad()
def test_the_model_is_its_formula(lively, monkeypatch, name, looping):
    which, options, blocks, order = MODELS[name]
    hp = tiny_of(which, **dict(window_size=6) | options)
    model = lively(system(which).GPT(hp))
    if not looping:  # before ENABLE_LOOPING_AT
        model.set_looping(False)
        order = [*range(len(blocks))]
    ids = random_ids(hp, T=30, starts=(0, 1, 9))

    def slow(document):
        return slow_model(which, model, hp, blocks, order, document.tolist())

    expected = by_document(ids, ids, slow)
    logits = model(ids)
    assert logits.dtype == torch.float32 and torch.equal(model.eval()(ids), model.train()(ids))
    torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=2e-4)
    targets = torch.randint(hp.vocab_size, ids.shape)
    nats = -torch.log_softmax(expected, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(model(ids, targets).double(), nats, atol=2e-4, rtol=2e-4)
    logits = in_float64(monkeypatch, model)(ids).double()
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
