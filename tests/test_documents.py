"""How many documents a forward has: attention on CUDA has room for as many as it was told
to expect. They are counted here at every call."""

import numpy as np
import pytest
import torch
from corpus import write_corpus, write_shard
from in_process import SMALL, modules_of, planted, run
from learning import MODES, TEXT
from streams import count_documents, in_lockstep, text_of
from toys import SYSTEMS

import train_gpt
from train_gpt import BOS_ID, TokenStream, final_plan, reserve, score, window_plan

LAYOUT = dict(
    kv_share="G2", crawler="A (A G)x2 A", transformer="A (A)x2 A", hybrid_1895="G A (A)x2"
)
SHORT = dict(eval_mode="stream", iterations=4, rope_dims=8, curriculum="0:1x32 0.5:1x64")
LENGTHS = [1, 1, 1, 40, 2, 1, 90, 3, 3, 1, 1, 1, 1, 1, 30, 7, 64, 1, 2, 21]


@pytest.fixture
def calls(monkeypatch):
    """(documents, room for them, rows, tokens) of each call of attention."""
    found, attend = [], train_gpt.masked_window_attention

    def counted(q, k, v, window, doc, most):
        found.append((count_documents(doc), most, *doc.shape))
        return attend(q, k, v, window, doc, most)

    monkeypatch.setattr(train_gpt, "masked_window_attention", counted)
    return found


@pytest.mark.parametrize("span", [1, 2, 7, 64, 300, 700])
@pytest.mark.parametrize("size", [1, 3], ids="ranks_{}".format)
def test_the_most_documents_of_a_span_are_those_of_the_fullest(tmp_path, monkeypatch, span, size):
    """Anywhere in the ring of all shards, however it is shared out."""
    tokens = text_of(*LENGTHS, *LENGTHS[::-1]).numpy()
    for i, part in enumerate(np.split(tokens, [100, 101, 350])):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    stream = TokenStream(str(tmp_path), "train", 64)
    ring = np.resize(tokens == BOS_ID, len(tokens) + span)
    expected = max(ring[i : i + span].sum() for i in range(len(tokens)))
    found = in_lockstep(monkeypatch, size, lambda: stream.most_documents(span))
    assert found == [expected] * size


def test_every_token_of_training_is_looked_at_before_the_first_step(tmp_path):
    tokens = text_of(*LENGTHS).numpy()
    tokens[-2] = 64
    write_shard(tmp_path / "fineweb_train_000000.bin", tokens)
    with pytest.raises(ValueError, match=r"fineweb_train_000000\.bin: token 64, not below"):
        TokenStream(str(tmp_path), "train", 64).most_documents(8)


@pytest.mark.parametrize("dense_first", [True, False])
def test_a_shape_that_two_texts_share_has_room_for_the_fullest(lively, dense_first):
    mode = MODES["sliding"]
    hp = mode.small(eval_seq_len=32, val_batch_size=96)
    texts, rooms = [text_of(*[2] * 60), text_of(120)], []
    for given in texts[:1], texts if dense_first else texts[::-1]:
        model = lively(mode.new_model(hp))
        for tokens in given:
            reserve(model, tokens, window_plan(tokens, hp, 32))
        rooms.append(model.most_documents)
    assert rooms[0] == rooms[1]


@pytest.mark.parametrize("stride", [5, 32])
@pytest.mark.parametrize("size", [1, 2], ids="ranks_{}".format)
def test_each_row_of_windows_has_room_for_the_fullest(lively, calls, monkeypatch, size, stride):
    """Three rows, each of which begins a document; the first token of one may be BOS."""
    mode = MODES["sliding"]
    hp = mode.small(eval_seq_len=32, eval_stride=stride, val_batch_size=96, layout="S")
    tokens = text_of(*LENGTHS, *LENGTHS)
    models = [lively(mode.new_model(hp)) for _ in range(size)]
    plan = window_plan(tokens, hp, stride)
    for model in models:
        assert reserve(model, tokens, plan) is plan
    again = iter(models)
    in_lockstep(monkeypatch, size, lambda: score(next(again), tokens, plan))
    ring = torch.cat((tokens, tokens[:32]))
    fullest = max((ring[i : i + 32] == BOS_ID).sum().item() for i in range(len(tokens)))
    assert {most for _, most, *_ in calls} == {3 * (fullest + 1)}
    assert all(found <= most for found, most, *_ in calls)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("chunk", [3, 16])
def test_all_ways_of_scoring_have_room(lively, calls, name, chunk):
    """Also while something is learned."""
    mode = MODES[name]
    hp = mode.small(eval_chunk=chunk, eval_rows=3)
    mode.score(lively(mode.new_model(hp)), text_of(*LENGTHS, *LENGTHS), hp)
    assert all(found <= most for found, most, *_ in calls)
    assert (len(calls) > 20) is (name != "sliding_sgd_shared")


# a segment of "stream_sgd" is two documents here, and not like the whole text
@pytest.mark.parametrize("name", [name for name in MODES if name != "stream_sgd"])
def test_the_room_stays_what_it_was_before_the_warm_up(lively, calls, name):
    """Another would be another graph."""
    mode = MODES[name]
    hp = mode.small()
    model, tokens, rooms = lively(mode.new_model(hp)), text_of(*TEXT, *TEXT), {}
    reserve(model, tokens, final_plan(tokens, hp))
    for text in (torch.randint(2, 64, (150,)), tokens):
        mode.score(model, text, hp)
    for _, most, *shape in calls:
        rooms.setdefault(tuple(shape), set()).add(most)
    assert all(len(room) == 1 for room in rooms.values()), rooms


@pytest.mark.parametrize(
    "name, dense, own",
    [
        *((name, "tv", {}) for name in SYSTEMS),
        # one shape for several texts, or for windows and streams
        ("train_gpt", "t", dict(val_batch_size=512)),
        ("train_gpt", "v", dict(eval_chunk=64, eval_rows=4)),
    ],
)
def test_a_whole_run_has_room_for_very_short_documents(tmp_path, name, dense, own):
    """From the warm-up to the last score; dense: in the training shard, that of validation."""
    script, calls = planted(tmp_path, name), []
    core, top = modules_of(script)
    owner, which = core, "masked_window_attention"
    if name == "hybrid_1895":
        owner, which = top.layers, "masked_sink_attention"
    attend = getattr(owner, which)

    def counted(q, k, v, other, doc, most):
        calls.append((count_documents(doc), most))
        return attend(q, k, v, other, doc, most)

    setattr(owner, which, counted)
    (tmp_path / "data").mkdir()
    settings = write_corpus(tmp_path / "data", train_tokens=6_000, val_tokens=900)
    for path in (tmp_path / "data").glob(f"fineweb_[{dense}]*.bin"):
        ids = train_gpt.load_data_shard(path).numpy().copy()
        ids[::3], ids[5:900:7] = BOS_ID, BOS_ID
        write_shard(path, ids)
    settings |= SHORT | dict(layout=LAYOUT.get(name, "G S")) | own
    if name in ("train_gpt", "transformer"):
        settings |= dict(ttt="lora")
    env = SMALL | {key.upper(): str(value) for key, value in settings.items()}
    result = run(script, tmp_path, env)
    assert result.returncode == 0, result.stderr
    assert all(found <= most for found, most in calls)
    assert (len(calls) > 50) is (name != "kv_share")
