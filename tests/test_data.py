"""Bytes, shards, batches and hyperparameters against what they stand for.

Byte tables are compared with the decoded text, shards with the numbers written into them, the batches of all
ranks with the plain concatenation of the shards, hyperparameters with the strings put into the environment.
"""

import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from corpus import (
    BOS,
    CONTROL,
    DOCUMENTS,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    decoded_bytes,
    document_ids,
    edit_pieces,
    load,
    prose,
    tokenizer_model,
    write_shard,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    BOUNDS,
    PRESETS,
    Hyperparameters,
    TokenStream,
    TrainLoader,
    build_sentencepiece_luts,
    load_data_shard,
    parse_layout,
    token_bytes,
)

# -----------------------------------------------------------------------------
# bytes

TOKENIZERS = {
    "english": dict(),
    "few_merges": dict(vocab_size=345, character_coverage=0.98),
    "multilingual": dict(vocab_size=768, multilingual=True),
    "with_symbols": dict(vocab_size=400, user_defined_symbols="<tag>,日本,<a>", control_symbols="<ctl>,<b>"),
}


@pytest.fixture(params=TOKENIZERS)
def sp(request):
    return load(tokenizer_model(**TOKENIZERS[request.param]))


def table_bytes(sp, ids) -> list[int]:
    """Bytes of each token of `ids` but the first, from the table."""
    luts = build_sentencepiece_luts(sp, sp.vocab_size(), "cpu")
    ids = torch.tensor(ids)
    return token_bytes(luts, ids[:-1], ids[1:]).tolist()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_bytes_of_a_document_are_those_of_its_text(sp, name):
    ids = document_ids(sp, DOCUMENTS[name])
    assert sum(table_bytes(sp, ids)) == len(sp.decode(ids).encode())


def test_bytes_of_a_stream_are_those_of_its_documents(sp):
    ids = document_ids(sp, *prose(), *DOCUMENTS.values())
    assert sum(table_bytes(sp, ids)) == decoded_bytes(sp, ids)


def test_bytes_accumulate_token_by_token(sp):
    """Every prefix that ends between two characters has as many bytes of text as the table says so far."""
    text = "Le café 日本 <tag>: 3 naïve 🙂 tokens ok"
    ids = document_ids(sp, text)
    counted = np.cumsum([0, *table_bytes(sp, ids)])
    for end in range(1, len(ids) + 1):
        prefix = sp.decode(ids[:end])
        if "\ufffd" not in prefix:
            assert counted[end - 1] == len(prefix.encode()), prefix
    assert counted[-1] == len(text.encode())


NASTY = " \t\n\u2581\u3000ae\u0301é日🙂\x00\x01<s>3"


@given(text=st.text(max_size=40) | st.text(st.sampled_from(NASTY), max_size=40))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_bytes_of_any_text(text):
    for options in TOKENIZERS.values():
        sp = load(tokenizer_model(**options))
        ids = document_ids(sp, text)
        assert sum(table_bytes(sp, ids)) == len(sp.decode(ids).encode())


def edited_tokenizer():
    """One that has the pieces of the table below, an unused one among them."""
    model = tokenizer_model()
    V = load(model).vocab_size()
    return load(edit_pieces(model, {
        V - 1: ("▁hello", NORMAL), V - 2: ("hello", NORMAL), V - 3: ("▁gone", UNUSED),
        V - 4: ("<case>", USER_DEFINED), V - 5: ("▁ctl", CONTROL), V - 6: ("▁日本", NORMAL)}))


@pytest.mark.parametrize("previous, target, expected", [
    ("hello", "▁hello", 6),
    ("<0x41>", "▁hello", 6),
    ("<case>", "▁hello", 6),
    ("▁", "▁hello", 6),
    ("<s>", "▁hello", 5),
    ("</s>", "▁hello", 5),
    ("<unk>", "▁hello", 5),
    ("<pad>", "▁hello", 5),
    ("▁ctl", "▁hello", 5),
    ("▁gone", "▁hello", 5),
    ("<s>", "hello", 5),
    ("hello", "hello", 5),
    ("hello", "▁日本", 7),
    ("<s>", "▁日本", 6),
    ("hello", "▁", 1),
    ("<s>", "▁", 0),
    ("hello", "<0x00>", 1),
    ("<s>", "<0xE2>", 1),
    ("▁hello", "<0xFF>", 1),
    ("hello", "<case>", 6),
    ("hello", "<s>", 0),
    ("hello", "</s>", 0),
    ("hello", "<unk>", 0),
    ("hello", "<pad>", 0),
    ("hello", "▁ctl", 0),
    ("hello", "▁gone", 0),
    ("<s>", "▁gone", 0),
])
def test_bytes_of_one_token(previous, target, expected):
    sp = edited_tokenizer()
    ids = [sp.piece_to_id(piece) for piece in (previous, target)]
    assert [sp.id_to_piece(i) for i in ids] == [previous, target]
    assert table_bytes(sp, ids) == [expected]


