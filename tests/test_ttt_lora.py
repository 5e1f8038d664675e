"""Adapters that learn while a stream is scored, against one row after the other: its adapters added
to the weights, AdamW written out, in float64."""

import copy

import pytest
import torch
from learning import MODES, TEXT, learn_row_by_row, plainly, segments_of, small
from streams import Spied, all_in_float64, documents_of, in_lockstep, text_of, weights_of

from train_gpt import GPT, Linear, LoraTTT

MODE = MODES["stream_lora"]


@pytest.fixture
def exact(monkeypatch):
    yield from all_in_float64(monkeypatch)


def test_an_adapter_belongs_to_its_row(exact):
    layer, x = Linear(5, 3), torch.randn(4, 6, 5)
    torch.nn.init.normal_(layer.weight)
    A, B = torch.randn(4, 2, 5), torch.randn(4, 3, 2)
    layer.lora = (A, B, 0.7)
    for b in range(4):
        for t in range(6):
            own = layer.weight @ x[b, t] + 0.7 * (B[b] @ (A[b] @ x[b, t]))
            torch.testing.assert_close(layer(x)[b, t], own, rtol=0, atol=1e-12)
    layer.lora = None
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=0, atol=1e-12)


def score_and_look(model, tokens, hp, mode=MODE):
    """The scores and counts, and lora of every Linear as the first forward finds it, by name."""
    found = {}

    def look(*_):
        for name, module in model.named_modules():
            if isinstance(module, Linear) and name not in found:
                A, B, scale = module.lora
                found[name] = (A.detach().clone(), B.detach().clone(), float(scale))

    return *mode.score(Spied(model, look), tokens, hp), found


def matrices_of(found: dict) -> dict[str, torch.Tensor]:
    return {name: A for name, (A, _, _) in found.items()}


OVERRIDES = [
    {},
    dict(layout="G2 S G S", eval_rows=2),
    dict(layout="G2 S G S=2", eval_rows=2),
    dict(layout="A G2"),
    dict(eval_chunk=3, eval_rows=3),
    dict(eval_rows=1),
    dict(eval_rows=20),
    dict(ttt_lora_wd=0.0),
    dict(ttt_lora_wd=20.0),
    dict(ttt_lora_rank=1),
    dict(ttt_lora_alpha=0.5),
    dict(seed=5),
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=lambda o: "_".join(map(str, o)) or "default")
def test_lora_is_a_row_of_documents_after_the_other(lively, exact, overrides):
    hp = MODE.small(**overrides)
    hp.validate()
    model, tokens = lively(MODE.new_model(hp)), text_of(*TEXT)
    before = weights_of(model)
    nats, count, found = score_and_look(model, tokens, hp)
    assert count.tolist() == [1] * (len(tokens) - 1)
    expected, _ = learn_row_by_row(model, tokens, hp, [matrices_of(found)])
    torch.testing.assert_close(nats, expected, rtol=0, atol=1e-6)
    plain, _ = MODE.score(model, tokens, hp, learn=False)
    assert (nats - plain).abs().max() > 1e-2, "learning changes too little to be compared"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("size", [2, 3], ids="ranks_{}".format)
def test_ranks_have_rows_of_their_own(lively, exact, monkeypatch, size):
    hp = MODE.small(eval_rows=2)
    model, tokens = lively(GPT(hp)), text_of(*TEXT)

    def run():
        return score_and_look(copy.deepcopy(model), tokens, hp)

    results = in_lockstep(monkeypatch, size, run)
    adapters = [matrices_of(found) for _, _, found in results]
    expected, _ = learn_row_by_row(model, tokens, hp, adapters)
    for nats, count, _ in results:
        assert count.tolist() == [1] * (len(tokens) - 1)
        torch.testing.assert_close(nats, expected, rtol=0, atol=1e-6)


def test_adapters_start_as_nothing_on_every_linear(lively):
    """Also on one that two blocks share, once. Seeded, and not by what torch happens to be at."""
    sizes = dict(layout="G2 S G S=2", ttt_lora_rank=4, ttt_lora_alpha=6.0, eval_rows=3)
    hp = MODE.small(**sizes)
    model, tokens = lively(MODE.new_model(hp)), text_of(20, 20, 20, 20)

    def start(hp):
        torch.rand(3)
        return score_and_look(model, tokens, hp)[2]

    found = start(hp)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    assert set(found) == set(layers) and "blocks.4.mixer.q_proj" not in found
    for name, (A, B, scale) in found.items():
        n_out, n_in = layers[name].weight.shape
        assert A.shape == (3, 4, n_in) and B.shape == (3, n_out, 4) and scale == 1.5
        assert not B.any()
        bound = n_in**-0.5
        assert A.abs().max() <= bound and A.max() > 0.8 * bound and A.min() < -0.8 * bound
        assert abs(A.std() / (bound / 3**0.5) - 1) < 0.2
    again, other = start(hp), start(MODE.small(**sizes, seed=2))
    assert all(torch.equal(found[name][0], again[name][0]) for name in found)
    assert not any(torch.equal(found[name][0], other[name][0]) for name in found)


@pytest.mark.parametrize("chunk, rows", [(8, 1), (8, 4), (3, 2)], ids=str)
def test_the_first_chunk_of_a_document_is_scored_as_without_learning(lively, chunk, rows):
    """To the last bit: adapters of the document before have no part in it. The second chunk is
    another matter."""
    hp = MODE.small(eval_chunk=chunk, eval_rows=rows, ttt_lora_lr=0.05)
    model, tokens = lively(GPT(hp)), text_of(*TEXT)
    nats = MODE.score(model, tokens, hp)[0]
    plain = plainly(MODE, model, tokens, hp)[0]
    for a, b in documents_of(tokens):
        assert torch.equal(plain[a : min(b, a + chunk)], nats[a : min(b, a + chunk)])
        assert b <= a + chunk or (plain != nats)[a + chunk : b].any()


def test_a_row_learns_nothing_from_another(lively):
    """Rewrite all documents of the other rows: not a bit of this one's scores changes."""
    hp = MODE.small()
    model, tokens = lively(GPT(hp)), text_of(*TEXT)
    (((rows,), _),) = segments_of(tokens, hp)
    nats = MODE.score(model, tokens, hp)[0]
    for row in rows:
        own = [t for start, end in row for t in range(start, end)]
        other = text_of(*TEXT, seed=1)
        other[[*own, -1]] = tokens[[*own, -1]]
        rewritten = MODE.score(model, other, hp)[0]
        assert len(own) > 20 and torch.equal(nats[own], rewritten[own])
        assert (nats != rewritten).sum() > 50


def test_the_model_of_the_record_learns_by_adapters_or_not_at_all():
    hp = small("train_gpt", eval_mode="stream", ttt="lora")
    model = GPT(hp)
    assert type(model.learner(hp)) is LoraTTT
    assert model.learner(small("train_gpt", ttt="")) is None
