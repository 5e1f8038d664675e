"""Artifacts: what comes back is what was written, bit for bit, or nothing.

The artifact's format is read and written here a second time, from its description. Loaded weights
are compared with q * scale of the quantizer's own numbers, damaged files with the promise that each
is one ValueError that names the file, and what a killed run leaves with what was there before it.
"""

import hashlib
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import brotli
import constriction
import numpy as np
import pytest
import torch
from conftest import ROOT
from corpus import write_corpus
from toys import SYSTEMS, as_packed, clipped, rounded, save_rounded, system, toy

import train_gpt
from train_gpt import GPT, load_artifact, save_artifact

HEADER = struct.Struct("<8s32s")  # magic, sha256 of the bytes behind it


def read_artifact(path) -> tuple[dict, bytes, bytes]:
    """The JSON head, the rest of what brotli packed, and the range code."""
    raw = path.read_bytes()
    magic, digest = HEADER.unpack_from(raw)
    data = raw[HEADER.size :]
    assert magic == b"GDNSWA18" and hashlib.sha256(data).digest() == digest
    end = 4 + struct.unpack_from("<I", data)[0]
    head, _, values = brotli.decompress(data[4:end]).partition(b"\n")
    return json.loads(head), values, data[end:]


def data_of(part: bytes, code: bytes = b"") -> bytes:
    """What stands behind the checksum."""
    return struct.pack("<I", len(part)) + part + code


def write_artifact(path, head, values: bytes, code: bytes = b"", data=None) -> None:
    """An artifact with a right checksum, whatever is in it. head: bytes, or what JSON takes."""
    head = head if isinstance(head, bytes) else json.dumps(head).encode()
    if data is None:
        data = data_of(brotli.compress(head + b"\n" + values, quality=1), code)
    path.write_bytes(HEADER.pack(b"GDNSWA18", hashlib.sha256(data).digest()) + data)


def entropy_bytes(quantized) -> float:
    """Of the values of a tensor, which know nothing of each other."""
    counts = np.unique(quantized[0].numpy(), return_counts=True)[1]
    return (counts * np.log2(counts.sum() / counts)).sum() / 8


def pack_of(name: str, folder, lively):
    """(path, model, what the quantizer made of it) of a system."""
    hp = toy(name)
    model = lively(system(name).GPT(hp))
    quantized = clipped(model, 2.0)
    path = folder / "model.ptz"
    save_artifact(path, model, hp, quantized)
    return path, model, quantized


def load_of(name: str, path):
    return load_artifact(path, "cpu", system(name).Hyperparameters, system(name).GPT)


@pytest.fixture
def packed(tmp_path, tiny, lively):
    """(path, model, what the quantizer made of it), all 6 and all 7 bits used."""
    hp = tiny()
    model = lively(GPT(hp))
    quantized = clipped(model, 2.0)
    path = tmp_path / "model.ptz"
    save_artifact(path, model, hp, quantized)
    return path, model, quantized


# ---- round trip


@pytest.mark.parametrize("name", SYSTEMS)
def test_weights_come_back_bit_for_bit(tmp_path, lively, name):
    path, model, quantized = pack_of(name, tmp_path, lively)
    loaded = dict(load_of(name, path)[0].named_parameters())
    assert list(loaded) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        if name in quantized:
            q, scale = quantized[name]
            expected = q.numpy().astype(np.float32) * scale.numpy().astype(np.float32)[:, None]
        else:
            expected = p.detach().numpy().astype(np.float16).astype(np.float32)
        assert loaded[name].dtype == torch.float32
        assert np.array_equal(loaded[name].detach().numpy(), expected), name


def test_embeddings_and_matrices_are_quantized_and_the_rest_is_not(packed):
    _, model, quantized = packed
    large = {name for name, p in model.named_parameters() if p.ndim == 2 and p.numel() >= 512}
    assert large <= set(quantized)
    largest = {name: q.abs().max() for name, (q, _) in quantized.items()}
    assert 127 >= largest["tok_emb.weight"] > 31 >= largest["blocks.0.mixer.q_proj.weight"]


