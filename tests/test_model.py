"""The model against independent truths.

causality, documents   by perturbation: what must not see a changed token keeps its logits bit for
                       bit
reach                  what must see it does, exactly as far as the window allows
position               a document scores the same wherever it stands in a row; the order of its
                       tokens counts
passes                 a group that loops is its blocks again
parameters             sharing, starting values, kinds, gradients

The network written again from its formulas is in test_formulas.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import documents, in_float64, of_layout, other, random_ids

import train_gpt
from train_gpt import BOS_ID, GPT, Muon, make_context

LAYOUTS = ["G", "S", "A", "G2 S G S", "G S G S=1", "G2 S G S=2", "S (A G)x2"]


# ---- causality, documents, reach


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_depend_on_no_later_token(lively, layout):
    hp, model = of_layout(layout)
    lively(model)
    ids = random_ids(hp, T=80, starts=(0, 45))
    logits = model(ids)
    for k in (1, 2, 15, 16, 17, 31, 32, 33, 44, 45, 46, 63, 64, 79):
        changed = ids.clone()
        changed[:, k:] = other(hp, ids[:, k:])
        moved = model(changed)
        assert torch.equal(moved[:, :k], logits[:, :k]), f"a token from {k} on moved one before"
        assert (moved[:, k] != logits[:, k]).any(-1).all()
    changed = ids.clone()
    changed[:, 50] = BOS_ID  # a document that starts later
    assert torch.equal(model(changed)[:, :50], logits[:, :50])


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_later_tokens_need_not_be_there(lively, monkeypatch, layout):
    """In float64: sums of other lengths round otherwise."""
    hp, model = of_layout(layout)
    in_float64(monkeypatch, lively(model))
    ids = random_ids(hp, T=80, starts=(0, 45))
    logits = model(ids)
    for k in (1, 2, 3, 33, 46, 64, 79):
        torch.testing.assert_close(model(ids[:, :k]), logits[:, :k], atol=1e-9, rtol=0)


def test_gradients_reach_no_later_embedding(lively):
    hp, model = of_layout("G S A G S=1")
    lively(model)
    seen = []
    model.tok_emb.register_forward_hook(lambda _, args, x: (x.retain_grad(), seen.append(x))[0])
    ids = random_ids(hp, T=64, starts=(0,))
    for t in (0, 31, 32, 63):
        seen.clear()
        model(ids)[:, t].square().sum().backward()
        influence = seen[0].grad.abs().sum(-1)
        assert (influence[:, : t + 1] > 0).all() and (influence[:, t + 1 :] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_documents_do_not_see_each_other(lively, layout):
    """All tokens of one, its last ones too: by state, convolutions, attention and SmearGate."""
    hp, model = of_layout(layout)
    lively(model)
    ids = random_ids(hp, B=1, T=80, starts=(0, 20, 21, 29, 50))
    ranges = documents(ids[0])
    changes = [(start, end, range(start + 1, end)) for start, end in ranges]  # all of a document
    changes += [(a, end, [end - n]) for a, end in ranges for n in (1, 2, 3) if end - n > a]
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
    """In float64, where what is left of another document would show above 1e-16 of a write."""
    q, k, v = torch.randn(3, 1, 70, 2, 16, dtype=torch.float64)
    q, k, v = (F.normalize(x, dim=-1) for x in (q, k, v))
    g, beta = torch.rand(2, 1, 70, 2, dtype=torch.float64)
    for start in (1, 20, 32, 69):
        inputs = [q, k, v, -0.01 * g, beta]
        inputs[3][:, start] = train_gpt.RESET_LOG_DECAY
        packed, _ = train_gpt.gated_delta_rule(*inputs)
        alone, _ = train_gpt.gated_delta_rule(*(x[:, start:] for x in inputs))
        torch.testing.assert_close(packed[:, start:], alone, atol=1e-13, rtol=0)


@torch.no_grad()
def test_rows_do_not_see_each_other(tiny, lively):
    hp = tiny(layout="G S A")
    model = lively(GPT(hp))
    ids = random_ids(hp, B=3, T=64, starts=(0,))
    changed = ids.clone()
    changed[1] = other(hp, ids[1])
    assert torch.equal(model(changed)[[0, 2]], model(ids)[[0, 2]])


@pytest.mark.parametrize("layout", ["G", "A", "S G"])
@torch.no_grad()
def test_the_last_token_hears_the_first(tiny, lively, layout):
    """Through the mixer alone, farther than convolution and window reach: no SmearGate, heads that
    forget as slowly as a head may start, attention that is not sharp. A change of 1e-3 is 500
    roundings of a logit; heads that forget fast would leave less than one."""
    hp = tiny(layout=layout, qk_gain_init=1.0)
    model = lively(GPT(hp))
    for mixer in (block.mixer for block in model.blocks):
        if isinstance(mixer, train_gpt.GatedDeltaNet):
            mixer.A_log.fill_(math.log(1))
            mixer.dt_bias.fill_(math.log(math.expm1(1e-3)))
    ids = random_ids(hp, T=64, starts=(0,))
    changed = ids.clone()
    changed[:, 1] = other(hp, ids[:, 1])
    assert ((model(changed) - model(ids))[:, -1].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("layers, window", [(1, 1), (1, 16), (2, 9), (3, 9), (3, 16)])
@torch.no_grad()
def test_windows_reach_exactly_layers_times_window_minus_1(
    tiny, lively, monkeypatch, layers, window
):
    """In float64: the farthest token is heard faintly, and must not be rounded away."""
    hp = tiny(layout=f"S{layers}", window_size=window, xsa=False, qk_gain_init=1.0)
    model = in_float64(monkeypatch, lively(GPT(hp)))
    ids = random_ids(hp, T=64, starts=(0,))
    for j in (5, 30):
        changed = ids.clone()
        changed[:, j] = other(hp, ids[:, j])
        moved = (model(changed) - model(ids)).abs().amax((0, 2))
        reached = range(j, min(64, j + layers * (window - 1) + 1))
        assert moved.nonzero().flatten().tolist() == list(reached)
        assert moved[j : reached[-1] + 1].min() > 1e-10


# ---- position


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_document_scores_the_same_at_any_place(lively, monkeypatch, layout):
    """In float64: angles of other positions round otherwise."""
    hp, model = of_layout(layout)
    in_float64(monkeypatch, lively(model))
    document = random_ids(hp, B=1, T=40, starts=(0,))
    alone = model(document)
    for offset in (1, 7, 31, 32, 100):
        row = torch.cat((random_ids(hp, B=1, T=offset, starts=(0,)), document), 1)
        torch.testing.assert_close(model(row)[:, offset:], alone, atol=1e-9, rtol=0)


@pytest.mark.parametrize("rope_dims, heard", [(8, True), (16, True), (0, False)])
@torch.no_grad()
def test_attention_hears_the_order_of_tokens_by_rotary_alone(
    tiny, lively, monkeypatch, rope_dims, heard
):
    hp = tiny(layout="A", rope_dims=rope_dims)
    model = in_float64(monkeypatch, lively(GPT(hp)))
    ids = random_ids(hp, T=64, starts=(0,))
    swapped = ids.clone()
    swapped[:, [3, 40]] = ids[:, [40, 3]]
    difference = (model(swapped) - model(ids))[:, -1].abs().max()
    assert difference > 1e-3 if heard else difference < 1e-9


def test_rotary_turns_each_pair_by_position_times_its_frequency(tiny, monkeypatch):
    """The product of a rotated query and key as complex numbers give it, by their distance."""
    hp = tiny(rope_dims=8, rope_base=100.0)
    monkeypatch.setattr(train_gpt.world, "dtype", torch.float64)
    ctx = make_context(random_ids(hp, B=1, T=64), hp)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    rows = [train_gpt.rotary(x.expand(1, 64, 2, 16), ctx)[0, :, 1] for x in (q, k)]
    scores = rows[0] @ rows[1].T
    pairs = torch.complex(q[:4], q[4:8]) * torch.complex(k[:4], k[4:8]).conj()
    for i in range(0, 64, 7):
        for j in range(0, 64, 5):
            turns = torch.tensor([(i - j) * 100.0 ** (-n / 4) for n in range(4)]).double()
            turned = pairs * torch.polar(torch.ones_like(turns), -turns)
            assert abs(scores[i, j] - turned.real.sum() - q[8:] @ k[8:]) < 1e-4


# ---- passes


@torch.no_grad()
def test_a_group_that_loops_is_its_blocks_written_out(tiny, lively):
    """A loop is the same weights again: two passes are two blocks with equal weights."""
    looped = lively(of_layout("S (A G)x2 S")[1])
    flat, blocks = GPT(tiny(layout="S A G A G S")), looped.blocks
    for block, i in zip(flat.blocks, [0, 1, 2, 1, 2, 3], strict=True):
        block.load_state_dict(blocks[i].state_dict())
    flat.tok_emb.weight.copy_(looped.tok_emb.weight)
    ids = random_ids(looped.hp, starts=(0, 20))
    assert torch.equal(looped(ids), flat(ids))


# ---- parameters


def test_every_parameter_starts_as_stated(tiny):
    torch.manual_seed(1)
    hp = tiny(layout="G40 S", gdn_heads=4, num_heads=4, tied_embed_init_std=0.005)
    parameters = dict(GPT(hp).named_parameters())
    claimed = set()

    def all_of(*ends):
        found = {name: p.detach() for name, p in parameters.items() if name.endswith(ends)}
        assert found, ends
        claimed.update(found)
        return found.values()

    for p in all_of("o_proj.weight", "down_proj.weight"):
        assert (p == 0).all()
    for p in all_of(*(f"{name}_proj.weight" for name in ("q", "k", "v", "g", "up"))):
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
    for A in all_of("A_log"):
        assert A.exp().tolist() == pytest.approx([1 + 15 * h / (len(A) - 1) for h in range(len(A))])
    for dt in all_of("dt_bias"):
        even = [10 ** (2 * h / (len(dt) - 1) - 3) for h in range(len(dt))]
        assert F.softplus(dt.double()).tolist() == pytest.approx(even)
    assert claimed == set(parameters)


def test_every_parameter_has_its_kind_and_an_unknown_one_raises(tiny):
    model = GPT(tiny(layout="G S A"))
    kinds = model.kinds
    assert list(kinds) == [name for name, _ in model.named_parameters()]
    assert {name for name, kind in kinds.items() if kind == "embed"} == {"tok_emb.weight"}
    for name, p in model.named_parameters():  # Muon: never for the per-head projections
        per_head = name.endswith(("a_proj.weight", "b_proj.weight"))
        assert (kinds[name] == "matrix") == (name.endswith("_proj.weight") and not per_head), name
        assert p.dtype == torch.float32
    model.mystery = nn.Parameter(torch.zeros(2))
    with pytest.raises(LookupError, match="mystery"):
        model.init_weights()
    with pytest.raises(LookupError, match="mystery"):
        Muon(model, model.hp)


def test_two_models_of_a_seed_are_equal(tiny):
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(GPT(tiny()).state_dict())
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    assert not all(torch.equal(models[0][k], models[2][k]) for k in models[0])


def test_shared_mixers_are_the_same_parameters_listed_once():
    shared, single = (of_layout(layout)[1] for layout in ("G S G S2=1", "G S G"))
    assert shared.blocks[4].mixer is shared.blocks[3].mixer is shared.blocks[1].mixer
    assert shared.blocks[0].mixer is not shared.blocks[2].mixer
    assert shared.blocks[3].mlp is not shared.blocks[1].mlp
    names = [name for name, _ in shared.named_parameters()]
    lent = "blocks.3.mixer.", "blocks.4.mixer.", "lm_head."
    assert not [name for name in names if name.startswith(lent)]
    assert shared.lm_head.weight is shared.tok_emb.weight
    per_block = sum(
        p.numel()
        for name, p in single.named_parameters()
        if name.startswith("blocks.2.") and not name.startswith("blocks.2.mixer.")
    )
    sizes = [sum(p.numel() for p in model.parameters()) for model in (single, shared)]
    assert sizes[1] == sizes[0] + 2 * per_block


@pytest.mark.parametrize("layout", ["G2 S G S=2", "G2 S G S", "A S G", "A (G S)x2"])
def test_every_parameter_learns_within_two_steps(layout):
    """From the true start, where some weights are zero: no path is dead, its factors all zero."""
    hp, model = of_layout(layout)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, reached = Muon(model, hp), set()
    for _ in range(2):
        ids = random_ids(hp, B=4, T=65, starts=(0, 30))
        model(ids[:, :-1], ids[:, 1:]).mean().backward()
        reached |= {name for name, p in model.named_parameters() if p.grad.abs().max() > 0}
        optimizer.step(1.0, 0.9)
    assert reached == set(start)
    assert not [name for name, p in model.named_parameters() if torch.equal(p, start[name])]


@pytest.mark.parametrize("adapters", [False, True])
def test_compiled_projections_are_one_product_unless_adapters_differ(tiny, lively, adapters):
    """The same outputs and gradients as one by one, and fewer products."""
    hp = tiny(layout="G S", model_dim=32)
    model, ids = lively(GPT(hp)), random_ids(hp, B=2, T=32, starts=(0, 9))
    if adapters:
        learner = train_gpt.LoraTTT(model, hp)
        learner.adapters = learner.new_adapters(2)
        for linear, (A, B, scale) in learner.adapters.items():
            linear.lora = A, torch.randn_like(B, requires_grad=True), scale
    products = []

    def counted(graph, inputs):
        linears = (torch.nn.functional.linear, torch._C._nn.linear)
        products.append(sum(node.target in linears for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(model, backend=counted, fullgraph=True, dynamic=False)
    results = []
    for forward in (model, compiled):
        loss = forward(ids[:, :-1], ids[:, 1:]).mean()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
    one_by_one = 6 + 1 + 2 + 3 + 1 + 2 + 1
    assert products == [one_by_one if adapters else one_by_one - 4 - 2]


# ---- on a GPU


@pytest.mark.cuda
def test_the_model_compiles_into_one_graph_on_the_gpu(tiny, lively):
    hp = tiny(gdn_head_dim=64, head_dim=64, train_seq_len=128, layout="G S A")
    model = lively(GPT(hp)).cuda()
    ids = torch.randint(2, hp.vocab_size, (4, 129), device="cuda")
    ids[:, 0], ids[1, 40] = BOS_ID, BOS_ID
    losses = []
    for forward in (model, model.forward):
        loss = forward(ids[:, :-1], ids[:, 1:]).mean()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        losses.append([loss.detach().double(), gradient.double()])
        model.zero_grad()
    # bf16 moves this loss by 0.00035 and its gradient by 0.14 of their norms, on a CPU; a state
    # that crosses documents by 0.0032 and 0.34, a window one too short by 0.0029 and 0.43
    for compiled, eager, limit in zip(*losses, (0.001, 0.22), strict=True):
        assert compiled.isfinite().all() and (compiled - eager).norm() < limit * eager.norm()
