"""Scoring against brute force: every target once, from its strict prefix, in bits per byte.

The reference never batches and never slides: it finds for each target alone the tokens that it may
see, and runs the network on those and nothing after them. The bytes are those of sp.decode.
"""

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from corpus import (
    BOS,
    DOCUMENTS,
    decoded_bytes,
    document_ids,
    load,
    prose,
    tokenizer_model,
    write_corpus,
    write_shard,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import all_in_float64, in_lockstep, stands_for_a_model

import train_gpt
from train_gpt import (
    GPT,
    Plan,
    Reading,
    Validation,
    final_plan,
    score,
    stream_plan,
    window_plan,
)

# ---- windows


def first_visible(target: int, num_targets: int, seq_len: int, stride: int) -> int:
    """The first token that the prediction of tokens[target + 1] may see; the last is
    tokens[target].

    Windows end after seq_len targets, then every `stride` further, the last one where the targets
    end; a target is scored by the first window that reaches it.
    """
    end = seq_len
    while end <= target:
        end += stride
    return max(0, min(end, num_targets) - seq_len)


def check_windows(num_targets: int, seq_len: int, stride: int, batch: int = 100) -> None:
    hp = SimpleNamespace(eval_seq_len=seq_len, val_batch_size=batch)
    plan = window_plan(torch.arange(num_targets + 1), hp, stride)
    assert not plan.cached and plan.length == min(seq_len, num_targets)
    assert plan.rows == max(1, batch // plan.length)
    assert all(len(unit) == 1 for unit in plan.units), "a window is read for itself"
    scored, lengths = np.zeros(num_targets, dtype=int), set()
    for ((start, end, first),) in plan.units:
        assert 0 <= start <= first < end <= num_targets
        lengths.add(end - start)
        for target in range(first, end):
            scored[target] += 1
            assert start == first_visible(target, num_targets, seq_len, stride)
            assert start == 0 or target - start >= seq_len - stride
    assert (scored == 1).all(), "a target is scored twice or not at all"
    assert lengths == {min(seq_len, num_targets)}, "windows of several shapes"


LENGTHS = [1, 2, 63, 64, 65, 70, 71, 127, 128, 129, 191, 521, 1009]


@pytest.mark.parametrize("stride", [1, 7, 63, 64], ids="stride_{}".format)
@pytest.mark.parametrize("num_targets", LENGTHS, ids="targets_{}".format)
def test_windows_score_each_target_once(num_targets, stride):
    check_windows(num_targets, 64, stride)


@given(
    num_targets=st.integers(1, 400),
    seq_len=st.integers(1, 80),
    batch=st.integers(1, 400),
    data=st.data(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_windows_of_any_size(num_targets, seq_len, batch, data):
    check_windows(num_targets, seq_len, data.draw(st.integers(1, seq_len)), batch)


def test_the_final_pass_reads_in_the_mode_that_is_asked_for(tiny):
    tokens = torch.arange(150)
    hp = tiny(eval_stride=7, eval_mode="sliding")
    assert final_plan(tokens, hp) == window_plan(tokens, hp, 7)
    hp = tiny(eval_stride=7, eval_mode="stream")
    assert final_plan(tokens, hp) == stream_plan(tokens, hp)
    assert final_plan(tokens, hp).cached


# ---- score


@stands_for_a_model
def place_and_context(x, y, cache=None):
    """Stands for a model: 'nats' that tell the target's place and where the window that scored it
    begins. For tokens that are their own places."""
    assert (y == x + 1).all() and cache is None
    return (1000 * y + x[:, :1]).float()


@pytest.mark.parametrize("rows", [1, 3, 1000], ids="rows_{}".format)
@pytest.mark.parametrize("stride", [1, 7, 16], ids="stride_{}".format)
@pytest.mark.parametrize("targets", [1, 2, 15, 16, 17, 22, 23, 53, 101], ids="targets_{}".format)
def test_each_target_is_scored_in_its_window(tiny, targets, stride, rows):
    hp = tiny(eval_seq_len=16, eval_stride=stride, val_batch_size=16 * rows)
    tokens = torch.arange(targets + 1)
    nats, count = score(place_and_context, tokens, window_plan(tokens, hp, stride))
    expected = [1000 * (t + 1) + first_visible(t, targets, 16, stride) for t in range(targets)]
    assert nats.dtype == torch.float64 and nats.tolist() == expected
    assert count.dtype == torch.int32 and count.tolist() == [1] * targets


def test_the_stride_is_the_argument(tiny):
    """Not the hyperparameter: one function plans windows that overlap and windows that do not."""
    hp, tokens = tiny(eval_seq_len=16, eval_stride=4), torch.arange(50)
    nats, _ = score(place_and_context, tokens, window_plan(tokens, hp, 16))
    assert nats.tolist() == [1000 * (t + 1) + first_visible(t, 49, 16, 16) for t in range(49)]


def test_no_batch_is_larger_than_asked_for_and_all_have_one_shape(tiny):
    """14 windows in threes."""
    shapes, tokens = set(), torch.arange(102)

    @stands_for_a_model
    def model(x, y, cache):
        shapes.add((x.shape, y.shape))
        return place_and_context(x, y)

    score(model, tokens, window_plan(tokens, tiny(eval_seq_len=16, val_batch_size=50), 7))
    assert shapes == {((3, 16), (3, 16))}


@pytest.fixture
def exact(monkeypatch):
    yield from all_in_float64(monkeypatch)


@pytest.fixture
def tiny_score(tiny, lively):
    """score() of a model that really uses all of its parts, over documents of random tokens."""
    hp = tiny(eval_seq_len=48, val_batch_size=96)
    model = lively(GPT(hp))
    tokens = torch.randint(2, hp.vocab_size, (150,))
    tokens[[0, 20, 47, 48, 49, 100, 131]] = BOS

    def run(tokens=tokens, stride=11):
        return score(model, tokens, window_plan(tokens, hp, stride))[0]

    run.model, run.tokens, run.hp = model, tokens, hp
    return run


@pytest.mark.parametrize("size", [2, 3, 8, 16], ids="ranks_{}".format)
def test_ranks_find_the_same_bits_as_one(tiny_score, monkeypatch, size):
    """6 batches: on 8 and 16 ranks some have none."""
    alone = tiny_score()
    for nats in in_lockstep(monkeypatch, size, tiny_score):
        assert torch.equal(nats, alone)


@pytest.mark.parametrize("stride", [5, 11, 48], ids="stride_{}".format)
def test_score_is_the_network_on_each_target_alone(exact, tiny_score, stride):
    tokens, num_targets = tiny_score.tokens, len(tiny_score.tokens) - 1
    expected = []
    for t in range(num_targets):
        start = first_visible(t, num_targets, tiny_score.hp.eval_seq_len, stride)
        with torch.no_grad():
            logits = tiny_score.model(tokens[start : t + 1][None])[0, -1]
        expected.append(-logits.log_softmax(-1)[tokens[t + 1]])
    nats = tiny_score(stride=stride)
    torch.testing.assert_close(nats, torch.stack(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [1, 30, 59, 60, 149])
def test_a_score_is_a_normalised_probability(tiny_score, k):
    """What token k costs is decided before it is seen: the probabilities of all it could be sum
    to 1."""
    nats = []
    for token in range(tiny_score.hp.vocab_size):
        tokens = tiny_score.tokens.clone()
        tokens[k] = token
        nats.append(tiny_score(tokens, stride=24))
    nats = torch.stack(nats)
    assert (nats[:, : k - 1] == nats[0, : k - 1]).all(), (
        "a token changed the cost of an earlier one"
    )
    assert nats[:, k - 1].neg().exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("k", [1, 2, 20, 47, 48, 49, 58, 59, 60, 70, 100, 148, 149])
def test_later_tokens_change_no_earlier_score(tiny_score, k):
    """Replace tokens k, k+1, ...: the targets before k cost the same to the last bit."""
    tokens = tiny_score.tokens.clone()
    tokens[k:] = 2 + (tokens[k:] + torch.randint(1, 61, tokens[k:].shape)) % 61
    before, after = tiny_score(), tiny_score(tokens)
    assert torch.equal(before[: k - 1], after[: k - 1])
    assert (before[k - 1 :] != after[k - 1 :]).any()


@pytest.mark.parametrize("k", [1, 21, 48, 60, 120])
def test_a_token_is_used_by_what_follows_in_its_document(exact, tiny_score, k):
    """The other side of the test above. In the next document nothing is left of it but rounding."""
    tokens = tiny_score.tokens.clone()
    tokens[k] = 2 + (tokens[k] + 1) % 61
    change = (tiny_score() - tiny_score(tokens)).abs()
    document_end = next(bos for bos in (20, 47, 48, 49, 100, 131, 150) if bos > k)
    assert change[k] > 1e-3, "the target after token k does not depend on it"
    assert not change[: k - 1].any()
    assert (change[document_end:] < 1e-9).all(), "it reached into the next document"


def test_a_batch_is_filled_up_with_windows_of_the_text(tiny):
    """Rows of zeros would be rows of BOS, each token a document: more than packed attention has
    room for."""
    tokens, rows = torch.arange(100), []

    @stands_for_a_model
    def model(x, y, cache):
        rows.extend(x.tolist())
        return torch.ones(x.shape)

    score(model, tokens, window_plan(tokens, tiny(val_batch_size=10 * 64), 16))
    assert len(rows) == 10 and all(row == list(range(row[0], row[0] + 64)) for row in rows)


def test_a_score_that_is_not_finite_is_an_error(tiny):
    tokens = torch.arange(2, 40)

    @stands_for_a_model
    def model(x, y, cache):
        return torch.where(y == 30, torch.nan, 1.0)

    with pytest.raises(train_gpt.Refused, match="1 of 37 scores are not finite"):
        score(model, tokens, window_plan(tokens, tiny(), 16))


def test_a_target_scored_twice_and_one_left_out_are_counted():
    units = [[Reading(0, 16, 0)], [Reading(8, 24, 14)], [Reading(18, 34, 25)]]
    plan = Plan(units, rows=2, length=16, cached=False)
    _, count = score(place_and_context, torch.arange(35), plan)
    assert count.tolist() == [1] * 14 + [2, 2] + [1] * 8 + [0] + [1] * 9


@pytest.fixture(scope="module")
def text_ids():
    sp = load(tokenizer_model())
    return torch.tensor(document_ids(sp, *prose())), sp.vocab_size()


def test_more_context_does_not_hurt(exact, tiny, text_ids):
    """A trained model scores better with a sliding window. One that sees the future scores worse:
    what it learnt to read off later tokens is missing at the end of each window, where the sliding
    window scores."""
    ids, vocab_size = text_ids
    hp = tiny(
        vocab_size=vocab_size, layout="G A", eval_stride=4, eval_seq_len=32, val_batch_size=1024
    )
    model = GPT(hp)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        starts = 770 * step + torch.arange(0, 512, 32)
        index = starts[:, None] + torch.arange(32)
        loss = model(ids[index], ids[index + 1]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = ids[-8000:]  # enough that the difference is no accident
    plans = [window_plan(held_out, hp, stride) for stride in (4, 32)]
    slid, apart = (score(model, held_out, plan)[0].mean() for plan in plans)
    assert apart < math.log(vocab_size) - 1, "it learnt something"
    assert slid < apart + 1e-3


# ---- bits per byte


@pytest.fixture
def validation(tmp_path, tiny) -> Validation:
    return Validation(tiny(**write_corpus(tmp_path)))


def load_sp(validation):
    """The tokenizer that write_corpus put beside the shards."""
    return load((validation.paths[0].parent / "tokenizer.model").read_bytes())


def read_tokens(validation) -> list[int]:
    """What write_corpus put into the validation shard, read here."""
    return np.concatenate([np.fromfile(path, "<u2")[512:] for path in validation.paths]).tolist()


def test_validation_counts_the_bytes_of_the_text(validation):
    ids = read_tokens(validation)
    assert validation.tokens.tolist() == ids
    text_bytes = decoded_bytes(load_sp(validation), ids)
    assert validation.bytes == text_bytes == validation.target_bytes.sum()
    assert len(validation.target_bytes) == len(ids) - 1
    assert validation.starts.tolist() == [i for i, token in enumerate(ids) if token == BOS]
    assert len(validation.starts) > 1


def test_validation_reads_all_shards(tmp_path, tiny):
    hp = tiny(**write_corpus(tmp_path))
    alone = Validation(hp)
    text = "Another document, in another shard."
    write_shard(tmp_path / "fineweb_val_000001.bin", document_ids(load_sp(alone), text))
    both = Validation(hp)
    assert both.bytes == alone.bytes + len(text)
    assert both.starts.tolist() == [*alone.starts, len(alone.tokens)]
    assert both.text_bytes.tolist() == [*alone.text_bytes, len(text)]


def validate(validation, scores, monkeypatch, **options) -> dict:
    """As a pass over the validation text reports them."""
    monkeypatch.setattr(train_gpt, "score", lambda *_: scores)
    return train_gpt.validate(None, validation, None, "label", **options)


def test_loss_and_bpb_by_hand(validation, monkeypatch):
    nats = torch.rand(len(validation.target_bytes), dtype=torch.float64)
    count = torch.ones(len(nats))
    found = validate(validation, (nats, count), monkeypatch)
    text_bytes = decoded_bytes(load_sp(validation), read_tokens(validation))
    bits = math.fsum(n / math.log(2) for n in nats.tolist())
    assert found["val_loss"] == pytest.approx(math.fsum(nats.tolist()) / len(nats), rel=1e-12)
    assert found["val_bpb"] == pytest.approx(bits / text_bytes, rel=1e-12)
    assert found["nats"] is nats and found["count"] is count


def test_a_pass_is_logged_with_its_own_time_or_the_one_that_is_given(
    validation, monkeypatch, caplog
):
    monkeypatch.setattr(train_gpt.log, "handlers", [])
    monkeypatch.setattr(train_gpt.log, "propagate", True)
    ones = torch.ones(len(validation.target_bytes), dtype=torch.float64)
    bpb = len(ones) / math.log(2) / validation.bytes
    clock = SimpleNamespace(perf_counter=iter([100.0, 102.5, 200.0, 203.0]).__next__)
    monkeypatch.setattr(train_gpt, "time", clock)
    with caplog.at_level(logging.INFO, "train_gpt"):
        assert validate(validation, (ones, ones), monkeypatch)["seconds"] == 2.5
        assert validate(validation, (ones, ones), monkeypatch, timing="so long")["seconds"] == 3.0
    start = f"label val_loss:1.0000 val_bpb:{bpb:.4f}"
    assert caplog.messages == [f"{start} eval_time:2500ms", f"{start} so long"]


@pytest.mark.parametrize(
    "options",
    [dict(), dict(vocab_size=345), dict(vocab_size=1000, multilingual=True)],
    ids=["384", "345", "1000_multilingual"],
)
def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary(
    tmp_path, tiny, options, monkeypatch
):
    """log2(V) bits a token, and the bytes a token has with this tokenizer: no constant of another
    one."""
    sp = load(tokenizer_model(**options))
    (tmp_path / "t.model").write_bytes(tokenizer_model(**options))
    ids = document_ids(sp, *list(DOCUMENTS.values()), *prose()[:5])
    write_shard(tmp_path / "fineweb_val_000000.bin", ids)
    V = sp.vocab_size()
    hp = tiny(data_path=str(tmp_path), tokenizer_path=str(tmp_path / "t.model"), vocab_size=V)
    validation = Validation(hp)
    model = stands_for_a_model(lambda x, y, cache: torch.full(x.shape, math.log(V)))
    scores = score(model, validation.tokens, window_plan(validation.tokens, hp, 16))
    bytes_per_token = decoded_bytes(sp, ids) / (len(ids) - 1)
    bpb = validate(validation, scores, monkeypatch)["val_bpb"]
    assert bpb == pytest.approx(math.log2(V) / bytes_per_token, rel=1e-6)


WRONG_TABLES = {
    "space_twice": lambda base, space, boundary: (base + space, space, boundary),
    "space_never": lambda base, space, boundary: (base, space & False, boundary),
    "control_counted": lambda base, space, boundary: (base + boundary, space, boundary),
    "no_boundary": lambda base, space, boundary: (base, space | boundary, boundary & False),
}


@pytest.mark.parametrize("wrong", WRONG_TABLES)
def test_a_wrong_byte_table_is_noticed(tmp_path, tiny, monkeypatch, wrong):
    """By decoding every document."""
    hp, right = tiny(**write_corpus(tmp_path)), train_gpt.build_sentencepiece_luts
    audit = train_gpt.Audit()
    train_gpt.check_bytes(audit, hp, Validation(hp))
    assert audit.checks["bytes"]["passed"]
    tables = WRONG_TABLES[wrong]
    monkeypatch.setattr(train_gpt, "build_sentencepiece_luts", lambda *args: tables(*right(*args)))
    train_gpt.check_bytes(audit, hp, Validation(hp))
    assert not audit.checks["bytes"]["passed"] and audit.checks["bytes"]["wrong_documents"] > 0


def test_only_the_official_split_is_official(tmp_path, tiny, monkeypatch):
    """50,000 documents of 151,080,000 bytes, give or take a few: by whatever tokenizer."""
    hp = tiny(**write_corpus(tmp_path))
    assert not Validation(hp).is_official
    for documents, size, official in [
        (50_000, 151_080_000, True),
        (50_000, 151_020_000, True),
        (50_000, 151_090_000, True),
        (49_999, 151_080_000, False),
        (50_001, 151_080_000, False),
        (10_000, 151_080_000, False),
        (50_000, 164_594_398, False),
        (50_000, 176_332_748, False),
        (50_000, 151_019_999, False),
        (50_000, 151_090_001, False),
    ]:
        write_shard(tmp_path / "fineweb_val_000000.bin", [BOS] * documents)
        sizes = torch.tensor([size - 1, 1], dtype=torch.int32)
        monkeypatch.setattr(train_gpt, "token_bytes", lambda *_, sizes=sizes: sizes)
        assert Validation(hp).is_official is official


@pytest.mark.parametrize(
    "ids, error",
    [
        ([BOS], "with text"),
        ([BOS, BOS, 0], "with text"),
        ([BOS, 5000, 6], "5000"),
        ([5, 6, 7], "BOS"),
    ],
    ids=["one_token", "no_text", "outside_vocabulary", "no_document"],
)
def test_a_validation_split_that_cannot_be_scored_is_refused(tmp_path, tiny, ids, error):
    hp = tiny(**write_corpus(tmp_path))
    write_shard(tmp_path / "fineweb_val_000000.bin", ids)
    with pytest.raises(ValueError, match=f"fineweb_val_000000.bin.*{error}"):
        Validation(hp)