def test_the_size_on_disk_is_returned_and_nothing_else_is_left(packed, tmp_path):
    path, model, quantized = packed
    assert save_artifact(path, model, model.hp, quantized) == path.stat().st_size
    assert os.listdir(tmp_path) == [path.name]


def test_the_file_is_what_its_description_says(packed):
    """Read without train_gpt.py: JSON, float16 values, then the range code by the shares of the
    counts."""
    path, model, quantized = packed
    head, values, code = read_artifact(path)
    assert head.keys() == {"system", "config", "counts"}
    ints, halves = [], []
    for name, p in model.named_parameters():
        if name in quantized:
            ints.append(quantized[name][0].numpy().ravel())
            halves.append(quantized[name][1].numpy())
        else:
            halves.append(p.detach().half().numpy().ravel())
    counts = [[int((q == value).sum()) for value in [*range(128), *range(-128, 0)]] for q in ints]
    halves = np.concatenate(halves)
    assert {q.dtype for q in ints} == {np.dtype(np.int8)} and halves.dtype == np.float16
    assert values == halves.tobytes() and head["counts"] == counts
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(code, np.uint32))
    for q, count in zip(ints, counts, strict=True):
        shares = np.array([n / q.size for n in count])
        model = constriction.stream.model.Categorical(shares, perfect=False)
        assert (coder.decode(model, len(q)) == q.view(np.uint8)).all()
    assert coder.maybe_exhausted()


@pytest.mark.parametrize("name", SYSTEMS)
def test_shared_weights_are_stored_once(tmp_path, lively, name):
    """A quantized tensor takes a scale a row, another two bytes a value, none twice; the code has
    each quantized value once."""
    path, model, quantized = pack_of(name, tmp_path, lively)
    tensors, expected = {}, 0
    for name, p in model.named_parameters(remove_duplicate=False):
        tensors.setdefault(p.data_ptr(), (p, []))[1].append(name)
    for p, names in tensors.values():
        expected += 2 * len(p) if set(names) & set(quantized) else 2 * p.numel()
    _, values, code = read_artifact(path)
    assert len(values) == expected
    assert len(code) == pytest.approx(sum(map(entropy_bytes, quantized.values())), rel=2e-3, abs=8)
    assert max(len(names) for _, names in tensors.values()) == 2


def test_shared_modules_are_one_object_after_loading(tmp_path, lively):
    loaded, _ = load_of("gdn_hybrid", pack_of("gdn_hybrid", tmp_path, lively)[0])
    assert loaded.blocks[11].mixer is loaded.blocks[5].mixer  # layout G5 S G5 S=5
    assert loaded.blocks[0].mixer is not loaded.blocks[1].mixer
    assert loaded.lm_head.weight is loaded.tok_emb.weight


def test_hyperparameters_come_back(tmp_path, tiny):
    hp = tiny(
        seed=5,
        mlp_mult=1.5,
        xsa=False,
        layout="G A S",
        matrix_bits=5,
        rope_base=1234.5,
        eval_stride=7,
        max_wallclock_seconds=1234.5,
        run_id="not stored",
        scores="nobody.npz",
    )
    save_rounded(tmp_path / "a.ptz", GPT(hp), hp)
    back = load_artifact(tmp_path / "a.ptz", "cpu")[1]
    run = dict.fromkeys(("run_id", "artifact", "eval_only", "scores"))
    assert asdict(back) | run == asdict(hp) | run
    for name, value in asdict(hp).items():
        assert type(getattr(back, name)) is type(value)
    text = json.dumps(read_artifact(tmp_path / "a.ptz")[0])
    assert "not stored" not in text and "nobody" not in text, (
        "who ran it must not change the artifact"
    )


def test_the_same_model_gives_the_same_file(tmp_path, tiny, lively):
    for name in "ab":
        torch.manual_seed(1)
        hp = tiny(run_id=name, artifact=name)
        save_rounded(tmp_path / name, lively(GPT(hp)), hp)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


