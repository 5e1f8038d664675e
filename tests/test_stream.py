"""Streams, and who reads what when, against loops that carry nothing from chunk to chunk.

a stream        every document alone, in one forward without a cache, in float64; of every system
its order       documents from left to right, each in the row that has least to read
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from corpus import BOS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import (
    Spied,
    all_in_float64,
    documents_of,
    each_document_alone,
    in_lockstep,
    nats_by_hand,
    read_by_ranks,
    stands_for_a_model,
    text_of,
    windows_of,
)
from toys import of_layout, system, toy

import train_gpt
from train_gpt import (
    GPT,
    Plan,
    Reading,
    final_plan,
    score,
    steps_of,
    stream_plan,
    window_plan,
    world,
)

# 7 and 8, 3 and 4: a chunk and one more; the last ends inside a chunk
LENGTHS = (1, 2, 1, 7, 8, 3, 4, 41, 2, 64, 5)


@pytest.fixture
def small(tiny):
    """small(**overrides) -> Hyperparameters of a model of two blocks."""
    sizes = dict(layout="G S", model_dim=16, mlp_mult=1.0, gdn_head_dim=8, head_dim=8)
    sizes |= dict(eval_seq_len=32, window_size=12, eval_chunk=8, eval_rows=4)
    return lambda **overrides: tiny(**(sizes | overrides))


@pytest.fixture
def exact(monkeypatch):
    yield from all_in_float64(monkeypatch)


# ---- a stream


def check_stream(hp, model, tokens) -> torch.Tensor:
    nats, count = score(model, tokens, stream_plan(tokens, hp))
    assert nats.dtype == torch.float64 and count.dtype == torch.int32
    assert count.tolist() == [1] * (len(tokens) - 1)
    torch.testing.assert_close(nats, each_document_alone(model, tokens), rtol=0, atol=1e-9)
    return nats


@pytest.mark.parametrize("chunk", [1, 3, 7, 64, 300], ids="chunk_{}".format)
@pytest.mark.parametrize("layout", ["G2 S G S=2", "G2 S G S", "G S", "S2", "G4", "A G"])
def test_a_stream_is_each_document_alone(lively, exact, layout, chunk):
    """And so the forward over the whole text, in which BOS keeps documents apart."""
    hp, model = of_layout(layout, eval_chunk=chunk, eval_rows=3)
    tokens = text_of(*LENGTHS)
    lively(model)
    nats = check_stream(hp, model, tokens)
    with torch.no_grad():
        whole = nats_by_hand(model, tokens[:-1], tokens[1:])
    torch.testing.assert_close(nats, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "parts",
    [
        dict(layout="S2"),
        dict(window_size=1),
        dict(window_size=1, layout="S2"),
        dict(layout="A S", xsa=False),
        dict(layout="G (S G)x2 S"),
    ],
    ids=lambda parts: "_".join(parts),
)
def test_every_part_has_its_cache(lively, exact, parts):
    hp, model = of_layout(**dict(layout="G2 S G S") | parts, eval_chunk=3, eval_rows=4)
    check_stream(hp, lively(model), text_of(*LENGTHS))


SYSTEMS = [
    ("kv_share", dict(layout="G4")),
    ("kv_share", dict(layout="G2")),
    ("kv_share", dict(layout="G2", ngram_vocab_size=0)),
    ("kv_share", dict(layout="G4", ngram_vocab_size=0)),
    ("pure_gdn", {}),
    ("crawler", dict(layout="A (A G)x3 S")),
    ("transformer", dict(layout="A (G)x2 S A", parallel_start_layer=0)),
    ("transformer", dict(layout="A S G", parallel_start_layer=2, xsa=False)),
    ("transformer", dict(layout="S (S)x2 S2", parallel_start_layer=3)),
    ("hybrid_1895", dict(layout="G A (A)x2 G", parallel_start_layer=3)),
]


@pytest.mark.parametrize("name, options", SYSTEMS, ids=lambda x: x if isinstance(x, str) else None)
def test_a_stream_of_another_system_is_each_document_alone(lively, exact, name, options):
    """Skips, loops, lanes, n-grams, shared keys and values: each has what it needs in the cache."""
    hp = toy(name, eval_chunk=3, eval_rows=4, **options)
    check_stream(hp, lively(system(name).GPT(hp)), text_of(*LENGTHS))


@pytest.mark.parametrize("rows", [1, 2, 5, 40], ids="rows_{}".format)
@pytest.mark.parametrize("cut", [0, 1, 3, 5], ids="cut_{}".format)
def test_a_stream_of_any_rows_ends_anywhere(small, lively, exact, rows, cut):
    """In a chunk, behind one, in a document of one token, in the BOS of the next document."""
    hp = small(eval_chunk=4, eval_rows=rows)
    tokens = text_of(*LENGTHS, end=True)
    check_stream(hp, lively(GPT(hp)), tokens[: len(tokens) - cut])


FEW = [[5, 6], [BOS, 6], [BOS, BOS], [5, BOS], [BOS] * 9, [5, 6, 7, BOS, 5, 6, 7, 8, 9]]


@pytest.mark.parametrize("tokens", FEW, ids=str)
def test_streams_of_few_tokens(small, lively, exact, tokens):
    """The first token begins a document, whatever it is; the last begins none."""
    hp = small(eval_chunk=3, eval_rows=2)
    check_stream(hp, lively(GPT(hp)), torch.tensor(tokens))


@given(data=st.data())
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_streams_of_any_documents(small, lively, exact, data):
    chunk, rows = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, 3 * chunk + 1), min_size=2, max_size=9))
    tokens = text_of(*lengths, seed=chunk, end=data.draw(st.booleans()))
    tokens = tokens if data.draw(st.booleans()) else torch.cat((torch.tensor([7]), tokens))
    torch.manual_seed(1)
    hp = small(eval_chunk=chunk, eval_rows=rows)
    check_stream(hp, lively(GPT(hp)), tokens)


def test_full_attention_remembers_the_context_of_windows(small, lively, exact):
    """EVAL_SEQ_LEN - 1 tokens before each chunk: without the parts that look back further, what can
    be seen is what a forward over just these tokens sees."""
    hp = small(layout="A", eval_seq_len=10, eval_stride=1, eval_chunk=4)
    model, tokens = lively(GPT(hp)), text_of(23, 9, 17)
    expected = []
    for a, b in documents_of(tokens):
        for t in range(a, b):
            seen = tokens[max(a, t - (t - a) % 4 - 9) : t + 1]
            targets = torch.cat((seen[1:], tokens[t + 1 : t + 2]))
            with torch.no_grad():
                expected.append(nats_by_hand(model, seen, targets)[-1])
    nats, _ = score(model, tokens, stream_plan(tokens, hp))
    torch.testing.assert_close(nats, torch.stack(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [2, 3, 8], ids="ranks_{}".format)
def test_ranks_share_the_documents(small, lively, exact, monkeypatch, size):
    """On 8 ranks of 2 rows some rows have none. All ranks make equally many steps: a forward may
    reduce."""
    hp = small(eval_chunk=4, eval_rows=2)
    model, tokens, calls = lively(GPT(hp)), text_of(*LENGTHS), []

    def run():
        calls.append(0)
        rank = world.rank

        def call(x, y):
            assert x.shape == y.shape == (2, 4)
            calls[rank] += 1

        return score(Spied(copy.deepcopy(model), call), tokens, stream_plan(tokens, hp))

    for nats, count in in_lockstep(monkeypatch, size, run):
        assert count.tolist() == [1] * (len(tokens) - 1)
        torch.testing.assert_close(nats, each_document_alone(model, tokens), rtol=0, atol=1e-9)
    assert len(set(calls)) == 1
    least = max(64 // 4, math.ceil(sum(-(-n // 4) for n in LENGTHS) / (2 * size)))
    assert least <= calls[0] <= least + 64 // 4, "rows are not balanced"


# ---- the order of reading


def units_of(lengths: list[int]) -> list[list[Reading]]:
    """Units of so many readings, no two readings alike."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        [Reading(i, i + 1, i) for i in range(start, start + length)]
        for start, length in zip(starts, lengths, strict=True)
    ]


