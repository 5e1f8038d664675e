"""The model against independent truths.

causality, documents   by perturbation: what must not see a changed token keeps its logits bit for bit
reach                  what must see it does, exactly as far as the window allows
position               a document scores the same wherever it stands in a row; the order of its tokens counts
layers                 short convolution, n-gram lookup, SmearGate, attention, Gated DeltaNet and the whole
                       network, written again from their formulas, document by document, in float64
parameters             count, sharing, starting values, gradients
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_gpt
from train_gpt import BOS_ID, GPT, Hyperparameters, Muon, make_context, parse_layout, token_nats

LAYOUTS = ["G", "S", "A", "G S G S=1", "G2 S G S=2"]


def random_ids(hp, B=2, T=64, starts=()):
    """Ordinary tokens, BOS at 0 and at `starts` of each row."""
    ids = torch.randint(2, hp.vocab_size, (B, T))
    ids[:, [0, *starts]] = BOS_ID
    return ids


def other(hp, tokens):
    """A different ordinary token for each."""
    return 2 + (tokens - 2 + torch.randint(1, hp.vocab_size - 2, tokens.shape)) % (hp.vocab_size - 2)


def documents(row):
    """(start, end) of each document of a row of ids."""
    starts = [i for i, t in enumerate(row.tolist()) if i == 0 or t == BOS_ID]
    return list(zip(starts, [*starts[1:], len(row)], strict=True))


def context(ids, hp, dtype=torch.float32):
    return make_context(ids, hp.rope_dims, hp.rope_base, dtype)


# ---- causality, documents, reach


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_depend_on_no_later_token(tiny, lively, layout):
    hp = tiny(layout=layout)
    model = lively(GPT(hp))
    ids = random_ids(hp, T=80, starts=(45,))
    logits = model(ids)
    for k in (1, 2, 15, 16, 17, 31, 32, 33, 44, 45, 46, 63, 64, 79):
        changed = ids.clone()
        changed[:, k:] = other(hp, ids[:, k:].clamp_min(2))
        moved = model(changed)
        assert torch.equal(moved[:, :k], logits[:, :k]), f"a token from {k} on moved an earlier logit"
        assert (moved[:, k] != logits[:, k]).any(-1).all()
    changed = ids.clone()
    changed[:, 50] = BOS_ID  # a document that starts later
    assert torch.equal(model(changed)[:, :50], logits[:, :50])
    for k in (1, 2, 3, 33, 46):  # later tokens that are not there at all
        torch.testing.assert_close(model(ids[:, :k]), logits[:, :k], atol=1e-4, rtol=0)


def test_gradients_reach_no_later_embedding(tiny, lively):
    hp = tiny(layout="G S A G S=1")
    model = lively(GPT(hp))
    seen = []
    model.tok_emb.register_forward_hook(lambda module, args, out: (out.retain_grad(), seen.append(out))[0])
    ids = random_ids(hp)
    for t in (0, 31, 32, 63):
        seen.clear()
        model(ids)[:, t].square().sum().backward()
        influence = seen[0].grad.abs().sum(-1)
        assert (influence[:, : t + 1] > 0).all() and (influence[:, t + 1 :] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_documents_do_not_see_each_other(tiny, lively, layout):
    """Every token of a document, its last ones too, through state, convolutions, attention and lookups."""
    hp = tiny(layout=layout)
    model = lively(GPT(hp))
    starts = (20, 21, 29, 50)
    ids = random_ids(hp, B=1, T=80, starts=starts)
    ranges = documents(ids[0])
    changes = [(start, end, range(start + 1, end)) for start, end in ranges]  # all of a document
    changes += [(start, end, [end - n]) for start, end in ranges for n in (1, 2, 3) if end - n > start]
    batch = ids.repeat(len(changes), 1)
    for row, (_, _, positions) in zip(batch, changes, strict=True):
        row[list(positions)] = other(hp, row[list(positions)])
    logits, moved = model(ids.expand_as(batch)), model(batch)
    for row, (start, end, positions) in enumerate(changes):
        for a, b in ((0, start), (end, 80)):
            assert torch.equal(moved[row, a:b], logits[row, a:b])
        if len(positions):
            assert (moved[row, start:end] - logits[row, start:end]).abs().max() > 0.01


def test_the_decay_at_a_document_start_leaves_nothing():
    """In float64, where the rest of the earlier document would show if it were above 1e-16 of a write."""
    q, k, v = (F.normalize(torch.randn(1, 70, 2, 16, dtype=torch.float64), dim=-1) for _ in range(3))
    g, beta = -0.01 * torch.rand(1, 70, 2, dtype=torch.float64), torch.rand(1, 70, 2, dtype=torch.float64)
    for start in (1, 20, 32, 69):
        g2 = g.clone()
        g2[:, start] = train_gpt.RESET_LOG_DECAY
        packed, _ = train_gpt.gated_delta_rule(q, k, v, g2, beta)
        alone, _ = train_gpt.gated_delta_rule(*(x[:, start:] for x in (q, k, v, g2, beta)))
        torch.testing.assert_close(packed[:, start:], alone, atol=1e-13, rtol=0)


@torch.no_grad()
def test_rows_do_not_see_each_other(tiny, lively):
    hp = tiny(layout="G S A")
    model = lively(GPT(hp))
    ids = random_ids(hp, B=3)
    changed = ids.clone()
    changed[1] = other(hp, ids[1].clamp_min(2))
    assert torch.equal(model(changed)[[0, 2]], model(ids)[[0, 2]])


@pytest.mark.parametrize("layout, influence", [("G", 1e-6), ("A", 1e-4), ("S G", 1e-6)])
@torch.no_grad()
def test_the_last_token_hears_the_first(tiny, lively, layout, influence):
    """Through the mixer alone: no n-gram, no SmearGate; farther than convolution and window reach."""
    hp = tiny(layout=layout, ngram_vocab_size=0, smear_dims=0)
    model = lively(GPT(hp))
    ids = random_ids(hp)
    changed = ids.clone()
    changed[:, 1] = other(hp, ids[:, 1])
    assert ((model(changed) - model(ids))[:, -1].abs().amax(-1) > influence).all()


@pytest.mark.parametrize("layers, window", [(1, 1), (1, 16), (2, 9), (3, 9), (3, 16)])
@torch.no_grad()
def test_windows_reach_exactly_layers_times_window_minus_1(tiny, lively, layers, window):
    hp = tiny(layout=f"S{layers}", window_size=window, ngram_vocab_size=0, smear_dims=0, xsa=False)
    model = lively(GPT(hp))
    ids = random_ids(hp)
    for j in (5, 30):
        changed = ids.clone()
        changed[:, j] = other(hp, ids[:, j])
        moved = (model(changed) != model(ids)).any(-1).any(0).nonzero().flatten()
        assert moved.tolist() == list(range(j, min(64, j + layers * (window - 1) + 1)))


# ---- position


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_document_scores_the_same_at_any_place(tiny, lively, layout):
    hp = tiny(layout=layout)
    model = lively(GPT(hp))
    document = random_ids(hp, B=1, T=40)
    alone = model(document)
    for offset in (1, 7, 31, 32, 100):
        row = torch.cat((random_ids(hp, B=1, T=offset), document), 1)
        torch.testing.assert_close(model(row)[:, offset:], alone, atol=5e-4, rtol=0)


@pytest.mark.parametrize("rope_dims, heard", [(8, True), (16, True), (0, False)])
@torch.no_grad()
def test_attention_hears_the_order_of_tokens_by_rotary_alone(tiny, lively, rope_dims, heard):
    hp = tiny(layout="A", rope_dims=rope_dims, ngram_vocab_size=0, smear_dims=0)
    model = lively(GPT(hp))
    ids = random_ids(hp)
    swapped = ids.clone()
    swapped[:, [3, 40]] = ids[:, [40, 3]]
    difference = (model(swapped) - model(ids))[:, -1].abs().max()
    assert difference > 1e-3 if heard else difference < 1e-5


def test_rotary_turns_each_pair_by_position_times_its_frequency(tiny):
    """The product of a rotated query and key as complex numbers give it: a function of the distance alone."""
    hp = tiny(rope_dims=8, rope_base=100.0)
    ctx = context(random_ids(hp, B=1), hp, torch.float64)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    rows = [train_gpt.rotary(x.expand(1, 64, 2, 16), ctx)[0, :, 1] for x in (q, k)]
    scores = rows[0] @ rows[1].T
    pairs = torch.complex(q[:4], q[4:8]) * torch.complex(k[:4], k[4:8]).conj()
    for i in range(0, 64, 7):
        for j in range(0, 64, 5):
            turns = torch.tensor([(i - j) * 100.0 ** (-n / 4) for n in range(4)], dtype=torch.float64)
            expected = (pairs * torch.polar(torch.ones_like(turns), -turns)).real.sum() + q[8:] @ k[8:]
            assert abs(scores[i, j] - expected) < 1e-4


# ---- layers, written again from their formulas, in float64


def f64(p):
    return p.detach().double()


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def silu(x):
    return x / (1 + (-x).exp())


def slow_conv(x, weight):
    """x: [T, n] of one document."""
    y = F.conv1d(F.pad(x.T[None], (3, 0)), f64(weight)[:, None], groups=x.shape[1])[0].T
    return silu(y)


def slow_delta_net(m, x, hp):
    """Gated DeltaNet over one document, x: [T, D], one token after the other."""
    q, k, v = (slow_conv(x @ f64(proj.weight).T, conv) for proj, conv in (
        (m.q_proj, m.q_conv1d), (m.k_proj, m.k_conv1d), (m.v_proj, m.v_conv1d)))
    d, outputs = hp.gdn_head_dim, []
    for h in range(hp.gdn_heads):
        qh, kh, vh = (y[:, h * d : (h + 1) * d] for y in (q, k, v))
        dt = (1 + (x @ f64(m.a_proj.weight)[h] + f64(m.dt_bias)[h]).exp()).log()
        decay = (-f64(m.A_log)[h].exp() * dt).exp()
        beta = (2 if hp.allow_neg_eigval else 1) / (1 + (-(x @ f64(m.b_proj.weight)[h])).exp())
        S, rows = torch.zeros(d, d, dtype=torch.float64), []
        for t in range(len(x)):
            key, query = kh[t] / kh[t].norm(), qh[t] / qh[t].norm()
            S = decay[t] * S
            S = S + beta[t] * torch.outer(key, vh[t] - S.T @ key)
            rows.append(S.T @ query / d**0.5)
        gate = silu(x @ f64(m.g_proj.weight)[h * d : (h + 1) * d].T)
        outputs.append(rms(torch.stack(rows)) * f64(m.o_norm) * gate)
    return torch.cat(outputs, -1) @ f64(m.o_proj.weight).T


def slow_attention(m, x, hp, window):
    """Attention over one document, x: [T, D], one head and token after the other."""
    d, outputs = hp.head_dim, []
    for h in range(hp.num_heads):
        kv = h // (hp.num_heads // hp.num_kv_heads)
        q = rms(x @ f64(m.q_proj.weight)[h * d : (h + 1) * d].T)
        k = rms(x @ f64(m.k_proj.weight)[kv * d : (kv + 1) * d].T)
        v = x @ f64(m.v_proj.weight)[kv * d : (kv + 1) * d].T
        n, rows = hp.rope_dims // 2, []
        for t in range(len(x)):
            seen, scores = range(max(0, t - window + 1), t + 1), []
            for j in seen:
                angle = torch.tensor([(t - j) * hp.rope_base ** (-i / n) for i in range(n)]).double()
                (q1, q2), (k1, k2) = q[t, : 2 * n].view(2, n), k[j, : 2 * n].view(2, n)
                rotated = ((q1 * k1 + q2 * k2) * angle.cos() + (q2 * k1 - q1 * k2) * angle.sin()).sum()
                scores.append((rotated + q[t, 2 * n :] @ k[j, 2 * n :]) * f64(m.q_gain)[h] / d**0.5)
            y = torch.softmax(torch.stack(scores), 0) @ v[list(seen)]
            own = v[t] / v[t].norm()
            rows.append(y - (y @ own) * own if hp.xsa else y)
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, -1) @ f64(m.o_proj.weight).T


def slow_ngram_rows(table, tokens):
    """Sum of the two rows of each token of one document, looked up with Python's integers."""
    last, rows = len(table) - 1, []
    for t, token in enumerate(tokens):
        bigram = 36313 * token ^ 27191 * tokens[t - 1] if t >= 1 else None
        trigram = bigram ^ 51497 * tokens[t - 2] if t >= 2 else None
        rows.append(sum(table[last if index is None else index % last] for index in (bigram, trigram)))
    return torch.stack(rows)


