"""What holds of every way to learn while scoring, in streams and in windows.

causality       bit for bit, whatever the text is rewritten to
score first     no gradient reaches a target before it has its score
weights         as they were, when the text is scored
time            with a clock of our own
"""

import copy
import time
from types import SimpleNamespace

import pytest
import torch
from corpus import BOS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from learning import LEARNING, MODES, TEXT, plainly
from streams import Spied, documents_of, in_lockstep, text_of, weights_of
from toys import system

import train_gpt
from train_gpt import Linear, final_plan, world

IN_STEPS = [mode for mode in LEARNING if mode != "stream_lora"]  # after a segment, on its chunks


# ---- causality


def rewritten(tokens, k: int, how: str, generator) -> torch.Tensor:
    """Other tokens from k on: other words, one document without an end, or many documents."""
    other = tokens.clone()
    words = torch.randint(2, 64, (len(tokens) - k,), generator=generator)
    if how == "words":
        words[tokens[k:] == BOS] = BOS
    elif how == "documents":
        words[torch.rand(len(words), generator=generator) < 0.3] = BOS
    other[k:] = words
    if how == "documents":
        other[k] = BOS
    return other


@pytest.mark.parametrize("rows", [1, 4], ids="rows_{}".format)
@pytest.mark.parametrize("mode", MODES)
def test_no_score_depends_on_what_follows(lively, mode, rows):
    """To the last bit, at the borders of chunks, windows, documents and segments and beside
    them."""
    mode, generator = MODES[mode], torch.Generator().manual_seed(1)
    options = dict(ttt_epochs=1) if mode.learner == "SgdTTT" else {}
    hp = mode.small(val_batch_size=32 * rows, eval_rows=rows, **options)
    model, tokens = lively(mode.new_model(hp)), text_of(5, 27, 33, 1, 21, 9, 12)
    nats = mode.score(model, tokens, hp)[0]
    ks = [1, 6, 32, 33, 36, 37, 65, 66, 72, 97, 107]
    for i, k in enumerate(ks):
        how = ("words", "none", "documents")[(i + rows) % 3]
        other = mode.score(model, rewritten(tokens, k, how, generator), hp)[0]
        assert torch.equal(nats[: k - 1], other[: k - 1]), (k, how)
        assert (nats[k - 1 :] != other[k - 1 :]).any()


@given(
    data=st.data(),
    mode=st.sampled_from([*MODES]),
    how=st.sampled_from(["words", "none", "documents"]),
)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_score_depends_on_what_follows_in_any_text(lively, mode, how, data):
    mode, chunk, rows = MODES[mode], data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    options = dict(ttt_epochs=1) if mode.learner == "SgdTTT" else {}
    if mode.learner in ("SgdTTT", "PhasedTTT"):
        options |= dict(ttt_chunk_tokens=data.draw(st.sampled_from([8, 16, 24])))
    options |= dict(eval_seq_len=16, val_batch_size=16 * rows, eval_rows=rows, train_seq_len=8)
    hp = mode.small(eval_chunk=chunk, **options)
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=6))
    tokens = text_of(*lengths, seed=chunk, end=True)
    torch.manual_seed(1)
    model, k = lively(mode.new_model(hp)), data.draw(st.integers(1, len(tokens) - 1))
    other = rewritten(tokens, k, how, torch.Generator().manual_seed(k))
    nats, others = (mode.score(model, text, hp)[0] for text in (tokens, other))
    assert torch.equal(nats[: k - 1], others[: k - 1])


# ---- score first


@pytest.mark.parametrize("mode", LEARNING)
def test_no_gradient_reaches_a_target_before_it_has_its_score(lively, mode):
    """Each score is one that a forward gave before the first gradient on its target. No two tokens
    are equal."""
    mode = MODES[mode]
    hp = mode.small(vocab_size=300)
    model, tokens = lively(mode.new_model(hp)), 2 + torch.randperm(250)
    tokens[[0, 3, 50, 61, 120, 130, 190]] = BOS
    place, seen, trained = {t: i for i, t in enumerate(tokens.tolist())}, {}, set()

    def target(x, y) -> int:
        return place[y] - 1 if y != BOS else place[x]

    def after(x, y, out):
        pairs = zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)
        targets = [target(*pair) for pair in pairs if pair != (BOS, BOS)]
        values = out.detach().flatten().double().tolist()
        for t, value in zip(targets, values, strict=True):
            if t not in trained:
                seen.setdefault(t, set()).add(value)
        if out.requires_grad:
            out.register_hook(lambda grad: learned(targets, grad.flatten().tolist()))

    def learned(targets, grads):
        trained.update(t for t, grad in zip(targets, grads, strict=True) if grad)

    nats, _ = mode.score(Spied(model, after=after), tokens, hp)
    assert len(trained) > 100, "something was learned"
    for t, value in enumerate(nats.tolist()):
        assert value in seen[t], f"target {t} was learned before it had its score"


