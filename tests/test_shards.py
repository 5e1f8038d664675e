"""Shards, the ring of their tokens, and the batches of all ranks.

Shards are compared with the numbers written into them, batches with the plain concatenation of
the shards.
"""

import numpy as np
import pytest
import torch
from corpus import BOS, write_shard

import train_gpt
from train_gpt import TokenStream, TrainLoader, load_data_shard

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
    "version": (
        lambda p: shard_bytes(p, header=(20240520, 7, None)),
        ["7", "20240520"],
    ),
    "count_too_large": (lambda p: shard_bytes(p, header=(20240520, 1, 11)), ["1044", "1046"]),
    "count_too_small": (lambda p: shard_bytes(p, header=(20240520, 1, 9)), ["1044", "1042"]),
    "count_zero": (lambda p: shard_bytes(p, tokens=0), ["0 tokens"]),
    "count_zero_before_a_token": (
        lambda p: shard_bytes(p, tokens=1, header=(20240520, 1, 0)),
        ["0 tokens"],
    ),
    "count_negative": (lambda p: shard_bytes(p, header=(20240520, 1, -10)), ["-10", "1044"]),
    "truncated_body": (lambda p: shard_bytes(p)[:-2], ["1042", "1044"]),
    "half_a_token_missing": (lambda p: shard_bytes(p)[:-1], ["1043", "1044"]),
    "one_byte_too_long": (lambda p: shard_bytes(p) + b"\0", ["1045", "1044"]),
    "two_shards_in_one": (lambda p: 2 * shard_bytes(p), ["2088", "1044"]),
    "empty": (lambda p: b"", ["0 bytes", "20240520"]),
    "half_a_header": (lambda p: shard_bytes(p)[:600], ["600"]),
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
    missing = f"DATA_PATH={tmp_path}: no file fineweb_{split}_000000.bin"
    with pytest.raises(train_gpt.Refused, match=missing):
        TokenStream(str(tmp_path), split, 1024)


def test_byte_sidecars_are_not_tokens(tmp_path):
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", [0, 999, 999])
    write_shard(tmp_path / "fineweb_val_000000.bin", [BOS, 5, 6])
    write_shard(tmp_path / "fineweb_train_000000.bin", [BOS, 7, 8])
    stream = TokenStream(str(tmp_path), "val", 100)
    assert stream.read(0, len(stream)).tolist() == [BOS, 5, 6]


@pytest.mark.parametrize(
    "folder", ["plain", "_bytes_", "with space", "fineweb [sp1024]", "what?", "star*"]
)
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
    with pytest.raises(train_gpt.Refused, match=f"no file fineweb_train_00000{missing}.bin"):
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
    with pytest.raises(ValueError, match=f"fineweb_train_00000{shard}.bin.*{token}.*VOCAB_SIZE"):
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
    """Shards in which every token occurs once and tells its place; their concatenation."""
    tokens = np.arange(TOTAL) + BOS
    for i, part in enumerate(np.split(tokens, np.cumsum(PRIMES)[:-1])):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    return tokens


def open_stream(tmp_path) -> TokenStream:
    return TokenStream(str(tmp_path), "train", TOTAL + BOS)


def be_rank(monkeypatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(train_gpt.world, "rank", rank)
    monkeypatch.setattr(train_gpt.world, "size", world_size)


def batches(
    tmp_path, hp, steps: int, position: int = 0
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """The micro-batches of some steps of this rank."""
    loader, micro_steps = TrainLoader(open_stream(tmp_path), hp, position), hp.micro_steps()
    taken = [
        [tuple(side.numpy() for side in loader.next()) for _ in range(micro_steps)]
        for _ in range(steps)
    ]
    loader.close()
    return taken


@pytest.mark.parametrize(
    "start, count",
    [
        (0, 1),
        (0, TOTAL),
        (508, 2),
        (509, 3),
        (510, 2),
        (TOTAL - 1, 2),
        (TOTAL - 1, TOTAL + 2),
        (TOTAL, 5),
        (7 * TOTAL + 600, 2 * TOTAL + 1),
    ],
)
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
        inputs, targets = (
            np.concatenate(side).flatten() for side in zip(*micro_batches, strict=True)
        )
        assert np.array_equal(inputs, ring[place % TOTAL])
        assert np.array_equal(targets, ring[(place + 1) % TOTAL])
        assert all(x.shape == y.shape == (4, 32) for x, y in micro_batches)


@pytest.mark.parametrize("accumulation", [0, 1, 2, 3], ids="accumulation_{}".format)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8], ids="ranks_{}".format)
def test_ranks_share_the_batch_of_one_rank(
    tmp_path, ring, tiny, monkeypatch, world_size, accumulation
):
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


def test_micro_batches_are_the_same_however_many_ranks_share_them(
    tmp_path, ring, tiny, monkeypatch
):
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
    assert all(
        np.array_equal(a, b)
        for p, q in zip(resumed, expected, strict=True)
        for s, t in zip(p, q, strict=True)
        for a, b in zip(s, t, strict=True)
    )


@pytest.mark.parametrize("taken", [0, 1])
def test_a_closed_loader_gives_no_more_data(tmp_path, ring, tiny, taken):
    stream = open_stream(tmp_path)
    loader = TrainLoader(stream, tiny(train_batch_tokens=256))
    for _ in range(taken):
        loader.next()
    loader.close()
    for _ in range(2):
        with pytest.raises(IndexError):
            loader.next()
    with pytest.raises(IndexError):
        stream.read(0, 1)


@pytest.mark.parametrize(
    "world_size, accumulation, batch, length",
    [
        (1, 1, 100, 64),
        (1, 2, 64, 64),
        (1, 0, 4 * 64, 64),
        (8, 2, 8 * 64, 64),
        (2, 3, 4 * 64, 64),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(
    tmp_path, ring, tiny, monkeypatch, world_size, accumulation, batch, length
):
    be_rank(monkeypatch, 0, world_size)
    hp = tiny(train_batch_tokens=batch, train_seq_len=length, grad_accum_steps=accumulation)
    micro_steps = accumulation or 8 // world_size
    unit = f"{micro_steps} micro-batches x {world_size} ranks x {length} tokens"
    with pytest.raises(ValueError, match=f"TRAIN_BATCH_TOKENS={batch}: .* multiple of {unit}"):
        TrainLoader(open_stream(tmp_path), hp)


@pytest.mark.parametrize("world_size", [3, 5, 16])
def test_any_number_of_ranks_takes_a_whole_batch_or_is_refused(
    tmp_path, ring, tiny, monkeypatch, world_size
):
    place, micro_steps = np.arange(960, 1920), 8 // world_size or 1
    hp = tiny(train_batch_tokens=960, train_seq_len=32, grad_accum_steps=0)
    seen = []
    for rank in range(world_size):
        be_rank(monkeypatch, rank, world_size)
        if 960 % (micro_steps * world_size * 32):
            with pytest.raises(ValueError, match=f"TRAIN_BATCH_TOKENS=960: .*{world_size} ranks"):
                TrainLoader(open_stream(tmp_path), hp)
        else:
            seen += [x.flatten() for x, _ in batches(tmp_path, hp, 2)[1]]
    assert not seen or sorted(np.concatenate(seen)) == sorted(ring[place % TOTAL])
    assert bool(seen) == (world_size != 16)