def slow_model(model, hp, document):
    """The logits of one document, ids [T], in float64."""
    x = f64(model.tok_emb.weight)[document]
    if hp.ngram_vocab_size:
        rows = slow_ngram_rows(f64(model.ngram.table), document.tolist())
        x = x + rows @ f64(model.ngram.proj.weight).T
    if hp.smear_dims:
        gate = torch.sigmoid(x[:, : hp.smear_dims] @ f64(model.smear_gate))
        previous = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
        x = x + f64(model.smear_lambda) * gate[:, None] * previous
    x = x0 = rms(x)
    for block, (kind, *_) in zip(model.blocks, parse_layout(hp.layout)[0], strict=True):
        x = f64(block.resid_mix[0]) * x + f64(block.resid_mix[1]) * x0
        if kind == "G":
            y = slow_delta_net(block.mixer, rms(x), hp)
        else:
            y = slow_attention(block.mixer, rms(x), hp, hp.window_size if kind == "S" else len(x))
        x = x + f64(block.mixer_scale) * y
        up = rms(x) @ f64(block.mlp.up_proj.weight).T
        hidden = torch.where(up > 0, up, up / 2) ** 2
        x = x + f64(block.mlp_scale) * (hidden @ f64(block.mlp.down_proj.weight).T)
    logits = rms(x) @ f64(model.tok_emb.weight).T
    return hp.logit_softcap * torch.tanh(logits / hp.logit_softcap)


