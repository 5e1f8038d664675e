"""The cache: a text in pieces scores as the text in one piece, and nothing else is in it."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from toys import in_float64, other, random_ids, system, tiny_of

from train_gpt import BOS_ID

CACHES = {  # system, options
    "G": ("train_gpt", dict(layout="G")),
    "S": ("train_gpt", dict(layout="S")),
    "A": ("train_gpt", dict(layout="A2 S")),
    "window 1": ("train_gpt", dict(layout="S2", window_size=1)),
    "window 2": ("train_gpt", dict(layout="S G", window_size=2)),
    "G alone": ("train_gpt", dict(layout="G2")),
    "shared": ("layouts", dict(layout="G S G=0 S=1")),
    "loop": ("layouts", dict(layout="A (G S)x2 A")),
    "record": ("train_gpt", dict(layout="G2 S G S")),
    "kv_share": ("kv_share", dict(layout="G4")),
    "no n-grams": ("kv_share", dict(layout="G2", ngram_vocab_size=0)),
    "crawler": ("crawler", dict(layout="A (A G)x2 S")),
    "baseline": ("baseline", dict(layout="A S2 A")),
    "transformer": (
        "transformer",
        dict(layout="S (A)x2 G A", parallel_start_layer=2, num_heads=4, num_kv_heads=2),
    ),
    "gdn_hybrid": ("gdn_hybrid", dict(layout="G S S=1")),
    "hybrid_1895": (
        "hybrid_1895",
        dict(layout="G A (A)x2 G", parallel_start_layer=2, num_heads=4, num_kv_heads=2),
    ),
}
SOME = ["record", "shared", "loop", "kv_share", "crawler", "transformer", "hybrid_1895"]


def make(lively, name, **changes):
    """(hyperparameters, model) of one of CACHES, with room for 70 tokens."""
    which, options = CACHES[name]
    hp = tiny_of(which, **dict(eval_seq_len=70) | options | changes)
    return hp, lively(system(which).GPT(hp))


def in_chunks(model, ids, chunk):
    """Logits of ids, the cache carried from chunk to chunk; and the cache."""
    cache, logits = model.new_cache(len(ids)), []
    for part in ids.split(chunk, 1):
        out, cache = model(part, cache=cache)
        logits.append(out)
    return torch.cat(logits, 1), cache


def tensors(cache):
    """All tensors of a cache."""
    return [cache.ids, *(x for layer in cache.layers for x in layer if x is not None)]


def packed_ids(hp, T=70):
    """Rows that begin with BOS, inside a document, and with BOS at and around borders of chunks."""
    ids = random_ids(hp, B=4, T=T)
    starts = (0, 7, 8, 30), (), (6, 21, 63, 64), (1, 2, 20, 42, 62, 69)
    for row, positions in zip(ids, starts, strict=True):
        row[[t for t in positions if t < T]] = BOS_ID
    return ids


@pytest.mark.parametrize(
    "name, looping",
    [*((name, True) for name in CACHES), ("transformer", False), ("hybrid_1895", False)],
)
@torch.no_grad()
def test_a_text_in_chunks_is_the_text(lively, monkeypatch, name, looping):
    """In float64: the same sums are rounded otherwise."""
    hp, model = make(lively, name)
    model = in_float64(monkeypatch, model)
    if not looping:
        model.set_looping(False)
    ids = packed_ids(hp)
    whole = model(ids)
    for chunk in (1, 3, 7, 64, 70):
        logits, cache = in_chunks(model, ids, chunk)
        torch.testing.assert_close(logits, whole, atol=1e-9, rtol=1e-9)
        shapes = [x.shape for x in tensors(model.new_cache(4))]
        assert [x.shape for x in tensors(cache)] == shapes
        assert len(cache.layers) == len(model.order)


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_a_text_in_chunks_is_the_text_in_float32_too(lively, name):
    hp, model = make(lively, name)
    ids = packed_ids(hp)
    for chunk in (7, 64):
        torch.testing.assert_close(in_chunks(model, ids, chunk)[0], model(ids), atol=3e-4, rtol=0)


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_a_cache_is_not_changed_by_what_continues_it(lively, name):
    hp, model = make(lively, name)
    first, second = packed_ids(hp, T=40).split(20, 1)
    _, cache = model(first, cache=model.new_cache(4))
    before = [x.clone() for x in tensors(cache)]
    logits, _ = model(second, cache=cache)
    assert all(torch.equal(x, y) for x, y in zip(tensors(cache), before, strict=True))
    assert torch.equal(model(second, cache=cache)[0], logits)


@torch.no_grad()
def test_full_attention_keeps_a_window_of_eval_seq_len(lively):
    """Token by token, A is S whose window is as long as its cache."""
    hp, model = make(lively, "A", layout="A2", eval_seq_len=16)
    windowed = system("train_gpt").GPT(tiny_of("train_gpt", layout="S2", window_size=16))
    windowed.load_state_dict(model.state_dict())
    ids = packed_ids(hp, T=50)
    logits = in_chunks(model, ids, 1)[0]
    torch.testing.assert_close(logits, windowed(ids), atol=3e-4, rtol=0)
    assert (logits - model(ids))[1, 40:].abs().max() > 0.01


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_the_past_matters_until_bos_and_not_behind_it(lively, name):
    hp, model = make(lively, name)
    past, future = random_ids(hp, T=30), random_ids(hp, T=20)
    pasts = past, other(hp, past)
    one, two = (in_chunks(model, torch.cat((p, future), 1), 30)[0][:, 30:] for p in pasts)
    if hp.window_size > 1:
        assert ((one - two)[:, :2].abs().amax((-1, -2)) > 1e-3).all()
    future[:, 0] = BOS_ID
    one, two = (in_chunks(model, torch.cat((p, future), 1), 30)[0][:, 30:] for p in pasts)
    assert torch.equal(one, two)
    assert torch.equal(one, in_chunks(model, future, 20)[0])


@pytest.mark.parametrize("name", SOME)
def test_no_gradient_reaches_the_chunk_before(lively, name):
    hp, model = make(lively, name)
    cache, seen = model.new_cache(2), []
    model.tok_emb.register_forward_hook(lambda _, args, x: (x.retain_grad(), seen.append(x))[0])
    for part in random_ids(hp, T=20).split(10, 1):
        logits, cache = model(part, cache=cache)
        assert not any(x.requires_grad for x in tensors(cache))
    logits.square().sum().backward()
    assert seen[0].grad is None and (seen[1].grad[:, -10:].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", ["loop", "crawler", "transformer"])
@torch.no_grad()
def test_chunks_of_a_length_share_one_graph(lively, name):
    """A cache comes back laid out as it went in: else each chunk would be compiled again."""
    torch._dynamo.reset()
    hp, model = make(lively, name, window_size=6)
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=False)
    cache = model.new_cache(2)
    for chunk in random_ids(hp, B=2, T=64).split(16, 1):
        _, cache = compiled(chunk, cache=cache)
    assert graphs.frame_count == 1
