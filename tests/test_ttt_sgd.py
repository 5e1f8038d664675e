"""SGD on what has been scored, against its steps written out in float64.

SgdTTT      of kv_share: window after window or document after document
PhasedTTT   of transformer: rows with adapters, and SGD on everything so far in between
"""

import copy

import pytest
import torch
from learning import MLPS, MODES, TEXT, learn_row_by_row, learn_slowly, segments_of, small
from streams import Spied, all_in_float64, in_lockstep, text_of, weights_of
from toys import system

from train_gpt import Linear, final_plan

PHASES = MODES["stream_lora_phases"]


@pytest.fixture
def exact(monkeypatch):
    yield from all_in_float64(monkeypatch)


# ---- SgdTTT


def check_sgd(mode, hp, model, tokens) -> None:
    before, with_grad = weights_of(model), []
    spied = Spied(model, lambda *_: with_grad.append(torch.is_grad_enabled()))
    learner = mode.new_learner(spied, hp)
    nats, count = learner.score(tokens, final_plan(tokens, hp))
    expected, steps = learn_slowly(model, tokens, hp)
    assert count.tolist() == [1] * (len(tokens) - 1)
    torch.testing.assert_close(nats, expected, rtol=0, atol=1e-9)
    assert learner.updates == steps == sum(with_grad)
    plain, _ = mode.score(model, tokens, hp, learn=False)
    assert steps == 0 or (nats - plain).abs().max() > 1e-2, "learning changes too little to see"
    assert not with_grad[-1], "something is learned that nothing is scored with"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("stride", [32, 8, 5, 0], ids="stride_{}".format)
def test_sgd_learns_from_each_chunk_that_is_scored(lively, exact, stride):
    mode = MODES["sliding_sgd" if stride else "stream_sgd"]
    hp = mode.small(**(dict(eval_stride=stride) if stride else {}))
    check_sgd(mode, hp, lively(mode.new_model(hp)), text_of(*TEXT))


SIZES = [
    dict(ttt_epochs=1),
    dict(ttt_epochs=3),
    dict(ttt_freeze_blocks=0),
    dict(ttt_freeze_blocks=3, layout="G2 S G S=2"),
    dict(ttt_freeze_blocks=2),
    dict(ttt_lr=0.5),
    dict(ttt_chunk_tokens=16),
    dict(ttt_chunk_tokens=47),
    dict(train_seq_len=4),
    dict(train_seq_len=32),
    dict(train_seq_len=32, ttt_chunk_tokens=20),
    dict(ttt_chunk_tokens=128),
    dict(ttt_chunk_tokens=512),
    dict(eval_chunk=1),
    dict(val_batch_size=8, eval_rows=1),
    dict(layout="S9 G S", ttt_freeze_blocks=2, ttt_epochs=1),
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "_".join(f"{k}_{v}" for k, v in s.items()))
@pytest.mark.parametrize("mode", ["sliding_sgd", "stream_sgd"])
def test_sgd_of_any_size(lively, exact, mode, sizes):
    """ttt_chunk_tokens_128, 512: one chunk, none. A frozen mixer that a later block uses too stays
    as it is; blocks 0 and 1 are not block 10."""
    hp = MODES[mode].small(**sizes)
    check_sgd(MODES[mode], hp, lively(MODES[mode].new_model(hp)), text_of(*TEXT))


SHARED = [
    {},
    dict(layout="G4", ttt_freeze_blocks=1),
    dict(layout="G4", ttt_freeze_blocks=2),
    dict(ttt_freeze_blocks=0, ngram_vocab_size=0),
    dict(eval_mode="stream"),
]


@pytest.mark.parametrize("overrides", SHARED, ids=lambda o: "_".join(map(str, o)) or "default")
def test_sgd_learns_shared_keys_and_values_and_the_n_grams(lively, exact, overrides):
    """The keys and values of a frozen block stay as they are in the next block too."""
    mode = MODES["sliding_sgd_shared"]
    hp = mode.small(**overrides)
    hp.validate()
    model = lively(mode.new_model(hp))
    assert type(model.learner(hp)) is type(mode.new_learner(model, hp))
    check_sgd(mode, hp, model, text_of(*TEXT))


@pytest.mark.parametrize("sizes", [{}, dict(ttt_epochs=5, eval_chunk=3)], ids=str)
def test_sgd_of_hybrid_1895_learns_its_mlps_only(lively, exact, sizes):
    hp = MLPS.small(**sizes)
    hp.validate()
    model = lively(MLPS.new_model(hp))
    learner = model.learner(hp)
    assert type(learner) is type(MLPS.new_learner(model, hp))
    assert sum(learner.learns(name) for name, _ in model.named_parameters()) == 3 * 3
    check_sgd(MLPS, hp, model, text_of(*TEXT))


TEXTS = [(150,), (1, 120, 30), (32, 32, 32, 32), (33, 31, 33, 31), (31, 1, 32, 1, 64, 3)]


@pytest.mark.parametrize("lengths", TEXTS, ids=str)
def test_sgd_where_documents_end_at_or_span_several_chunks(lively, exact, lengths):
    mode = MODES["stream_sgd"]
    hp = mode.small()
    check_sgd(mode, hp, lively(mode.new_model(hp)), text_of(*lengths))
    check_sgd(mode, hp, lively(mode.new_model(hp)), text_of(*lengths, end=True))