@pytest.mark.parametrize("mode", IN_STEPS)
def test_learning_what_is_not_scored_is_an_error(lively, monkeypatch, mode):
    mode = MODES[mode]
    learner = getattr(system(mode.module), mode.learner)
    hp, learn_segment = mode.small(), learner.learn_segment
    model, tokens = lively(mode.new_model(hp)), text_of(*TEXT)

    def too_early(self, end):
        learn_segment(self, min(end + 96, len(tokens) - 2))

    monkeypatch.setattr(learner, "learn_segment", too_early)
    with pytest.raises(RuntimeError, match="scored"):
        mode.score(model, tokens, hp)


# ---- weights


@pytest.mark.parametrize("seconds", [0.0, 1e-9], ids=["learned", "no_time"])
@pytest.mark.parametrize("mode", LEARNING)
def test_when_the_text_is_scored_the_weights_are_as_they_were(lively, mode, seconds):
    """To the last bit; and in between they, or adapters, are not."""
    mode, at_work = MODES[mode], []
    hp = mode.small(eval_seconds=seconds)
    model, tokens = lively(mode.new_model(hp)), text_of(*TEXT)
    before, state = weights_of(model), copy.deepcopy(model.state_dict())
    linears = [module for module in model.modules() if isinstance(module, Linear)]

    def look(*_):
        moved = any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        adapted = any(module.lora and module.lora[1].any() for module in linears)
        at_work.append(moved or adapted)

    spied = Spied(model, look)
    learner = mode.new_learner(spied, hp)
    learner.score(tokens, final_plan(tokens, hp))
    assert any(at_work) == bool(learner.updates) == (seconds == 0)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.lora is None for module in linears)


@pytest.mark.parametrize("mode", LEARNING)
def test_a_second_pass_gives_what_the_first_gave(lively, mode):
    """Nothing is left of the first, neither of the text nor of the steps."""
    mode = MODES[mode]
    hp = mode.small()
    model, tokens = lively(mode.new_model(hp)), text_of(*TEXT)
    first, _ = mode.score(model, tokens, hp)
    mode.score(model, text_of(*TEXT, seed=1), hp)
    assert torch.equal(mode.score(model, tokens, hp)[0], first)


@pytest.mark.parametrize("mode", LEARNING)
def test_the_warm_up_text_makes_it_learn(lively, mode):
    """In every way it has: what is compiled there is not compiled under the clock. In a stream some
    document of it must end in its second half."""
    mode, with_grad = MODES[mode], {True: 0, False: 0}
    hp = mode.small()
    model = lively(mode.new_model(hp))
    weights = model.tok_emb.weight

    def look(*_):
        with_grad[torch.is_grad_enabled() and weights.requires_grad] += 1

    learner = mode.new_learner(Spied(model, look), hp)
    length = max(hp.eval_seq_len, hp.eval_chunk) + 2
    tokens = torch.randint(2, hp.vocab_size, (getattr(learner, "warm_up_tokens", length),))
    tokens[len(tokens) * 3 // 4] = BOS
    learner.score(tokens, final_plan(tokens, hp))
    assert learner.updates > 0 and with_grad[False] > 0
    assert bool(with_grad[True]) == (mode.learner != "LoraTTT"), "SGD was not warmed up"


# ---- time


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    clock = SimpleNamespace(now=100.0)
    stopped = vars(time) | dict(perf_counter=lambda: clock.now)
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(**stopped))
    return clock


def slow_model(model, clock, forward: float, backward: float):
    """Each forward and each backward pass takes its time."""

    def after(x, y, out):
        clock.now += forward
        if out.requires_grad:
            out.register_hook(lambda grad: setattr(clock, "now", clock.now + backward))

    return Spied(model, after=after)