def test_every_byte_piece_is_one_byte_and_every_control_piece_none():
    sp = edited_tokenizer()
    luts = build_sentencepiece_luts(sp, sp.vocab_size(), "cpu")
    assert [luts[0][sp.piece_to_id(f"<0x{byte:02X}>")].item() for byte in range(256)] == 256 * [1]
    silent = {sp.piece_to_id(piece) for piece in ("<pad>", "<s>", "</s>", "<unk>", "▁ctl", "▁gone")}
    assert set(luts[2].nonzero().flatten().tolist()) == silent
    assert all(luts[0][i] == 0 and not luts[1][i] for i in silent)


def test_documents_without_text_add_nothing(sp):
    ids = document_ids(sp, "one document")
    assert sum(table_bytes(sp, ids + 50_000 * [BOS])) == len("one document")


@pytest.mark.parametrize("options, vocab_size, expected", [
    pytest.param(dict(), 383, "VOCAB_SIZE", id="smaller_vocabulary"),
    pytest.param(dict(), 385, "VOCAB_SIZE", id="larger_vocabulary"),
    pytest.param(dict(bos_id=2, eos_id=1), 384, "BOS", id="other_bos"),
    pytest.param(dict(bos_id=-1, eos_id=1, unk_id=2), 384, "BOS", id="no_bos"),
])
def test_a_tokenizer_that_does_not_fit_is_refused(options, vocab_size, expected):
    sp = load(tokenizer_model(**options))
    with pytest.raises(ValueError, match="TOKENIZER_PATH.*" + expected):
        build_sentencepiece_luts(sp, vocab_size, "cpu")


def test_a_tokenizer_without_a_piece_for_the_space_is_refused():
    """It would write each lone space as three byte pieces: three bytes for one."""
    model = tokenizer_model()
    space = load(model).piece_to_id("▁")
    sp = load(edit_pieces(model, {space: ("something", NORMAL)}))
    assert sp.encode("a x", out_type=str)[1:4] == ["<0xE2>", "<0x96>", "<0x81>"]
    with pytest.raises(ValueError, match="TOKENIZER_PATH.*U\\+2581"):
        build_sentencepiece_luts(sp, sp.vocab_size(), "cpu")


# -----------------------------------------------------------------------------
# shards


def test_the_header_is_never_read_as_tokens(tmp_path):
    path = tmp_path / "shard.bin"
    write_shard(path, [BOS, *range(100, 200)], fill=0x7BAD7BAD)
    assert load_data_shard(path).tolist() == [BOS, *range(100, 200)]
    assert load_data_shard(path).dtype == torch.uint16


def test_all_uint16_values_survive(tmp_path):
    path = tmp_path / "shard.bin"
    write_shard(path, np.arange(65_536))
    assert load_data_shard(path).long().tolist() == list(range(65_536))


def test_a_change_of_the_tokens_in_memory_does_not_reach_the_file(tmp_path):
    path = tmp_path / "shard.bin"
    write_shard(path, [BOS, 5, 6])
    load_data_shard(path)[1] = 7
    assert load_data_shard(path).tolist() == [BOS, 5, 6]


def shard_bytes(tmp_path, tokens=10, **options) -> bytes:
    write_shard(tmp_path / "whole", range(tokens), **options)
    return (tmp_path / "whole").read_bytes()


def big_endian(data: bytes) -> bytes:
    return np.frombuffer(data[:1024], "<i4").astype(">i4").tobytes() + data[1024:]


BAD_SHARDS = {  # how it is made, what the message must say: what was found and what was expected
    "magic": (lambda p: shard_bytes(p, header=(20240521, 1, None)), ["20240521", "20240520"]),
    "version": (lambda p: shard_bytes(p, header=(20240520, 7, None)), ["version 7", "version 1"]),
    "count_too_large": (lambda p: shard_bytes(p, header=(20240520, 1, 11)), ["1044", "1046"]),
    "count_too_small": (lambda p: shard_bytes(p, header=(20240520, 1, 9)), ["1044", "1042"]),
    "count_zero": (lambda p: shard_bytes(p, tokens=0), ["0 tokens"]),
    "count_zero_before_a_token": (lambda p: shard_bytes(p, tokens=1, header=(20240520, 1, 0)), ["0 tokens"]),
    "count_negative": (lambda p: shard_bytes(p, header=(20240520, 1, -10)), ["-10", "1044"]),
    "truncated_body": (lambda p: shard_bytes(p)[:-2], ["1042", "1044"]),
    "half_a_token_missing": (lambda p: shard_bytes(p)[:-1], ["1043", "1044"]),
    "one_byte_too_long": (lambda p: shard_bytes(p) + b"\0", ["1045", "1044"]),
    "two_shards_in_one": (lambda p: 2 * shard_bytes(p), ["2088", "1044"]),
    "empty": (lambda p: b"", ["0 bytes", "1024"]),
    "half_a_header": (lambda p: shard_bytes(p)[:600], ["600 bytes", "1024"]),
    "header_only": (lambda p: shard_bytes(p)[:1024], ["1024", "1044"]),
    "big_endian": (lambda p: big_endian(shard_bytes(p)), ["20240520"]),
    "text": (lambda p: b"These are not tokens. " * 100, ["20240520"]),
    "without_header": (lambda p: np.arange(5000, dtype="<u2").tobytes(), ["20240520"]),
}