def by_document(ids, x, f):
    """f over the documents of x: [B, T, ...], put together again."""
    return torch.stack([torch.cat([f(x[b, start:end]) for start, end in documents(row)])
                        for b, row in enumerate(ids)])


def test_short_conv_equals_conv1d_of_each_document(tiny):
    hp = tiny()
    weight = torch.randn(24, 4)
    ids, x = random_ids(hp, T=40, starts=(1, 2, 4, 7, 20)), torch.randn(2, 40, 24)
    expected = by_document(ids, x.double(), lambda d: slow_conv(d, weight))
    found = train_gpt.short_conv(x, weight, context(ids, hp))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab_size", [64, 65_536])
@pytest.mark.parametrize("rows", [2, 127, 3072])
def test_ngram_lookup_equals_pythons_integers(tiny, vocab_size, rows):
    hp = tiny(vocab_size=vocab_size, ngram_vocab_size=rows)
    ngram = train_gpt.NgramEmbedding(hp)
    nn.init.normal_(ngram.table)
    ids = random_ids(hp, T=40, starts=(1, 2, 4, 7, 20))
    ids[:, 30:34] = vocab_size - 1
    rows = by_document(ids, ids, lambda document: slow_ngram_rows(f64(ngram.table), document.tolist()))
    expected = rows @ f64(ngram.proj.weight).T
    torch.testing.assert_close(ngram(ids, context(ids, hp)).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("allow_neg_eigval", [False, True], ids=["beta to 1", "beta to 2"])
def test_gated_delta_net_equals_its_formula(tiny, lively, allow_neg_eigval):
    hp = tiny(layout="G", allow_neg_eigval=allow_neg_eigval, gdn_heads=3)
    layer = lively(GPT(hp)).blocks[0].mixer
    ids, x = random_ids(hp, T=50, starts=(1, 9, 33)), torch.randn(2, 50, hp.model_dim)
    expected = by_document(ids, x.double(), lambda d: slow_delta_net(layer, d, hp))
    torch.testing.assert_close(layer(x, context(ids, hp)).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("xsa", [True, False], ids=["xsa", "no xsa"])
@pytest.mark.parametrize("kind, window", [("S", 6), ("A", 50)])
def test_attention_equals_its_formula(tiny, lively, kind, window, xsa):
    hp = tiny(layout=kind, window_size=6, num_heads=4, num_kv_heads=2, xsa=xsa)
    layer = lively(GPT(hp)).blocks[0].mixer
    ids, x = random_ids(hp, T=50, starts=(1, 9, 33)), torch.randn(2, 50, hp.model_dim)
    expected = by_document(ids, x.double(), lambda d: slow_attention(layer, d, hp, window))
    torch.testing.assert_close(layer(x, context(ids, hp)).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [
    dict(), dict(layout="G S A G S=1", num_heads=4, num_kv_heads=2, allow_neg_eigval=True, logit_softcap=2.0),
    dict(layout="S G", ngram_vocab_size=0, smear_dims=0, xsa=False, rope_dims=0, mlp_mult=3.0),
], ids=["default", "all options", "bare"])
def test_whole_model_equals_its_formula(tiny, lively, options):
    hp = tiny(**options)
    model = lively(GPT(hp))
    ids = random_ids(hp, T=50, starts=(1, 9, 33))
    expected = by_document(ids, ids, lambda document: slow_model(model, hp, document))
    logits = model(ids)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=2e-4)
    targets = torch.randint(hp.vocab_size, ids.shape)
    nats = -torch.log_softmax(expected, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(token_nats(model, ids, targets).double(), nats, atol=2e-4, rtol=2e-4)
    assert torch.equal(model.eval()(ids), model.train()(ids))


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
    along = (y * F.normalize(v.repeat_interleave(2, 2), dim=-1)).sum(-1)  # of heads 0, 1 and of heads 2, 3
    assert along.abs().max() < 1e-5 if xsa else along.abs().mean() > 0.1


# ---- parameters


def test_every_parameter_starts_as_stated(tiny):
    torch.manual_seed(1)
    hp = tiny(layout="G40 S", gdn_heads=4, num_heads=4, qk_gain_init=5.0, tied_embed_init_std=0.005)
    parameters = dict(GPT(hp).named_parameters())
    claimed = set()

    def all_of(*ends):
        found = {name: p.detach() for name, p in parameters.items() if name.endswith(ends)}
        assert found, ends
        claimed.update(found)
        return found.values()

    for p in all_of("o_proj.weight", "down_proj.weight", "ngram.table", "smear_gate", "smear_lambda"):
        assert (p == 0).all()
    for p in all_of("q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight", "up_proj.weight",
                    "ngram.proj.weight"):
        tall = p if p.shape[0] >= p.shape[1] else p.T
        torch.testing.assert_close(tall.T @ tall, torch.eye(tall.shape[1]), atol=1e-5, rtol=0)
    for p in all_of("_scale", "o_norm"):
        assert (p == 1).all()
    for p in all_of("resid_mix"):
        assert (p[0] == 1).all() and (p[1] == 0).all()
    for p in all_of("q_gain"):
        assert (p == 5).all()
    for p in all_of("conv1d"):
        assert p.abs().max() <= 0.5 and p.std() > 0.25
    for p in all_of("a_proj.weight", "b_proj.weight"):
        assert p.abs().max() <= 32**-0.5 and p.std() > 0.07
    (embedding,) = all_of("tok_emb.weight")
    assert abs(embedding.std() / 0.005 - 1) < 0.1
    A = torch.cat(list(all_of("A_log"))).exp()
    assert A.min() >= 1 and A.max() <= 16 and A.min() < 2.5 and A.max() > 14.5 and abs(A.mean() - 8.5) < 1.2
    dt = F.softplus(torch.cat(list(all_of("dt_bias"))).double())
    assert dt.min() > 0.999e-3 and dt.max() < 1.001e-1
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.35  # uniform in the logarithm
    assert claimed == set(parameters)


def test_every_parameter_has_its_kind_and_an_unknown_one_raises(tiny):
    model = GPT(tiny(layout="G S A"))
    kinds = model.kinds
    assert list(kinds) == [name for name, _ in model.named_parameters()]
    assert {name for name, kind in kinds.items() if kind == "embed"} == {"tok_emb.weight", "ngram.table"}
    for name, p in model.named_parameters():  # Muon: for matrices only, never for the per-head projections
        matrix = name.endswith("_proj.weight") and not name.endswith(("a_proj.weight", "b_proj.weight"))
        assert (kinds[name] == "matrix") == (matrix or name == "ngram.proj.weight"), name
        assert p.dtype == torch.float32
    model.mystery = nn.Parameter(torch.zeros(2))
    with pytest.raises(LookupError, match="mystery"):
        train_gpt.init_weights(model, model.hp)
    with pytest.raises(LookupError, match="mystery"):
        Muon(model, model.hp)


def test_two_models_of_a_seed_are_equal(tiny):
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(GPT(tiny()).state_dict())
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    assert not all(torch.equal(models[0][k], models[2][k]) for k in models[0])


def test_shared_mixers_are_the_same_parameters_listed_once(tiny):
    shared, single = GPT(tiny(layout="G S G S2=1")), GPT(tiny(layout="G S G"))
    assert shared.blocks[4].mixer is shared.blocks[3].mixer is shared.blocks[1].mixer
    assert shared.blocks[0].mixer is not shared.blocks[2].mixer
    assert shared.blocks[3].mlp is not shared.blocks[1].mlp
    names = [name for name, _ in shared.named_parameters()]
    assert not [name for name in names if name.startswith(("blocks.3.mixer.", "blocks.4.mixer."))]
    assert "lm_head.weight" not in names and shared.lm_head.weight is shared.tok_emb.weight
    per_block = sum(p.numel() for name, p in single.named_parameters()
                    if name.startswith("blocks.2.") and not name.startswith("blocks.2.mixer."))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (single, shared)]
    assert sizes[1] == sizes[0] + 2 * per_block


def test_the_record_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT(Hyperparameters())
    assert abs(sum(p.numel() for p in model.parameters()) / 33_862_953 - 1) < 0.01


@pytest.mark.parametrize("layout", ["G2 S G S=2", "A S G"])
def test_every_parameter_learns_within_two_steps(tiny, layout):
    """From the true start, where some weights are zero: no path is dead because two of its factors are."""
    hp = tiny(layout=layout)
    model = GPT(hp)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Muon(model, hp)
    with_gradient = set()
    for _ in range(3):
        ids = random_ids(hp, B=4, T=65, starts=(30,))
        token_nats(model, ids[:, :-1], ids[:, 1:]).mean().backward()
        with_gradient |= {name for name, p in model.named_parameters() if p.grad.abs().max() > 0}
        optimizer.step(1.0, 0.9)
    assert with_gradient == set(start)
    assert not [name for name, p in model.named_parameters() if torch.equal(p, start[name])]


# ---- layout


@pytest.mark.parametrize("layout, blocks", [
    ("G", [("G", 0)]), ("S A", [("S", 0), ("A", 1)]), ("G2", [("G", 0), ("G", 1)]),
    ("G S=0", None), ("G2 S G2 S=2", [("G", 0), ("G", 1), ("S", 2), ("G", 3), ("G", 4), ("S", 2)]),
    ("G5 S G5 S=5", [*(("G", i) for i in range(5)), ("S", 5), *(("G", i) for i in range(6, 11)), ("S", 5)]),
    ("A G A2=0", [("A", 0), ("G", 1), ("A", 0), ("A", 0)]), ("  G   S ", [("G", 0), ("S", 1)]),
    ("g", [("g", 0)]), ("g a s=0", None), ("S s=0 G g=2", [("S", 0), ("s", 0), ("G", 2), ("g", 2)]),
    *((bad, None) for bad in ("", "   ", "X", "x", "G0", "G-1", "G=", "G=x", "GS", "5G", "S=0", "S=1 S",
                              "G S=5", "S G A=0", "S S=0 S=1", "S G00", "G999999999", "Gg", "G~", "G~0", "G S~0",
                              "G G~=0", "G G=~0", "S S~0 S~1", "S S~0 S=1", "()x2", "( )x2", "(G)", "(G)x1", "(G)x0",
                              "(G)x10", "(G x2", "G)x2", "((G)x2)x2", "(G)x2 (S)x2", "(G)*2")),
])
def test_parse_layout(layout, blocks):
    if blocks is None:
        with pytest.raises(ValueError, match="LAYOUT="):
            parse_layout(layout)
    else:
        shared = ["" if owner == i else "=" for i, (_, owner) in enumerate(blocks)]
        assert parse_layout(layout) == ([(*block, how) for block, how in zip(blocks, shared, strict=True)],
                                        list(range(len(blocks))))