@pytest.mark.parametrize("rows", [1, 4], ids="rows_{}".format)
@pytest.mark.parametrize("mode", LEARNING)
def test_without_time_nothing_is_learned(lively, mode, rows):
    """To the last bit. In a segment rows begin anew: of several, other ones read, which costs some
    rounding."""
    mode_name, mode = mode, MODES[mode]
    hp = mode.small(eval_seconds=1e-9, val_batch_size=32 * rows, eval_rows=rows)
    model, tokens = lively(mode.new_model(hp)), text_of(*TEXT)
    nats, count = mode.score(model, tokens, hp)
    plain, _ = plainly(mode, model, tokens, hp)
    if rows > 1 and mode_name != "stream_lora":
        torch.testing.assert_close(nats, plain, rtol=0, atol=1e-5)
    else:
        assert torch.equal(nats, plain)
    assert count.tolist() == [1] * (len(tokens) - 1)


@pytest.mark.parametrize("backward", [3.0, 20.0], ids="backward_{:g}".format)
@pytest.mark.parametrize("mode", LEARNING)
def test_learning_leaves_time_to_score_the_rest(lively, clock, mode, backward):
    """Half of what learning everything takes, and more than scoring alone."""
    mode_name, mode = mode, MODES[mode]
    hp = mode.small(eval_rows=1)
    model, tokens = lively(mode.new_model(hp)), text_of(*TEXT)

    def run(eval_seconds):
        start, hp.eval_seconds = clock.now, eval_seconds
        nats, count = mode.score(slow_model(model, clock, 1.0, backward), tokens, hp)
        assert count.tolist() == [1] * (len(tokens) - 1)
        return nats, clock.now - start

    (plain, least), (everything, most) = run(1e-9), run(0.0)
    budget = (least + most) / 2
    nats, seconds = run(budget)
    assert least < seconds <= budget < most
    assert (nats != plain).any() and (nats != everything).any()
    for a, b in documents_of(tokens) if mode_name == "stream_lora" else ():
        assert torch.equal(plain[a : min(b, a + 8)], nats[a : min(b, a + 8)])


@pytest.mark.parametrize("mode", LEARNING)
def test_no_update_is_begun_that_would_not_fit(lively, clock, mode):
    """There is time for one and a half: one is made."""
    mode = MODES[mode]
    hp = mode.small(eval_rows=1, eval_seconds=1e-9)
    model, tokens = lively(mode.new_model(hp)), text_of(*TEXT)

    def run():
        start, spied = clock.now, slow_model(model, clock, 1.0, 200.0)
        learner = mode.new_learner(spied, hp)
        learner.score(tokens, final_plan(tokens, hp))
        return learner.updates, clock.now - start

    _, least = run()
    hp.eval_seconds = least + 1.5 * 200.0
    updates, seconds = run()
    assert updates == 1 and least + 200.0 <= seconds <= hp.eval_seconds


def learn_on_ranks(monkeypatch, mode, model, tokens, hp, speeds: list[float]):
    """How often each rank learned and how long it took, on clocks of their own: a forward takes a
    rank `speed` seconds, a backward pass twice that."""
    learned, times = [0] * len(speeds), [0.0] * len(speeds)
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: times[world.rank])

    def run():
        rank = world.rank

        def learn(_):
            learned[rank] += 1
            times[rank] += 2 * speeds[rank]

        def after(x, y, out):
            times[rank] += speeds[rank]
            if out.requires_grad:
                out.register_hook(learn)

        own = copy.deepcopy(model)
        return mode.score(Spied(own, after=after), tokens, hp)

    results = in_lockstep(monkeypatch, len(speeds), run)
    for nats, count in results:
        assert torch.equal(nats, results[0][0]) and count.tolist() == [1] * (len(tokens) - 1)
    return learned, times


@pytest.mark.parametrize("mode", LEARNING)
def test_ranks_stop_learning_together(lively, clock, monkeypatch, mode):
    """Each has a clock of its own: if one went by its own, the others would wait for its
    gradients."""
    mode = MODES[mode]
    hp = mode.small(train_seq_len=8, eval_seconds=100.0, val_batch_size=8, eval_rows=1)
    model, tokens = lively(mode.new_model(hp)), text_of(*TEXT)
    learned, times = learn_on_ranks(monkeypatch, mode, model, tokens, hp, [0.1, 2.0])
    assert learned[0] == learned[1] > 0
    assert times[1] <= hp.eval_seconds