def rows_of(units, count: int) -> list[list[tuple]]:
    """What each of so many rows reads, one after another."""
    steps = steps_of(Plan(units, count, 1, cached=True), "cpu")[:, 0]  # [steps, rows, 3]
    rows = steps.transpose(0, 1).tolist()
    return [[tuple(reading) for reading in row if any(reading)] for row in rows]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40), count=st.integers(1, 12))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_document_goes_to_the_first_row_that_has_least_to_read(lengths, count):
    """The rule written out."""
    units, rows = units_of(lengths), [[] for _ in range(count)]
    for unit in units:
        min(rows, key=len).extend(unit)
    assert rows_of(units, count) == rows


@pytest.mark.parametrize("windows", [1, 5, 6, 7, 50], ids="windows_{}".format)
@pytest.mark.parametrize("count", [1, 2, 3, 7], ids="rows_{}".format)
def test_windows_go_to_the_rows_in_turn(windows, count):
    units = units_of([1] * windows)
    assert rows_of(units, count) == [sum(units[i::count], []) for i in range(count)]


def read_by_rank(monkeypatch, tokens, plan, size: int) -> list[list[list[tuple]]]:
    """What each rank's rows read in each step, as a learner is told."""
    monkeypatch.setattr(world, "size", size)
    monkeypatch.setattr(world, "all_reduce", lambda x, *_: x)
    found = []
    for rank in range(size):
        steps, shares = [], []

        def after_step(step, nats, scored, share, steps=steps, shares=shares):
            steps.append([tuple(reading) for reading in step.tolist()])
            shares.append(share)
            for (start, end, first), row in zip(step.tolist(), scored.tolist(), strict=True):
                targets = [start + i for i, counts in enumerate(row) if counts]
                assert targets == [*range(first, end)]

        @stands_for_a_model
        def model(x, y, cache):
            nats = torch.zeros(x.shape)
            return nats if cache is None else (nats, cache)

        monkeypatch.setattr(world, "rank", rank)
        train_gpt.score(model, tokens, plan, SimpleNamespace(after_step=after_step))
        assert shares == [(i + 1) / len(steps) for i in range(len(steps))]
        found.append([[*row] for row in zip(*steps, strict=True)])
    return found