@pytest.mark.parametrize("damage", BAD_SHARDS)
def test_a_damaged_shard_is_refused(tmp_path, damage):
    make, expected = BAD_SHARDS[damage]
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(make(tmp_path))
    for read in (load_data_shard, lambda _: TokenStream(str(tmp_path), "train", 1024)):
        with pytest.raises(ValueError) as error:
            read(path)
        assert all(word in str(error.value) for word in [str(path), *expected]), str(error.value)


def test_a_missing_shard_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_data_shard(tmp_path / "no_such_shard.bin")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_without_shards_names_the_variable(tmp_path, split):
    write_shard(tmp_path / f"fineweb_{split}_bytes_000000.bin", [0, 5, 6])
    with pytest.raises(FileNotFoundError, match=f"DATA_PATH={tmp_path}.*fineweb_{split}"):
        TokenStream(str(tmp_path), split, 1024)


def test_byte_sidecars_are_not_tokens(tmp_path):
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", [0, 999, 999])
    write_shard(tmp_path / "fineweb_val_000000.bin", [BOS, 5, 6])
    write_shard(tmp_path / "fineweb_train_000000.bin", [BOS, 7, 8])
    stream = TokenStream(str(tmp_path), "val", 100)
    assert stream.read(0, len(stream)).tolist() == [BOS, 5, 6]


@pytest.mark.parametrize("folder", ["plain", "_bytes_", "with space", "fineweb [sp1024]", "what?", "star*"])
def test_any_folder_name_will_do(tmp_path, folder):
    (tmp_path / folder).mkdir()
    write_shard(tmp_path / folder / "fineweb_val_000000.bin", [BOS, 5, 6])
    assert len(TokenStream(str(tmp_path / folder), "val", 100)) == 3


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    for i in reversed(range(12)):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", [BOS, 50 + i])
    stream = TokenStream(str(tmp_path), "train", 100)
    assert stream.read(0, 24).tolist() == [token for i in range(12) for token in (BOS, 50 + i)]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_shard_missing_before_the_last_is_an_error(tmp_path, missing):
    for i in {0, 1, 2} - {missing}:
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", [BOS, 5])
    with pytest.raises(FileNotFoundError, match=f"DATA_PATH=.*fineweb_train_00000{missing}.bin was expected"):
        TokenStream(str(tmp_path), "train", 100)


@pytest.mark.parametrize("first", [0, 2, 99])
def test_a_stream_that_does_not_start_with_a_document_is_refused(tmp_path, first):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, [first, BOS, 5])
    with pytest.raises(ValueError, match=f"{path}.*{first}.*BOS"):
        TokenStream(str(tmp_path), "train", 100)


@pytest.mark.parametrize("token", [64, 65, 40_000, 65_535])
@pytest.mark.parametrize("shard", [0, 1])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, tiny, shard, token):
    for i in range(2):
        tokens = [BOS] + 511 * [63]
        tokens[-1] = token if i == shard else 63
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", tokens)
    stream = TokenStream(str(tmp_path), "train", 64)
    with pytest.raises(ValueError, match=f"fineweb_train_00000{shard}.bin.*{token}.*VOCAB_SIZE=64"):
        stream.read(0, len(stream))
    loader = TrainLoader(stream, tiny(vocab_size=64, train_batch_tokens=256))
    with pytest.raises(ValueError, match=f"fineweb_train_00000{shard}.bin"):  # read by the thread
        for _ in range(4):
            loader.next()
    loader.close()


# -----------------------------------------------------------------------------
# batches

PRIMES = (509, 2, 1013, 61, 251)  # tokens of the shards: no batch ends where a shard does
TOTAL = sum(PRIMES)


@pytest.fixture
def ring(tmp_path) -> np.ndarray:
    """Shards in which every token occurs once, so that a token tells its place; their plain concatenation."""
    tokens = np.arange(TOTAL) + BOS
    for i, part in enumerate(np.split(tokens, np.cumsum(PRIMES)[:-1])):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    return tokens