@pytest.mark.parametrize("mode", LEARNING)
def test_ranks_go_by_the_slowest_and_not_by_their_sum(lively, clock, monkeypatch, mode):
    """In two and a half times what four ranks take for everything, they learn everything."""
    mode = MODES[mode]
    hp = mode.small(train_seq_len=8, val_batch_size=8, eval_rows=1)
    model, tokens = lively(mode.new_model(hp)), text_of(*TEXT)
    everything, times = learn_on_ranks(monkeypatch, mode, model, tokens, hp, [1.0] * 4)
    hp.eval_seconds = 2.5 * max(times)
    again = learn_on_ranks(monkeypatch, mode, model, tokens, hp, [1.0] * 4)
    assert again == (everything, times)


# ---- it learns


@pytest.mark.parametrize("mode", LEARNING)
def test_repetitive_documents_are_learned(lively, mode):
    """Each document repeats words of its own (for the adapters), all of them use a quarter of the
    vocabulary (for SGD)."""
    mode = MODES[mode]
    options = dict(ttt_epochs=2) if mode.learner == "SgdTTT" else {}
    options |= dict(ttt_lr=0.1) if mode.learner != "LoraTTT" else {}
    hp = mode.small(eval_chunk=16, eval_rows=2, **options)
    generator = torch.Generator().manual_seed(0)
    docs = []
    for _ in range(6):
        words = torch.randint(2, 18, (8,), generator=generator)
        docs += [torch.tensor([BOS]), words[torch.randint(0, 8, (99,), generator=generator)]]
    model, tokens = lively(mode.new_model(hp)), torch.cat(docs)
    plain, nats = (mode.score(model, tokens, hp, learn=learn)[0].mean() for learn in (False, True))
    assert nats < plain - 0.1


# ---- hyperparameters


@pytest.mark.parametrize(
    "name, env, variable",
    [
        ("train_gpt", dict(EVAL_MODE="streaming"), "EVAL_MODE"),
        ("train_gpt", dict(EVAL_MODE=""), "EVAL_MODE"),
        ("train_gpt", dict(TTT="adam"), "TTT"),
        ("train_gpt", dict(TTT="sgd"), "TTT"),
        ("train_gpt", dict(EVAL_MODE="sliding"), "TTT"),
        ("train_gpt", dict(TTT="lora", EVAL_MODE="sliding"), "TTT"),
        ("train_gpt", dict(EVAL_CHUNK="0"), "EVAL_CHUNK"),
        ("train_gpt", dict(EVAL_ROWS="0"), "EVAL_ROWS"),
        ("transformer", dict(EVAL_MODE="sliding"), "TTT"),
        ("transformer", dict(TTT="sgd"), "TTT"),
        ("transformer", dict(TTT_CHUNK_TOKENS="0"), "TTT_CHUNK_TOKENS"),
        ("kv_share", dict(TTT="SGD"), "TTT"),
        ("kv_share", dict(TTT="lora", EVAL_MODE="stream"), "TTT"),
        ("kv_share", dict(TTT_CHUNK_TOKENS="0"), "TTT_CHUNK_TOKENS"),
        ("kv_share", dict(TTT_EPOCHS="0"), "TTT_EPOCHS"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_so_is_refused(name, env, variable):
    with pytest.raises(ValueError, match=f"^{variable}="):
        system(name).Hyperparameters.from_env(env)


@pytest.mark.parametrize(
    "name, env",
    [
        ("train_gpt", {}),
        ("train_gpt", dict(EVAL_MODE="stream")),
        ("train_gpt", dict(TTT="")),
        ("train_gpt", dict(TTT="", EVAL_MODE="sliding")),
        ("kv_share", {}),
        ("kv_share", dict(TTT="sgd", EVAL_MODE="stream")),
        ("kv_share", dict(TTT="")),
        ("transformer", {}),
        ("transformer", dict(TTT_PHASES="0")),
        ("transformer", dict(TTT="", EVAL_MODE="sliding")),
    ],
    ids=str,
)
def test_what_can_be_scored_is_not_refused(name, env):
    system(name).Hyperparameters.from_env(env)