@pytest.mark.parametrize("size", [1, 2, 3], ids="ranks_{}".format)
@pytest.mark.parametrize("chunk", [1, 4, 500], ids="chunk_{}".format)
@pytest.mark.parametrize("part", ["all", "first_half", "second_half"])
def test_documents_are_read_from_left_to_right_by_all_rows_of_all_ranks(
    small, monkeypatch, part, chunk, size
):
    """Without a pause, each in the row that has least to read; and if the plan has a part of them
    only, that part."""
    hp, tokens = small(eval_chunk=chunk, eval_rows=2), text_of(*LENGTHS, *LENGTHS[::-1])
    plan, docs = stream_plan(tokens, hp), documents_of(tokens)
    half = dict(all=slice(None), first_half=slice(11), second_half=slice(11, None))[part]
    plan = plan._replace(units=plan.units[half])
    expected = read_by_ranks(docs[half], chunk, rows=2, size=size)
    expected = [[[(a, b, a) for a, b in row] for row in rows] for rows in expected]
    assert read_by_rank(monkeypatch, tokens, plan, size) == expected
    read = [t for rows in expected for row in rows for a, b, _ in row for t in range(a, b)]
    assert sorted(read) == [t for a, b in docs[half] for t in range(a, b)]


@pytest.mark.parametrize("rows", [1, 3], ids="rows_{}".format)
@pytest.mark.parametrize("size", [1, 2], ids="ranks_{}".format)
def test_windows_are_read_in_turn_by_all_rows_of_all_ranks(small, monkeypatch, size, rows):
    hp, tokens = small(eval_stride=5, val_batch_size=32 * rows), text_of(*LENGTHS)
    plan = window_plan(tokens, hp, 5)
    found = read_by_rank(monkeypatch, tokens, plan, size)
    steps = len(found[0][0])
    in_turn = [row[i] for i in range(steps) for rank in found for row in rank]
    windows = windows_of(len(tokens) - 1, 32, 5)
    assert steps == math.ceil(len(windows) / (rows * size))
    assert in_turn == windows + [(0, 0, 0)] * (steps * rows * size - len(windows))


@pytest.mark.parametrize("mode", ["sliding", "stream"])
def test_a_part_of_a_plan_scores_its_targets_and_nothing_else(small, lively, mode):
    hp = small(eval_mode=mode, eval_rows=1, val_batch_size=32)
    model, tokens = lively(GPT(hp)), text_of(*LENGTHS)
    plan = final_plan(tokens, hp)
    nats, _ = score(model, tokens, plan)
    part = plan._replace(units=plan.units[3:6])
    some, count = score(model, tokens, part)
    first, end = part.units[0][0].first, part.units[-1][-1].end
    inside = (torch.arange(len(nats)) >= first) & (torch.arange(len(nats)) < end)
    assert 0 < inside.sum() < len(nats) and torch.equal(count, inside.int())
    assert torch.equal(some[inside], nats[inside]) and not some[~inside].any()