def open_stream(tmp_path) -> TokenStream:
    return TokenStream(str(tmp_path), "train", TOTAL + BOS)


def be_rank(monkeypatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(train_gpt, "RANK", rank)
    monkeypatch.setattr(train_gpt, "WORLD_SIZE", world_size)


def batches(tmp_path, hp, steps: int, position: int = 0) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """The micro-batches of some steps of this rank."""
    loader, micro_steps = TrainLoader(open_stream(tmp_path), hp, position), train_gpt.grad_accum_steps(hp)
    taken = [[tuple(side.numpy() for side in loader.next()) for _ in range(micro_steps)] for _ in range(steps)]
    loader.close()
    return taken


@pytest.mark.parametrize("start, count", [
    (0, 1), (0, TOTAL), (508, 2), (509, 3), (510, 2), (TOTAL - 1, 2), (TOTAL - 1, TOTAL + 2), (TOTAL, 5),
    (7 * TOTAL + 600, 2 * TOTAL + 1)])
def test_the_stream_is_a_ring_over_all_shards(tmp_path, ring, start, count):
    expected = [ring[i % TOTAL] for i in range(start, start + count)]
    assert open_stream(tmp_path).read(start, count).tolist() == expected
    assert len(open_stream(tmp_path)) == TOTAL


def test_one_epoch_covers_every_token_of_every_shard(tmp_path, ring, tiny):
    hp = tiny(train_batch_tokens=256, train_seq_len=32, grad_accum_steps=2)
    steps = -(-TOTAL // 256)
    assert steps * 256 > TOTAL  # the last step goes round the ring
    for step, micro_batches in enumerate(batches(tmp_path, hp, steps)):
        place = np.arange(step * 256, (step + 1) * 256)
        inputs, targets = (np.concatenate(side).flatten() for side in zip(*micro_batches, strict=True))
        assert np.array_equal(inputs, ring[place % TOTAL])
        assert np.array_equal(targets, ring[(place + 1) % TOTAL])
        assert all(x.shape == y.shape == (4, 32) for x, y in micro_batches)


@pytest.mark.parametrize("accumulation", [0, 1, 2, 3], ids="accumulation_{}".format)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8], ids="ranks_{}".format)
def test_ranks_share_the_batch_of_one_rank(tmp_path, ring, tiny, monkeypatch, world_size, accumulation):
    hp = tiny(train_batch_tokens=1536, train_seq_len=32, grad_accum_steps=accumulation)
    place = np.arange(1536, 3072)  # the second step
    seen = []
    for rank in range(world_size):
        be_rank(monkeypatch, rank, world_size)
        micro_batches = batches(tmp_path, hp, 2)[1]
        assert len(micro_batches) == (accumulation or 8 // world_size)
        for x, y in micro_batches:
            assert x.shape == y.shape == (1536 // (len(micro_batches) * world_size * 32), 32)
            seen.append((x.flatten(), y.flatten()))
    for side, shift in (0, 0), (1, 1):  # disjoint, and together the whole span, inputs and targets
        tokens = np.concatenate([pair[side] for pair in seen])
        assert sorted(tokens) == sorted(ring[(place + shift) % TOTAL])


def test_micro_batches_are_the_same_however_many_ranks_share_them(tmp_path, ring, tiny, monkeypatch):
    hp = tiny(train_batch_tokens=768, train_seq_len=32, grad_accum_steps=0)
    sets = []
    for world_size in (1, 2, 4, 8):
        sets.append(set())
        for rank in range(world_size):
            be_rank(monkeypatch, rank, world_size)
            sets[-1] |= {x.tobytes() + y.tobytes() for x, y in batches(tmp_path, hp, 1)[0]}
    assert len(sets[0]) == 8
    assert sets[0] == sets[1] == sets[2] == sets[3]


@pytest.mark.parametrize("taken", [0, 2, 6, 18])  # micro-batches, two a step
def test_a_loader_resumes_from_its_position(tmp_path, ring, tiny, taken):
    hp = tiny(train_batch_tokens=256, train_seq_len=32, grad_accum_steps=2)
    loader = TrainLoader(open_stream(tmp_path), hp)
    for _ in range(taken):
        loader.next()
    position = loader.position
    loader.close()
    assert position == 128 * taken
    resumed = batches(tmp_path, hp, 2, position)
    expected = batches(tmp_path, hp, taken // 2 + 2)[taken // 2 :]
    assert all(np.array_equal(a, b) for p, q in zip(resumed, expected, strict=True)
               for s, t in zip(p, q, strict=True) for a, b in zip(s, t, strict=True))


@pytest.mark.parametrize("taken", [0, 1])
def test_a_closed_loader_gives_no_more_data(tmp_path, ring, tiny, taken):
    """However far the thread had come when it was closed: often enough for both outcomes of the race."""
    hp = tiny(train_batch_tokens=256)
    for _ in range(30):
        stream = open_stream(tmp_path)
        loader = TrainLoader(stream, hp)
        for _ in range(taken):
            loader.next()
        loader.close()
        for _ in range(2):
            with pytest.raises(RuntimeError):
                loader.next()
        with pytest.raises(IndexError):
            stream.read(0, 1)


@pytest.mark.parametrize("world_size, accumulation, batch, length", [
    (1, 1, 100, 64), (1, 2, 64, 64), (1, 0, 4 * 64, 64), (8, 2, 8 * 64, 64), (2, 3, 4 * 64, 64),
])
def test_a_batch_that_does_not_divide_is_refused(
        tmp_path, ring, tiny, monkeypatch, world_size, accumulation, batch, length):
    be_rank(monkeypatch, 0, world_size)
    hp = tiny(train_batch_tokens=batch, train_seq_len=length, grad_accum_steps=accumulation)
    with pytest.raises(ValueError, match=f"TRAIN_BATCH_TOKENS={batch}.*TRAIN_SEQ_LEN={length}"):
        TrainLoader(open_stream(tmp_path), hp)


@pytest.mark.parametrize("world_size", [3, 5, 16])
def test_ranks_that_do_not_divide_eight_need_accumulation(tmp_path, ring, tiny, monkeypatch, world_size):
    be_rank(monkeypatch, 0, world_size)
    with pytest.raises(ValueError, match=f"GRAD_ACCUM_STEPS=0.*WORLD_SIZE={world_size}"):
        TrainLoader(open_stream(tmp_path), tiny(train_batch_tokens=960, train_seq_len=32, grad_accum_steps=0))
    loader = TrainLoader(open_stream(tmp_path), tiny(train_batch_tokens=world_size * 32, train_seq_len=32))
    assert loader.next()[0].shape == (1, 32)
    loader.close()


# -----------------------------------------------------------------------------
# hyperparameters

OTHER = {bool: "1", int: "7", float: "0.015625", str: "some text"}  # a value of each type that no field has
VALID = {  # fields for which that value is impossible
    "preset": "demo", "layout": "A3 S", "xsa": "0", "eval_mode": "sliding", "ttt": "sgd", "vocab_size": "60000",
    "model_dim": "96", "num_heads": "12", "num_kv_heads": "2", "head_dim": "48", "rope_dims": "32",
    "mlp_mult": "2.25", "rope_base": "500.5", "logit_softcap": "15.5", "matrix_clip_sigmas": "9.75",
    "embed_clip_sigmas": "15.25", "eval_seq_len": "99", "max_wallclock_seconds": "99.5", "mlp_clip_sigmas": "9.25",
    "gptq_phases": "2", "embed_bits": "5",
}
# impossible without a loop, or with adapters
NEEDS = dict.fromkeys(("enable_looping_at", "inst_dim", "gptq_phases"), dict(LAYOUT="A (A)x2"))
NEEDS["eval_mode"] = dict(TTT="")


def test_the_record_is_the_defaults():
    assert PRESETS["record"] == {}
    hp = Hyperparameters.from_env({})
    assert hp.preset == "record"
    for field in fields(Hyperparameters):
        if field.name != "run_id":
            assert getattr(hp, field.name) == getattr(Hyperparameters(), field.name)
    assert hp.run_id != Hyperparameters.from_env({}).run_id


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_diff_of_the_defaults_under_the_environment(preset):
    hp = Hyperparameters.from_env(dict(PRESET=preset))
    default = Hyperparameters()
    for field in fields(Hyperparameters):
        if field.name not in ("preset", "run_id"):
            value = getattr(hp, field.name)
            assert value == PRESETS[preset].get(field.name, getattr(default, field.name))
            assert type(value) is field.type
    assert hp.preset == preset
    assert Hyperparameters.from_env(dict(PRESET=preset, SEED="5")).seed == 5
    back = {name: getattr(default, name) for name in PRESETS[preset]}  # the environment wins
    back = {name.upper(): str(int(value) if isinstance(value, bool) else value) for name, value in back.items()}
    hp = Hyperparameters.from_env(dict(PRESET=preset) | back)
    assert all(getattr(hp, name) == getattr(default, name) for name in PRESETS[preset])


@pytest.mark.parametrize("name", [field.name for field in fields(Hyperparameters)])
def test_every_field_is_read_from_its_variable(name):
    field = next(field for field in fields(Hyperparameters) if field.name == name)
    text = VALID.get(name, OTHER[field.type])
    also = NEEDS.get(name, {})
    hp = Hyperparameters.from_env({name.upper(): text} | also)
    value = getattr(hp, name)
    assert type(value) is field.type
    assert value == (text == "1" if field.type is bool else field.type(text))
    assert value != getattr(Hyperparameters(), name)
    if name != "preset":
        untouched = [f.name for f in fields(hp) if f.name.upper() not in (name.upper(), "RUN_ID", *also)]
        assert all(getattr(hp, other) == getattr(Hyperparameters(), other) for other in untouched)


def test_switches_are_zero_and_one():
    assert Hyperparameters.from_env(dict(XSA="0")).xsa is False
    assert Hyperparameters.from_env(dict(XSA="1", EVAL_ONLY="1")).eval_only is True


def test_a_base_is_overridden_and_left_as_it_is():
    base = Hyperparameters(model_dim=96, eval_stride=32, preset="demo")
    hp = Hyperparameters.from_env(dict(EVAL_STRIDE="16"), base=base)
    assert (hp.model_dim, hp.eval_stride, hp.preset) == (96, 16, "demo")
    assert base.eval_stride == 32


@pytest.mark.parametrize("name, text, expected", [
    ("SEED", "a lot", "int"),
    ("SEED", "", "int"),
    ("MODEL_DIM", "512.0", "int"),
    ("MODEL_DIM", "5e2", "int"),
    ("MATRIX_LR", "fast", "float"),
    ("MATRIX_LR", "0,1", "float"),
    ("XSA", "true", "0 or 1"),
    ("XSA", "", "0 or 1"),
    ("UNET_SKIPS", "2", "0 or 1"),
    ("EVAL_ONLY", "no", "0 or 1"),
    ("PRESET", "recrod", "record"),
    ("PRESET", "", "demo"),
])
def test_a_value_that_cannot_be_read_names_itself(name, text, expected):
    with pytest.raises(ValueError) as error:
        Hyperparameters.from_env({name: text})
    assert f"{name}={text!r}" in str(error.value) and expected in str(error.value)


POSITIVE = ("VOCAB_SIZE TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN MODEL_DIM MLP_MULT GDN_HEADS GDN_HEAD_DIM NUM_HEADS "
            "NUM_KV_HEADS HEAD_DIM WINDOW_SIZE ROPE_BASE LOGIT_SOFTCAP ITERATIONS EVAL_SEQ_LEN EVAL_STRIDE "
            "VAL_BATCH_SIZE MATRIX_CLIP_SIGMAS EMBED_CLIP_SIGMAS GPTQ_CALIBRATION_BATCHES MUON_BACKEND_STEPS "
            "MLP_CLIP_SIGMAS EVAL_CHUNK EVAL_ROWS TTT_EPOCHS TTT_CHUNK_TOKENS TTT_LORA_RANK TRAIN_LOG_EVERY "
            "NGRAM_DIM").split()
ANY_NUMBER = [f.name.upper() for f in fields(Hyperparameters) if f.type in (int, float)]
IMPOSSIBLE = [  # environment, the variable to blame, what else the message must say
    *((dict([(name, value)]), name, "") for name in POSITIVE for value in ("0", "-1")),
    *((dict([(name, value)]), name, expected)
      for value, expected in (("-0.1", "0 to 1"), ("1.01", "0 to 1"), ("nan", "0 to 1"))
      for name in ("WARMDOWN_FRAC", "MIN_LR", "EMA_DECAY", "EMA_START", "MUON_MOMENTUM_WARMUP_FRAC", "MUON_MOMENTUM",
                   "BETA1", "BETA2", "ENABLE_LOOPING_AT")),
    *((dict([(name, "-1")]), name, "expected 0 or up") for name in ANY_NUMBER
      if name not in POSITIVE and name.lower() not in BOUNDS),
    *((dict([(name, "-1")]), name, "") for name in ANY_NUMBER),
    (dict(EVAL_MODE="overlapping"), "EVAL_MODE", "sliding or stream"),
    (dict(EVAL_MODE=""), "EVAL_MODE", "sliding or stream"),
    (dict(TTT="adam"), "TTT", "sgd, lora"),
    (dict(TTT="lora", EVAL_MODE="sliding"), "TTT", "lora with EVAL_MODE=stream"),
    *((dict([(name, value)]), name, "8") for name in ("MATRIX_BITS", "EMBED_BITS", "LOOP_BITS") for value in "19"),
    *((dict(GPTQ_PHASES=value), "GPTQ_PHASES", "1, or 2 with a loop in LAYOUT") for value in "023"),
    (dict(GPTQ_PHASES="3", LAYOUT="A (A)x2"), "GPTQ_PHASES", "1, or 2 with a loop in LAYOUT"),
    (dict(PARALLEL_START_LAYER="2", LAYOUT="A2"), "PARALLEL_START_LAYER", "0 or the number of a block"),
    (dict(ATTN_GATE_DIMS="513"), "ATTN_GATE_DIMS", "MODEL_DIM=512"),
    (dict(INST_DIM="4", LAYOUT="A (A)x2", ENABLE_LOOPING_AT="0.5"), "INST_DIM", "0 without a constant loop"),
    (dict(INST_DIM="4"), "INST_DIM", "0 without a constant loop"),
    (dict(ENABLE_LOOPING_AT="0.5"), "ENABLE_LOOPING_AT", "0 without a loop in LAYOUT"),
    *((dict([(name, "nan")]), name, "") for name in ("MLP_MULT", "ROPE_BASE", "GPTQ_RESERVE_SECONDS")),
    (dict(VOCAB_SIZE="65537"), "VOCAB_SIZE", "65536"),
    (dict(NUM_KV_HEADS="3"), "NUM_KV_HEADS", "NUM_HEADS=8"),
    (dict(NUM_KV_HEADS="16"), "NUM_KV_HEADS", "NUM_HEADS=8"),
    (dict(ROPE_DIMS="15"), "ROPE_DIMS", "64"),
    (dict(ROPE_DIMS="66"), "ROPE_DIMS", "64"),
    (dict(ROPE_DIMS="-2"), "ROPE_DIMS", "0 or up"),
    (dict(SMEAR_DIMS="513"), "SMEAR_DIMS", "MODEL_DIM=512"),
    (dict(NGRAM_VOCAB_SIZE="1"), "NGRAM_VOCAB_SIZE", "0"),
    (dict(NGRAM_VOCAB_SIZE="-5"), "NGRAM_VOCAB_SIZE", "0"),
    (dict(EVAL_STRIDE="2049"), "EVAL_STRIDE", "EVAL_SEQ_LEN=2048"),
    (dict(GPTQ_RESERVE_SECONDS="600"), "GPTQ_RESERVE_SECONDS", "MAX_WALLCLOCK_SECONDS=600"),
    (dict(MAX_WALLCLOCK_SECONDS="5"), "GPTQ_RESERVE_SECONDS", "MAX_WALLCLOCK_SECONDS=5"),
    (dict(LAYOUT=""), "LAYOUT", "block"),
    (dict(LAYOUT="G5 X S"), "LAYOUT", "'X'"),
    (dict(LAYOUT="G0"), "LAYOUT", "'G0'"),
    (dict(LAYOUT="x2"), "LAYOUT", "'x2'"),
    (dict(LAYOUT="G S~0"), "LAYOUT", "block 0"),
    (dict(LAYOUT="S S~1"), "LAYOUT", "block 1"),
    (dict(LAYOUT="S S~0 S~1"), "LAYOUT", "block 1"),
    (dict(LAYOUT="S S~0 S=1"), "LAYOUT", "block 1"),
    (dict(LAYOUT="S (G=1)x2"), "LAYOUT", "block 1"),
    (dict(LAYOUT="G (S)x1"), "LAYOUT", "(blocks)x2 to x9"),
    (dict(LAYOUT="G (S)x2 (S)x2"), "LAYOUT", "at most one group"),
    (dict(LAYOUT="G2,S"), "LAYOUT", "'G2,S'"),
    (dict(LAYOUT="G S="), "LAYOUT", "'S='"),
    (dict(LAYOUT="G S=0"), "LAYOUT", "block 0"),
    (dict(LAYOUT="S S=1"), "LAYOUT", "block 1"),
    (dict(LAYOUT="S S=7"), "LAYOUT", "block 7"),
    (dict(LAYOUT="S S=0 S=1"), "LAYOUT", "block 1"),
]


@pytest.mark.parametrize("env, name, expected", IMPOSSIBLE,
                         ids=[",".join(f"{k}={v}" for k, v in env.items()) for env, _, _ in IMPOSSIBLE])
def test_an_impossible_value_names_itself(env, name, expected):
    with pytest.raises(ValueError) as error:
        Hyperparameters.from_env(env)
    variable, found, rest = re.fullmatch(r"(\w+)='?([^:]*?)'?: (.*)", str(error.value)).groups()
    assert variable == name and expected in rest
    assert found == env.get(name, found) or float(found) == float(env[name]) or env[name] == "nan"


@pytest.mark.parametrize("every", ["TRAIN_LOG_EVERY", "VAL_LOSS_EVERY"])
def test_an_interval_is_not_negative(every):
    with pytest.raises(ValueError, match=every + "=-1"):
        Hyperparameters.from_env({every: "-1"})


@pytest.mark.parametrize("env", [
    dict(EVAL_STRIDE="2048"), dict(NUM_KV_HEADS="8"), dict(NUM_KV_HEADS="1"), dict(ROPE_DIMS="0"),
    dict(ROPE_DIMS="64"), dict(SMEAR_DIMS="0"), dict(SMEAR_DIMS="512"), dict(NGRAM_VOCAB_SIZE="0"),
    dict(NGRAM_VOCAB_SIZE="2"), dict(MATRIX_BITS="2"), dict(MATRIX_BITS="8"), dict(EMA_DECAY="0"),
    dict(MIN_LR="1"), dict(VOCAB_SIZE="65536"), dict(GPTQ_RESERVE_SECONDS="0"),
    dict(MAX_WALLCLOCK_SECONDS="0"), dict(MAX_WALLCLOCK_SECONDS="inf"),
    dict(MAX_WALLCLOCK_SECONDS="0", GPTQ_RESERVE_SECONDS="99"), dict(EVAL_SECONDS="0"),
    dict(LOOP_BITS="8"), dict(ATTN_GATE_DIMS="512"), dict(CURRICULUM=""),
], ids=lambda env: ",".join(f"{k}={v}" for k, v in env.items()))
def test_the_border_of_what_is_possible_is_possible(env):
    hp = Hyperparameters.from_env(env)
    assert all(getattr(hp, name.lower()) == (float(value) if value else value) for name, value in env.items())


def test_the_border_of_what_is_possible_in_a_loop():
    loop = dict(LAYOUT="A (A)x2")
    assert Hyperparameters.from_env(loop | dict(ENABLE_LOOPING_AT="1")).enable_looping_at == 1.0
    assert Hyperparameters.from_env(loop | dict(INST_DIM="1")).inst_dim == 1
    assert Hyperparameters.from_env(loop | dict(GPTQ_PHASES="2")).gptq_phases == 2
    assert Hyperparameters.from_env(dict(LAYOUT="A2", PARALLEL_START_LAYER="1")).parallel_start_layer == 1
    assert Hyperparameters.from_env(dict(LAYOUT="(A)x2", UNET_SKIPS="1")).unet_skips is True
    with pytest.raises(ValueError, match="UNET_SKIPS=True: expected 0 for a single pass"):
        Hyperparameters.from_env(dict(LAYOUT="A", UNET_SKIPS="1"))


@pytest.mark.parametrize("layout, expected", [
    ("G", [("G", 0, "")]),
    ("A2", [("A", 0, ""), ("A", 1, "")]),
    ("G2 S G1 S=2", [("G", 0, ""), ("G", 1, ""), ("S", 2, ""), ("G", 3, ""), ("S", 2, "=")]),
    ("S S2=0", [("S", 0, ""), ("S", 0, "="), ("S", 0, "=")]),
    ("  A \n S  ", [("A", 0, ""), ("S", 1, "")]),
    ("G10 G=9", [*(("G", i, "") for i in range(10)), ("G", 9, "=")]),
    ("G G~0 g2~0 s S=4", [("G", 0, ""), ("G", 0, "~"), ("g", 0, "~"), ("g", 0, "~"), ("s", 4, ""), ("S", 4, "=")]),
])
def test_layouts_written_out(layout, expected):
    assert parse_layout(layout) == (expected, list(range(len(expected))))


@pytest.mark.parametrize("layout, kinds, order", [
    ("(A)x2", "A", [0, 0]),
    ("A (A g)x3 A", "AAgA", [0, 1, 2, 1, 2, 1, 2, 3]),
    ("A2(S2)x2G", "AASSG", [0, 1, 2, 3, 2, 3, 4]),
    ("A3 (A3)x3 A5", "A" * 11, [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]),
    ("G (S)x9", "GS", [0, *[1] * 9]),
])
def test_the_order_of_passes_written_out(layout, kinds, order):
    assert parse_layout(layout) == ([(kind, i, "") for i, kind in enumerate(kinds)], order)


@pytest.mark.parametrize("text, expected", [
    ("", [(0.0, 3, 64)]), ("0:3x64", [(0.0, 3, 64)]),
    ("0:1x16 0.25:2x32 .5:3x64", [(0, 1, 16), (0.25, 2, 32), (0.5, 3, 64)]),
    *((bad, None) for bad in ("0.1:3x64", "0:4x64", "0:0x64", "0:3x48", "0:3x128", "0:3x0", "3x64", "0:3", "0:-1x64",
                              "0:1x16,0.5:3x64", "0:1x16 0.5:2x32 0.25:3x64", "0:1x16 1.5:2x32",
                              "0:1x16 0.5:2x32x", "0:1x16 0:3x64")),
])
def test_stages(tiny, text, expected):
    hp = tiny(train_batch_tokens=3 * 64, grad_accum_steps=3, curriculum=text)
    if expected is None:
        with pytest.raises(ValueError, match=f"^CURRICULUM='{re.escape(text)}': .*TRAIN_SEQ_LEN=64"):
            train_gpt.stages(hp)
    else:
        assert train_gpt.stages(hp) == expected