@pytest.mark.parametrize("mode", ["sliding_sgd", "stream_sgd", "sliding_sgd_shared"])
@pytest.mark.parametrize("size", [2, 3], ids="ranks_{}".format)
def test_ranks_average_their_gradients(lively, exact, monkeypatch, size, mode):
    mode = MODES[mode]
    hp = mode.small(train_seq_len=8, ttt_chunk_tokens=48)
    model, tokens = lively(mode.new_model(hp)), text_of(*TEXT)
    expected, _ = learn_slowly(model, tokens, hp)
    results = in_lockstep(monkeypatch, size, lambda: mode.score(copy.deepcopy(model), tokens, hp))
    for nats, count in results:
        assert count.tolist() == [1] * (len(tokens) - 1)
        torch.testing.assert_close(nats, expected, rtol=0, atol=1e-9)


# ---- PhasedTTT


def score_and_look(model, tokens, hp):
    """Scores, counts, steps, and A of every Linear as the first forward finds it, by name."""
    found = {}

    def look(*_):
        for name, module in model.named_modules():
            if isinstance(module, Linear) and name not in found:
                found[name] = module.lora[0].detach().clone()

    spied = Spied(model, look)
    learner = PHASES.new_learner(spied, hp)
    nats, count = learner.score(tokens, final_plan(tokens, hp))
    return nats, count, learner.updates, found


def check_phases(hp, model, tokens) -> None:
    before = weights_of(model)
    nats, count, updates, found = score_and_look(model, tokens, hp)
    assert count.tolist() == [1] * (len(tokens) - 1)
    expected, steps = learn_row_by_row(model, tokens, hp, [found])
    torch.testing.assert_close(nats, expected, rtol=0, atol=1e-6)
    assert updates == steps + sum(len(rows[0]) for (rows,), _ in segments_of(tokens, hp))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


PHASED = [
    dict(ttt_phases=0),
    dict(ttt_phases=1),
    dict(ttt_phases=2),
    dict(ttt_phases=3, ttt_chunk_tokens=16, ttt_lora_wd=20.0, eval_rows=8),
    dict(ttt_phases=2, ttt_freeze_blocks=0, train_seq_len=4),
    dict(ttt_phases=2, layout="A (S)x2 S2", parallel_start_layer=3, ttt_freeze_blocks=2),
    dict(ttt_phases=9, eval_rows=1),
]


@pytest.mark.parametrize("sizes", PHASED, ids=lambda s: "_".join(f"{k}_{v}" for k, v in s.items()))
def test_phases_are_adapters_and_sgd_on_all_that_is_scored(lively, exact, sizes):
    hp = PHASES.small(**sizes)
    hp.validate()
    model = lively(PHASES.new_model(hp))
    assert type(model.learner(hp)) is type(PHASES.new_learner(model, hp))
    check_phases(hp, model, text_of(*TEXT))


@pytest.mark.parametrize("lengths", TEXTS, ids=str)
def test_phases_where_documents_end_at_or_span_several(lively, exact, lengths):
    """A document is read to its end first: of a single one nothing is left behind it."""
    hp = PHASES.small(ttt_phases=3)
    model, tokens = lively(PHASES.new_model(hp)), text_of(*lengths)
    check_phases(hp, model, tokens)
    assert len(segments_of(tokens, hp)) <= min(4, len(lengths))


def test_phases_are_evenly_spread_over_the_text(lively):
    """SGD goes over everything scored so far TTT_PHASES times: when a quarter, a half and three
    quarters of the text are scored, or soon after, at the end of a document."""
    hp = PHASES.small(ttt_phases=3, ttt_chunk_tokens=8, train_seq_len=8)
    model, tokens, calls = lively(PHASES.new_model(hp)), text_of(*[10] * 40), []
    spied = Spied(model, lambda x, y: calls.append((x.shape, model.tok_emb.weight.requires_grad)))
    PHASES.score(spied, tokens, hp)
    learned = [index for index, (_, weights_learn) in enumerate(calls) if weights_learn]
    sizes = [1]
    for before, after in zip(learned, learned[1:], strict=False):
        sizes = [*sizes, 1] if after > before + 1 else [*sizes[:-1], sizes[-1] + 1]
    assert sizes == [100 // 8, 200 // 8, 300 // 8]


@pytest.mark.parametrize("size", [2, 3], ids="ranks_{}".format)
def test_phases_on_ranks(lively, exact, monkeypatch, size):
    hp = PHASES.small(train_seq_len=8, ttt_chunk_tokens=48, eval_rows=2)
    model, tokens = lively(PHASES.new_model(hp)), text_of(*TEXT)

    def run():
        return score_and_look(copy.deepcopy(model), tokens, hp)

    results = in_lockstep(monkeypatch, size, run)
    expected, steps = learn_row_by_row(model, tokens, hp, [found for *_, found in results])
    assert steps > 0
    for nats, count, *_ in results:
        assert count.tolist() == [1] * (len(tokens) - 1)
        torch.testing.assert_close(nats, expected, rtol=0, atol=1e-6)


# ---- which of them


@pytest.mark.parametrize("name", ["kv_share", "transformer", "hybrid_1895"])
def test_without_ttt_nothing_learns(name):
    hp = small(name, ttt="", layout="G2")
    model = system(name).GPT(hp)
    assert model.learner(hp) is None