LOGITS_OF = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import train_gpt
torch.set_num_threads(1)
train_gpt.world.device, train_gpt.world.dtype = torch.device("cpu"), torch.float32
model, _ = train_gpt.load_artifact(sys.argv[2], "cpu")
sys.stdout.buffer.write(model(torch.arange(1, 61)[None] % 64).detach().numpy().tobytes())
"""


def test_a_fresh_process_computes_the_same(tmp_path, tiny, lively):
    hp = tiny()
    model = lively(GPT(hp))
    quantized = rounded(model)
    save_artifact(tmp_path / "a.ptz", model, hp, quantized)
    ids = torch.arange(1, 61)[None] % 64
    expected = as_packed(model, quantized)(ids).detach().numpy()
    assert np.array_equal(
        load_artifact(tmp_path / "a.ptz", "cpu")[0](ids).detach().numpy(), expected
    )
    fresh = subprocess.run(
        [sys.executable, "-c", LOGITS_OF, str(ROOT), str(tmp_path / "a.ptz")],
        capture_output=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    assert np.array_equal(np.frombuffer(fresh, np.float32).reshape(expected.shape), expected)


def test_loading_draws_no_different_numbers_afterwards(packed):
    """The weights come from the file alone, whatever the generator's state."""
    torch.manual_seed(1)
    first = load_artifact(packed[0], "cpu")[0].state_dict()
    torch.manual_seed(2)
    second = load_artifact(packed[0], "cpu")[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- damage


def refused(path) -> None:
    """By one message: no library warns of it besides."""
    with pytest.raises(ValueError) as error, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_artifact(path, "cpu")
    assert str(path) in str(error.value) and not told


def test_every_flipped_byte_is_refused(packed):
    path, _, _ = packed
    raw = path.read_bytes()
    for position in (
        *range(HEADER.size),
        *range(HEADER.size, len(raw), 97),
        *range(len(raw) - 8, len(raw)),
    ):
        for bit in (1, 128) if position < HEADER.size else (16,):
            damaged = bytearray(raw)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            refused(path)


def test_every_truncation_is_refused(packed):
    path, _, _ = packed
    raw = path.read_bytes()
    for length in {
        *range(HEADER.size + 3),
        *range(HEADER.size, len(raw), len(raw) // 60),
        len(raw) - 1,
    }:
        path.write_bytes(raw[:length])
        refused(path)


def test_anything_appended_is_refused(packed):
    path, _, _ = packed
    path.write_bytes(path.read_bytes() + b"\0")
    refused(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"GDNSWA18", id="magic_only"),
        pytest.param(b"GDNSWA18" + bytes(52), id="zeros_after_the_magic"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(500), id="image"),
        pytest.param(pickle.dumps({"model": list(range(500))}), id="pickle"),
        pytest.param(b"PK\x03\x04" + bytes(500), id="torch_file"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n" * 5, id="text"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "model.ptz").write_bytes(content)
    refused(tmp_path / "model.ptz")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(train_gpt.Refused, match="No such file or directory: .*model.ptz"):
        load_artifact(tmp_path / "model.ptz", "cpu")


class Explosive:
    """Unpickling one creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_file_is_executed(tmp_path):
    write_artifact(tmp_path / "body.ptz", pickle.dumps(Explosive(tmp_path / "exploded")), b"")
    (tmp_path / "file.ptz").write_bytes(pickle.dumps(Explosive(tmp_path / "exploded")))
    for name in ("body.ptz", "file.ptz"):
        refused(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", [*SYSTEMS, "parts", "layers", "layouts"])
def test_the_source_has_no_way_to_execute_a_file(name):
    source = Path(system(name).__file__).read_text()
    assert not re.search(r"\b(pickle|marshal|shelve|dill|joblib)\b", source)
    assert not re.search(r"(?<![.\w])(exec|eval)\(", source)
    loads = re.findall(r"torch\.load\(.*", source)
    assert all("weights_only=True" in line for line in loads)


@pytest.fixture
def crafted(tmp_path, tiny):
    """crafted(head, values, **options) -> path of an artifact with a right checksum and these
    changes."""
    hp = tiny()
    save_rounded(tmp_path / "model.ptz", GPT(hp), hp)
    head, values, code = read_artifact(tmp_path / "model.ptz")

    def craft(
        change_head=lambda head: head,
        change_values=lambda values: values,
        change_code=lambda code: code,
        **options,
    ):
        parts = change_head(head), change_values(values), change_code(code)
        write_artifact(tmp_path / "crafted.ptz", *parts, **options)
        return tmp_path / "crafted.ptz"

    return craft


def with_config(**changes):
    return lambda head: head | dict(config=head["config"] | changes)


def test_crafting_changes_nothing_by_itself(crafted):
    load_artifact(crafted(), "cpu")


CRAFTED_HEADS = {
    "another_system": lambda head: head | dict(system="crawler"),
    "no_system": lambda head: {k: v for k, v in head.items() if k != "system"},
    "system_is_null": lambda head: head | dict(system=None),
    "an_entry_more": lambda head: head | dict(text="of the validation split"),
    "another_model": with_config(mlp_mult=3.0),
    "another_layout": with_config(layout="G2 S G2"),
    "another_order_of_blocks": with_config(layout="G S G2 S"),
    "no_layout_of_the_record": with_config(layout="G2 S G S=2"),
    "another_vocabulary": with_config(vocab_size=65),
    "impossible_value": with_config(num_heads=0),
    "unknown_hyperparameter": with_config(num_layers=9),
    "no_hyperparameters": lambda head: head | dict(config={}),
    "hyperparameters_in_a_list": lambda head: head | dict(config=[1, 2]),
    "text_for_a_number": with_config(model_dim="32"),
    "fraction_for_a_count": with_config(model_dim=32.5),
    "null_for_a_text": with_config(layout=None),
    "number_for_a_text": with_config(layout=5),
    "nan": with_config(mlp_mult=float("nan")),
    "infinite": with_config(mlp_mult=float("inf")),
    "larger_than_memory": with_config(model_dim=1 << 40),
    "text_for_hyperparameters": lambda head: head | dict(config="layout"),
    "no_entry": lambda head: {},
    "list": lambda head: [head],
    "null": lambda head: None,
    "not_json": lambda head: b"{'config': 1}",
    "not_text": lambda head: b"\xff\xfe\x00",
    "nothing": lambda head: b"",
    "deeply_nested": lambda head: b"[" * 100_000,
}


@pytest.mark.parametrize("change", CRAFTED_HEADS)
def test_a_head_that_does_not_fit_is_refused(crafted, change):
    refused(crafted(CRAFTED_HEADS[change]))


def with_counts(change):
    """Of the last tensor."""
    return lambda head: head | {"counts": [*head["counts"][:-1], change(head["counts"][-1])]}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(change_values=lambda values: values[:-1]), id="value_missing"),
        pytest.param(dict(change_values=lambda values: values[:-2]), id="two_bytes_missing"),
        pytest.param(dict(change_values=lambda values: values + b"\0\0"), id="too_many_values"),
        pytest.param(dict(change_values=lambda values: b""), id="no_values"),
        pytest.param(dict(data=b""), id="no_data"),
        pytest.param(dict(data=b"\0" * 100), id="data_not_compressed"),
        pytest.param(dict(data=data_of(brotli.compress(b""))), id="empty_body"),
        pytest.param(dict(data=data_of(brotli.compress(b"\0\0"))), id="body_of_two_bytes"),
        pytest.param(dict(data=data_of(brotli.compress(b"{}" + bytes(100)))), id="endless_head"),
        pytest.param(dict(data=data_of(brotli.compress(bytes(1000))[:-2])), id="data_cut_off"),
        pytest.param(dict(data=data_of(zlib.compress(bytes(100)))), id="other_codec"),
        pytest.param(dict(data=b"\xff" * 4 + brotli.compress(b"{}\n")), id="endless_part"),
        pytest.param(dict(change_code=lambda code: b""), id="no_code"),
        pytest.param(dict(change_code=lambda code: code[:-4]), id="a_word_missing"),
        pytest.param(dict(change_code=lambda code: code[:-1]), id="a_byte_missing"),
        pytest.param(dict(change_code=lambda code: code + bytes(4)), id="a_word_of_zeros_more"),
        pytest.param(dict(change_code=lambda code: code + b"text"), id="a_word_more"),
        pytest.param(dict(change_code=lambda code: b"\xff" * len(code)), id="another_code"),
        pytest.param(dict(change_head=with_counts(lambda counts: counts[::-1])), id="other_counts"),
        pytest.param(dict(change_head=with_counts(lambda counts: [1] * 256)), id="equal_counts"),
        pytest.param(dict(change_head=with_counts(lambda counts: [0] * 256)), id="no_counts"),
        pytest.param(dict(change_head=with_counts(lambda counts: [-1] * 256)), id="negative"),
        pytest.param(dict(change_head=with_counts(lambda counts: [2**63] * 256)), id="too_large"),
        pytest.param(dict(change_head=with_counts(lambda counts: [2**64] * 256)), id="larger"),
        pytest.param(dict(change_head=with_counts(lambda counts: counts[:-1])), id="255_counts"),
        pytest.param(dict(change_head=with_counts(lambda counts: [*counts, 1])), id="257_counts"),
        pytest.param(dict(change_head=with_counts(lambda counts: [math.nan] * 256)), id="nan"),
        pytest.param(dict(change_head=with_counts(lambda counts: ["1"] * 256)), id="texts"),
    ],
)
def test_a_body_that_does_not_fit_is_refused(crafted, options):
    refused(crafted(**options))


def test_what_stands_behind_the_compressed_is_refused(crafted):
    """Also with a right checksum: a file holds nothing that is not unpacked."""
    path = crafted()
    data = path.read_bytes()[HEADER.size :]
    for more in (b"\0", b"text of the validation split", data):
        write_artifact(path, None, b"", data=data + more)
        refused(path)


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_artifact_of_another_system_is_refused(tmp_path, lively, name):
    """Whatever its tensors are; the file and both systems are named."""
    path, _, _ = pack_of(name, tmp_path, lively)
    names = {other: system(other).Hyperparameters.system for other in SYSTEMS}
    assert read_artifact(path)[0]["system"] == names[name]
    assert len(set(names.values())) == len(SYSTEMS)
    for other in set(SYSTEMS) - {name}:
        with pytest.raises(ValueError) as error:
            load_of(other, path)
        assert all(text in str(error.value) for text in (str(path), names[name], names[other]))
    load_of(name, path)


def test_the_systems_name_alone_makes_an_artifact_one_of_another_system(tmp_path):
    """Two systems of the same model, which differ in nothing but their names."""

    @dataclass
    class Other(train_gpt.Hyperparameters):
        system = "other"

    hp, path = toy("train_gpt"), tmp_path / "model.ptz"
    save_rounded(path, GPT(hp), hp)
    load_artifact(path, "cpu")
    with pytest.raises(ValueError, match="model.ptz.*record.*other"):
        load_artifact(path, "cpu", Other, GPT)
    save_rounded(path, GPT(hp), Other(**asdict(hp)))
    load_artifact(path, "cpu", Other, GPT)
    refused(path)


BOMB = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import train_gpt
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    try:
        train_gpt.load_artifact(path, "cpu")
    except ValueError as error:
        assert path in str(error), error
    else:
        raise AssertionError(f"{path} was loaded")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_small_file_cannot_fill_the_memory(tmp_path):
    """A gigabyte of zeros in some kilobytes: refused before it is unpacked."""
    packer, zeros, path = brotli.Compressor(quality=1), bytes(1 << 24), tmp_path / "bomb.ptz"
    data = b"".join(packer.process(zeros) for _ in range(64)) + packer.finish()
    write_artifact(path, b"", b"", data=data_of(data))
    assert path.stat().st_size < 1 << 18
    kilobytes = subprocess.run(
        [sys.executable, "-c", BOMB, str(ROOT), str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    assert int(kilobytes) < 256 << 10


def test_a_write_that_fails_leaves_the_earlier_artifact(packed, monkeypatch):
    path, model, _ = packed
    before = path.read_bytes()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)

    def power_cut(*_):
        raise OSError("no space left on device")

    for where in ((os, "replace"), (train_gpt, "open")):
        with monkeypatch.context() as context:
            context.setattr(*where, power_cut, raising=False)
            with pytest.raises(OSError, match="no space"):
                save_rounded(path, model, model.hp)
        assert path.read_bytes() == before
    load_artifact(path, "cpu")
    save_rounded(path, model, model.hp)
    assert path.read_bytes() != before


# ---- killed runs


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(**environment) -> the lines that a run of six small steps logs, in this process."""
    environment = write_corpus(tmp_path) | dict(
        iterations=6,
        layout="G S2",
        model_dim=32,
        gdn_heads=2,
        gdn_head_dim=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        window_size=16,
        rope_dims=8,
        train_batch_tokens=256,
        train_seq_len=32,
        grad_accum_steps=2,
        warmup_steps=1,
        eval_seq_len=32,
        eval_stride=16,
        val_batch_size=1024,
        max_wallclock_seconds=0,
        gptq_calibration_batches=1,
        artifact_target_bytes=0,
        matrix_lr=0.05,
        ema_decay=0.9,
        eval_mode="sliding",
        ttt="",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt.log, "handlers", [])
    monkeypatch.setattr(train_gpt.log, "propagate", True)

    def start(**overrides):
        capsys.readouterr()
        with monkeypatch.context() as context:
            for name, value in (environment | overrides).items():
                context.setenv(name.upper(), str(value))
            train_gpt.main()
        return capsys.readouterr().out.splitlines()

    return start


def final(lines: list[str]) -> list[str]:
    return [line for line in lines if "_exact" in line]


def killed_in_a_step(patch):
    muon_step, steps = train_gpt.Muon.step, []

    def step(*args):
        steps.append(None)
        if len(steps) == 1 + 5:  # one is the warm-up
            raise KeyboardInterrupt
        return muon_step(*args)

    patch.setattr(train_gpt.Muon, "step", step)


def killed_before_packing(patch):
    def quantize(*_):
        raise KeyboardInterrupt

    patch.setattr(train_gpt, "quantize", quantize)


def killed_while_writing(patch):
    def half(path, mode="r"):
        file = open(path, mode)
        if str(path).endswith(".ptz.tmp"):
            with file:
                file.write(b"half of an artifact")
                raise KeyboardInterrupt
        return file

    patch.setattr(train_gpt, "open", half, raising=False)


@pytest.mark.parametrize("killed", [killed_in_a_step, killed_before_packing, killed_while_writing])
def test_a_killed_run_leaves_the_earlier_artifact_or_none(run, tmp_path, killed):
    """With its sample, and a log without a score; started again, it gives what it would have
    given."""
    whole = run(artifact="whole.ptz", run_id="whole")
    files = [tmp_path / "whole.ptz", tmp_path / "whole.ptz.sample.npz"]
    before = [file.read_bytes() for file in files]
    assert len(final(whole)) == 1 and whole[-1].startswith("figures: ")
    for name in ("whole", "half"):
        with pytest.MonkeyPatch.context() as patch:
            killed(patch)
            with pytest.raises(KeyboardInterrupt):
                run(artifact=f"{name}.ptz", seed=7, run_id=f"killed_{name}")
        assert [file.read_bytes() for file in files] == before
        assert not (tmp_path / "half.ptz").exists()
        assert not (tmp_path / "half.ptz.sample.npz").exists()
        log = (tmp_path / "logs" / f"killed_{name}.txt").read_text()
        logged = log[log.rindex("=" * 100) :].splitlines()
        assert len(logged) > 10 and not final(logged)
        assert not [line for line in logged if line.startswith("figures")]
    assert final(run(artifact="half.ptz")) == final(whole)
    assert (tmp_path / "half.ptz").read_bytes() == before[0]
