"""What holds for the network of every system, and what only one of them has."""

import re

import brotli
import pytest
import torch
from toys import (
    SYSTEMS,
    as_packed,
    in_float64,
    other,
    random_ids,
    rounded,
    save_rounded,
    system,
    tiny_of,
    toy,
)

import train_gpt
from train_gpt import Muon

PUBLISHED = dict(  # parameters
    baseline=17_059_912,
    gdn_hybrid=33_862_953,
    kv_share=33_909_825,
    crawler=14_487_088,
    transformer=35_945_671,
    hybrid_1895=35_896_408,
)


def model_of(name, hp):
    return system(name).GPT(hp)


# ---- every system


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_a_system_sees_no_later_token_and_no_other_document(lively, name):
    hp = toy(name)
    model = lively(model_of(name, hp))
    ids = random_ids(hp, T=50, starts=(0, 20))
    logits = model(ids)
    for j in (1, 16, 21, 33, 49):
        changed = ids.clone()
        changed[:, j:] = other(hp, ids[:, j:])
        moved = model(changed)
        assert torch.equal(moved[:, :j], logits[:, :j]), f"a token from {j} on moved one before"
        assert ((moved - logits)[:, j].abs().amax(-1) > 1e-3).all()
    changed = ids.clone()
    changed[:, :20] = other(hp, ids[:, :20])  # also one that began before the row
    assert torch.equal(model(changed)[:, 20:], logits[:, 20:])


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_a_document_scores_the_same_at_any_place_in_a_system(lively, monkeypatch, name):
    """In float64: angles of other positions round otherwise."""
    hp = toy(name)
    model = in_float64(monkeypatch, lively(model_of(name, hp)))
    ids = random_ids(hp, T=90, starts=(0, 50))
    torch.testing.assert_close(model(ids[:, 50:]), model(ids)[:, 50:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_parameter_of_a_system_learns_within_two_steps(name):
    """From the true start, at the beginning of the run and at its end."""
    hp = toy(name)
    model, reached = model_of(name, hp), set()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Muon(model, hp)
    for progress in (0.0, 0.99):
        model.set_progress(progress)
        ids = random_ids(hp, B=4 * hp.micro_steps_at(progress), T=65, starts=(0, 30))
        batch = [(x[:, :-1], x[:, 1:]) for x in ids.split(4)]
        train_gpt.accumulate(model, batch)
        reached |= {name for name, p in model.named_parameters() if p.grad.abs().max() > 0}
        optimizer.step(1.0, 0.95)
    assert reached == set(start)
    assert not [name for name, p in model.named_parameters() if torch.equal(p, start[name])]
    assert optimizer.reached() == len(start)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_system_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = model_of(name, system(name).Hyperparameters())
    assert abs(sum(p.numel() for p in model.parameters()) / PUBLISHED[name] - 1) < 0.01


@pytest.mark.parametrize("name, stated", [("train_gpt", 36_518_560), ("pure_gdn", 15_658_522)])
def test_what_nobody_published_has_the_number_of_parameters_that_we_state(name, stated):
    with torch.device("meta"):
        model = model_of(name, system(name).Hyperparameters())
    assert sum(p.numel() for p in model.parameters()) == stated


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_named_as_its_file(name):
    assert system(name).Hyperparameters.system == name.replace("train_gpt", "record")


REFUSED = {  # system, hyperparameters, the one that is named
    "nothing to skip, baseline": ("baseline", dict(layout="A"), "LAYOUT"),
    "nothing to skip": ("transformer", dict(layout="A", parallel_start_layer=0), "LAYOUT"),
    "instructions without a loop": ("crawler", dict(layout="A3"), "LAYOUT"),
    "attention in a pair": ("kv_share", dict(layout="G S"), "LAYOUT"),
    "half a pair": ("kv_share", dict(layout="G3"), "LAYOUT"),
    "one row of n-grams": ("kv_share", dict(ngram_vocab_size=1), "NGRAM_VOCAB_SIZE"),
    "no row of n-grams": ("crawler", dict(ngram_vocab_size=0), "NGRAM_VOCAB_SIZE"),
    "nothing in lanes": ("transformer", dict(layout="A2", parallel_start_layer=2), "PARALLEL"),
    "lanes and skips from them": (
        "transformer",
        dict(layout="A4", parallel_start_layer=1),
        "PARALLEL",
    ),
    "skips from lanes before the loop": (
        "transformer",
        dict(layout="(A)x9 A4", parallel_start_layer=1),
        "PARALLEL",
    ),
    "out of lanes and in again": (
        "transformer",
        dict(layout="A2 (A2)x2", parallel_start_layer=3),
        "PARALLEL",
    ),
    "a gate of more than there is": ("transformer", dict(attn_gate_dims=33), "ATTN_GATE_DIMS"),
    "a gate of nothing": ("transformer", dict(attn_gate_dims=0), "ATTN_GATE_DIMS"),
    "an instruction of nothing": ("crawler", dict(inst_dim=0), "INST_DIM"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parameters_that_no_gradient_would_reach_are_refused(case):
    name, changes, named = REFUSED[case]
    toy(name)
    with pytest.raises(ValueError, match=f"^{named}.*expected"):
        toy(name, **changes)


# ---- what some have


@pytest.mark.parametrize("name", ["baseline", "crawler", "transformer", "hybrid_1895"])
def test_skips_start_as_what_they_skip(name):
    """Weight 1, gate 1/2, one for each pair of passes."""
    model = model_of(name, toy(name))
    assert model.skips.shape == (2, len(model.order) // 2, 32)
    assert (model.skips[0] == 1).all() and (model.skips[1] == 0).all()
    assert model.kinds["skips"] == "scalar"


@pytest.mark.parametrize("name", ["gdn_hybrid", "kv_share", "crawler"])
def test_n_grams_start_at_a_table_of_zeros_under_an_orthogonal_projection(name):
    model = model_of(name, toy(name))
    assert (model.ngram.table == 0).all()
    P = model.ngram.proj.weight  # [32, 16]
    torch.testing.assert_close(P.T @ P, torch.eye(16), atol=1e-5, rtol=0)
    assert {name: kind for name, kind in model.kinds.items() if kind != "scalar"} == {
        name: "embed" if name in ("tok_emb.weight", "ngram.table") else "matrix"
        for name, p in model.named_parameters()
        if p.ndim == 2 and not re.search(r"[ab]_proj|conv1d|resid_mix", name)
    }


def test_instructions_start_as_nothing_and_there_is_one_a_loop():
    model = model_of("crawler", toy("crawler"))
    assert len(model.inst_out) == 4
    assert all((out.weight == 0).all() for out in model.inst_out)
    W = model.inst_in.weight
    torch.testing.assert_close(W @ W.T, torch.eye(4), atol=1e-5, rtol=0)
    assert {kind for name, kind in model.kinds.items() if name.startswith("inst_")} == {"matrix"}


def test_a_memory_of_the_crawler_has_no_mlp():
    names = [name for name, _ in model_of("crawler", toy("crawler")).named_parameters()]
    without = {i for i in range(6) if not any(x.startswith(f"blocks.{i}.mlp") for x in names)}
    assert without == {3}  # A2 (A G)x4 A2


def test_lanes_and_gates_start_as_stated():
    model = model_of(
        "transformer",
        tiny_of("transformer", layout="A (A)x2 A2", num_heads=4, parallel_start_layer=2),
    )
    named = dict(model.named_parameters())
    lanes = {name: p for name, p in named.items() if name.endswith("lanes")}
    assert [*lanes] == ["blocks.2.lanes", "blocks.3.lanes"]
    for p in lanes.values():
        assert torch.equal(p, torch.tensor([[1.1, 1, 1], [1.1, 1, 1]]))
    gates = {name: p for name, p in named.items() if name.endswith("attn_gate")}
    assert [*gates] == [f"blocks.{i}.mixer.attn_gate" for i in range(4)]
    assert all(p.shape == (4, 5) and (p == 0).all() for p in gates.values())
    assert {model.kinds[name] for name in lanes | gates} == {"scalar"}


def test_what_is_only_of_hybrid_1895_starts_as_stated():
    """Sinks as a key of zeros; convolutions as those of torch; A log-uniform from 1 to 8."""
    hp = toy("hybrid_1895", gdn_heads=64, gdn_head_dim=2, gdn_key_heads=32)
    model = model_of("hybrid_1895", hp)
    named = dict(model.named_parameters())
    sinks = {name: p for name, p in named.items() if name.endswith("sink")}
    assert [*sinks] == [f"blocks.{i}.mixer.sink" for i in range(2, 10)]  # G2 A (A3)x3 A4 G
    assert all(p.shape == (2, 8) and (p == 0).all() for p in sinks.values())
    taps = [p for name, p in named.items() if name.endswith("conv1d")]
    assert [len(p) for p in taps] == 3 * [64, 64, 128] and {p.shape[1] for p in taps} == {2}
    assert 0.65 < max(p.abs().max() for p in taps) <= 0.5**0.5
    A = torch.cat([p for name, p in named.items() if name.endswith("A_log")]).exp()
    assert 1 <= A.min() < 1.2 and 6.5 < A.max() <= 8 and 2.2 < A.median() < 3.6  # 8**0.5
    parallel = [type(block).__name__ == "ParallelBlock" for block in model.blocks]
    assert parallel == 8 * [False] + 3 * [True]
    assert not [name for name in named if "o_norm" in name]


@pytest.mark.parametrize("name", ["transformer", "hybrid_1895"])
@pytest.mark.parametrize("at", [0.0, 0.35, 1.0])
def test_progress_switches_a_loop_on(name, at):
    """What is scored and calibrated has the loop, whenever it begins."""
    model = model_of(name, toy(name, enable_looping_at=at))
    looped = [0, 1, 2, *3 * [3, 4, 5], 6, 7, 8, 9, 10]
    assert model.order == looped
    for progress in (0.0, 0.2, 0.35, 0.9, 1.0, 0.1, 1.0):
        model.set_progress(progress)
        assert model.order == (looped if progress >= at else [*range(11)])


def test_shared_keys_and_values_are_stored_once(lively, tmp_path):
    hp = toy("kv_share", gdn_key_heads=2)
    model = lively(model_of("kv_share", hp))
    path = tmp_path / "model.ptz"
    save_rounded(path, model, hp)
    D, V, hidden = 32, 64, 96
    lent = 2 * D * D + 2 * 2 * D + 2 * 2 * 4 * D  # a follower's matrices, scales, convolutions
    block = 5 * D * D + 2 * D * hidden + 2 * (6 * D + hidden)  # matrices and scales
    block += 2 * (3 * 4 * D + 2 * 2 * D + 2 * 2 + 16)  # convolutions, a, b, A_log, dt_bias, o_norm
    block += 2 * 4 * D  # resid_mix and two scales
    rest = (D + 2) * V  # embedding
    rest += (16 + 2) * 128 + (16 + 2) * D  # table and projection of n-grams
    raw, quantized = path.read_bytes(), rounded(model)
    body = brotli.decompress(raw[44:][: int.from_bytes(raw[40:44], "little")])
    values = len(body) - body.index(b"\n") - 1
    ints = sum(q.numel() for q, _ in quantized.values())
    assert ints + values == 10 * block - 5 * lent + rest
    loaded, _ = train_gpt.load_artifact(path, "cpu", type(hp), type(model))
    for i in range(0, 10, 2):
        owner, follower = loaded.blocks[i].mixer, loaded.blocks[i + 1].mixer
        for name in ("k_proj", "v_proj", "k_conv1d", "v_conv1d"):
            assert getattr(owner, name) is getattr(follower, name)
        for name in ("q_proj", "g_proj", "o_proj", "q_conv1d"):
            assert getattr(owner, name) is not getattr(follower, name)
    ids = random_ids(hp)
    shipped = as_packed(model, rounded(model))
    assert torch.equal(loaded(ids), shipped(ids))
