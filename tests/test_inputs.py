"""What train_gpt.py does with inputs that are not what they should be, as a user meets it.

A call that is refused ends before the first step, with a line for each fault and exit status 1,
and leaves every file that was there as it was.
"""

import contextlib
import importlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from corpus import (
    BOS,
    NORMAL,
    decoded_bytes,
    described,
    document_ids,
    edit_pieces,
    load,
    prose,
    sha256,
    tokenizer_model,
    write_corpus,
    write_shard,
)
from in_process import LAYOUTS, ROOT, SMALL, run
from toys import SYSTEMS

FIRST, TRAIN = "data/fineweb_train_000000.bin", "data/fineweb_train_000001.bin"
VAL = "data/fineweb_val_000000.bin"
TOKENIZER, STATS = "data/tokenizer.model", "data/stats.json"
SIDECAR = "data/fineweb_val_bytes_000000.bin"
LAYOUT = LAYOUTS | dict(baseline="A2", gdn_hybrid="G S", pure_gdn="G S", crawler="A (A G)x2 A")
PLACE = dict(DATA_PATH="data", TOKENIZER_PATH=TOKENIZER, VOCAB_SIZE="384", ITERATIONS="2")


# -----------------------------------------------------------------------------
# a folder with data, and calls in it


def settings_of(system: str, settings: dict) -> dict[str, str]:
    """The environment; what is None is left out of it."""
    env = SMALL | PLACE | dict(LAYOUT=LAYOUT[system])
    env |= {name.upper(): value for name, value in settings.items()}
    return {name: str(value) for name, value in env.items() if value is not None}


def call(folder: Path, system: str = "train_gpt", **settings) -> SimpleNamespace:
    script = ROOT / (f"{system}.py" if system == "train_gpt" else f"systems/{system}.py")
    return run(script, folder, settings_of(system, settings))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def unchanged(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """Every file is as it was; a log may have more behind it; new are only logs and locks."""
    for name, content in before.items():
        is_log = name.startswith("logs/")
        assert after[name].startswith(content) if is_log else after[name] == content, name
    new = [Path(name) for name in after.keys() - before.keys()]
    assert all(path.parts[0] == "logs" or path.name.startswith(".") for path in new), new


def complaints(result: SimpleNamespace) -> list[str]:
    """The lines of a call that was refused before the first step, and before any score."""
    assert result.returncode == 1 and result.stderr.startswith("Refused: "), result.stderr
    assert not re.search(r"(train|val)_loss:\d", result.stdout)
    return result.stderr.removeprefix("Refused: ").splitlines()


def refused(folder: Path, *patterns: str, **settings) -> None:
    """The call is refused, by one line for each pattern, and changes nothing."""
    before = contents(folder)
    lines = complaints(call(folder, **settings))
    found = [[line for line in lines if re.search(pattern, line)] for pattern in patterns]
    assert all(len(of_one) == 1 for of_one in found) and len(lines) == len(patterns), lines
    unchanged(before, contents(folder))


def finished(result: SimpleNamespace) -> dict:
    """The figures of a call that ended well."""
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1].removeprefix("figures: "))
    assert math.isfinite(figures["val_bpb"])
    return figures


def ids_of(path: Path) -> np.ndarray:
    return np.fromfile(path, "<u2", offset=1024)


def flip(path: Path, at: int = -2) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "data").mkdir()
    facts = write_corpus(folder / "data", train_tokens=12_000, val_tokens=1_500)
    assert facts["vocab_size"] == int(PLACE["VOCAB_SIZE"])
    return folder


@pytest.fixture
def bare(corpus, tmp_path) -> Path:
    """As the competition's data: without stats.json."""
    return shutil.copytree(corpus, tmp_path / "bare")


@pytest.fixture
def folder(corpus, tmp_path) -> Path:
    """With a stats.json."""
    shutil.copytree(corpus, tmp_path / "folder")
    described(tmp_path / "folder/data")
    return tmp_path / "folder"


@pytest.fixture(scope="module")
def trained_once(corpus, tmp_path_factory) -> Path:
    folder = shutil.copytree(corpus, tmp_path_factory.mktemp("trained") / "folder")
    described(folder / "data")
    finished(call(folder))
    return folder


@pytest.fixture
def trained(trained_once, tmp_path) -> Path:
    """With a stats.json, and all files of a finished run."""
    return shutil.copytree(trained_once, tmp_path / "trained")


# -----------------------------------------------------------------------------
# the files that stats.json describes


def change_train(folder: Path) -> None:
    flip(folder / TRAIN)


def change_first_train(folder: Path) -> None:
    flip(folder / FIRST)


def change_val(folder: Path) -> None:
    flip(folder / VAL)


def change_tokenizer(folder: Path) -> None:
    """The last byte of the last piece's score: all pieces are the same."""
    piece = load((folder / TOKENIZER).read_bytes()).id_to_piece(383).encode()
    score = (folder / TOKENIZER).read_bytes().index(piece + b"\x15") + len(piece) + 1
    flip(folder / TOKENIZER, score)
    assert load((folder / TOKENIZER).read_bytes()).id_to_piece(383).encode() == piece


def exchange(folder: Path) -> None:
    """Both begin with a document."""
    first, second = folder / FIRST, folder / TRAIN
    write_shard(second, [BOS, *ids_of(second)])
    described(folder / "data")
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


def add_train(folder: Path) -> None:
    shutil.copy(folder / TRAIN, folder / TRAIN.replace("1.bin", "2.bin"))


def add_val(folder: Path) -> None:
    shutil.copy(folder / VAL, folder / VAL.replace("0.bin", "1.bin"))


def remove_train(folder: Path) -> None:
    (folder / TRAIN).unlink()


def remove_first_train(folder: Path) -> None:
    (folder / FIRST).unlink()


def remove_val(folder: Path) -> None:
    (folder / VAL).unlink()


def rename(folder: Path) -> None:
    (folder / TRAIN).rename(folder / TRAIN.replace("000001", "1"))


def cut_train(folder: Path) -> None:
    content = (folder / TRAIN).read_bytes()
    (folder / TRAIN).write_bytes(content[:-2])


def cut_well(folder: Path) -> None:
    """With a header that fits."""
    write_shard(folder / TRAIN, ids_of(folder / TRAIN)[:-1])


def empty_train(folder: Path) -> None:
    (folder / TRAIN).write_bytes(b"")


def a_folder(folder: Path) -> None:
    (folder / TRAIN).unlink()
    (folder / TRAIN).mkdir()


@pytest.mark.parametrize(
    "change, name",
    [
        (change_train, TRAIN),
        (change_first_train, FIRST),
        (change_val, VAL),
        (change_tokenizer, TOKENIZER),
        (exchange, f"{FIRST}.*{TRAIN}|{TRAIN}.*{FIRST}"),
        (add_train, "data/fineweb_train_000002.bin"),
        (add_val, "data/fineweb_val_000001.bin"),
        (cut_well, TRAIN),
        (remove_train, TRAIN),
        (remove_first_train, "fineweb_train_000000.bin"),
        (remove_val, "fineweb_val_000000.bin"),
        (rename, "fineweb_train_000001.bin"),
        (cut_train, TRAIN),
        (empty_train, TRAIN),
        (a_folder, TRAIN),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_file_that_stats_json_does_not_describe_is_named(folder, change, name):
    change(folder)
    refused(folder, f"not as data/stats.json describes them: .*({name})")


def test_all_files_that_are_not_as_described_are_named(folder):
    change_val(folder)
    change_train(folder)
    refused(folder, f"{TRAIN}.*{VAL}|{VAL}.*{TRAIN}")


def cut_text(text: str) -> str:
    return text[:-40]


def without(name: str):
    def change(text: str) -> str:
        return json.dumps({key: value for key, value in json.loads(text).items() if key != name})

    return change


DESCRIPTIONS = {
    "cut": cut_text,
    "empty": lambda text: "",
    "no JSON": lambda text: "files: none",
    "a list": lambda text: "[1]",
    "a number": lambda text: "3",
    "null": lambda text: "null",
    "a word": lambda text: '"files"',
    "files is a list": lambda text: '{"files": ["a"], "tokenizer_sha256": "x"}',
    "files is null": lambda text: '{"files": null, "tokenizer_sha256": "x"}',
    "files of words": lambda text: '{"files": {"fineweb_val_000000.bin": "x"}}',
    "no sha256": lambda text: text.replace("sha256", "sha1"),
    "no tokenizer": without("tokenizer_sha256"),
    "latin": lambda text: "\udcff" + text,
}


@pytest.mark.parametrize("change", [pytest.param(x, id=x) for x in DESCRIPTIONS])
def test_a_damaged_stats_json_is_one_line(folder, change):
    text = DESCRIPTIONS[change]((folder / STATS).read_text())
    (folder / STATS).write_text(text, errors="surrogateescape")
    refused(folder, r"data/stats\.json: not what data/prepare.py writes: ")


@pytest.mark.parametrize("content", ['{"val": {"documents": 7}}', '{"files": {}}'])
def test_a_stats_json_without_files_describes_nothing(folder, content):
    (folder / STATS).write_text(content)
    finished(call(folder))


# -----------------------------------------------------------------------------
# another tokenizer


def exchanged_letters() -> bytes:
    """The same pieces, but the `e` is an `a` and the `a` an `e`."""
    e, a = (load(tokenizer_model()).piece_to_id(letter) for letter in "ea")
    return edit_pieces(tokenizer_model(), {e: ("a", NORMAL), a: ("e", NORMAL)})


OTHERS = {
    "shorter pieces": lambda: tokenizer_model(max_sentencepiece_length=2),
    "of half the text": lambda: tokenizer_model(every=2),
    "two letters exchanged": exchanged_letters,
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("eval_only", [0, 1])
def test_another_tokenizer_of_the_same_size_is_refused(trained, name, eval_only):
    (trained / "other.model").write_bytes(other := OTHERS[name]())
    assert load(other).vocab_size() == int(PLACE["VOCAB_SIZE"])
    scoring = dict(tokenizer_path="other.model", eval_only=eval_only)
    refused(trained, "other.model", **scoring)


@pytest.mark.parametrize("name", OTHERS)
def test_another_tokenizer_of_shards_that_nothing_describes_is_told_before_a_run(folder, name):
    """By tools/dataset.py, which ./run.sh calls."""
    (folder / "other.model").write_bytes(OTHERS[name]())
    assert dataset_tool(folder, "other.model").returncode == 0  # sha256 are compared by the run
    (folder / STATS).unlink()
    told = dataset_tool(folder, "other.model")
    expected = r"run.sh: TOKENIZER_PATH=other.model: data: [34] of 4 documents are other .*\n"
    assert told.returncode == 1 and re.fullmatch(expected, told.stderr), told
    assert dataset_tool(folder, TOKENIZER).returncode == 0
    (folder / "other.model").unlink()
    assert "other.model: no such file" in dataset_tool(folder, "other.model").stderr


def dataset_tool(folder, tokenizer: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "dataset.py", "data", tokenizer]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("eval_only", [0, 1])
def test_the_right_tokenizer_is_accepted_by_any_name(trained, eval_only):
    shutil.copy(trained / TOKENIZER, trained / "by another name")
    for remove in "no file", STATS:
        (trained / remove).unlink(missing_ok=True)
        finished(call(trained, tokenizer_path="by another name", eval_only=eval_only))


SPACE = load(tokenizer_model()).piece_to_id("\u2581")
UNUSABLE = {
    "missing": (None, "TOKENIZER_PATH=t.model: .*No such file"),
    "cut": (tokenizer_model()[:-100], "TOKENIZER_PATH=t.model: .*parse"),
    "empty": (b"", "TOKENIZER_PATH=t.model: "),
    "text": (b"This is no model.", "TOKENIZER_PATH=t.model: .*parse"),
    "of another size": (tokenizer_model(400), "TOKENIZER_PATH.*400 pieces.* expected.*384"),
    "BOS is not 1": (
        tokenizer_model(bos_id=2, eos_id=1),
        "TOKENIZER_PATH.*BOS 2; expected.*BOS 1",
    ),
    "no piece for a space": (
        edit_pieces(tokenizer_model(), {SPACE: ("other", NORMAL)}),
        "TOKENIZER_PATH: no piece for U.2581 alone",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_that_is_no_tokenizer_for_these_shards_is_refused(bare, name):
    content, expected = UNUSABLE[name]
    if content is not None:
        (bare / "t.model").write_bytes(content)
    refused(bare, expected, tokenizer_path="t.model")


def test_no_tokenizer_at_all_is_refused(bare):
    refused(bare, "TOKENIZER_PATH", tokenizer_path="")


# -----------------------------------------------------------------------------
# text that no stats.json describes

FULL = "some 機械 and 🚀 Ж"


def cut_texts() -> list[tuple[bool, list[int]]]:
    """A text that ends anywhere in FULL; and whether that is inside a character."""
    sp = load(tokenizer_model())
    first = document_ids(sp, prose()[-1])
    ids = document_ids(sp, prose()[-1], FULL)
    ends = [(end, sp.decode(ids[len(first) : end])) for end in range(len(first) + 1, len(ids) + 1)]
    return [("\ufffd" in text, ids[:end]) for end, text in ends]


def test_text_may_be_cut_anywhere_but_not_inside_a_character(trained):
    (trained / STATS).unlink()
    inside = [is_inside for is_inside, _ in cut_texts()]
    assert sum(inside) >= 8 and len(inside) - sum(inside) >= 8
    for is_inside, ids in cut_texts():
        write_shard(trained / VAL, ids)
        result = call(trained, eval_only=1)
        if is_inside:
            expected = "Refused: audit failed: bytes .*document 2: .*half a character"
            assert result.returncode == 1 and re.fullmatch(expected + ".*", result.stderr)
        else:
            finished(result)


@pytest.mark.parametrize("ids", [[BOS], [BOS, BOS, BOS], [BOS, 2, BOS, 2], [BOS, 0, 0]], ids=str)
def test_validation_text_without_bytes_is_refused(bare, ids):
    write_shard(bare / VAL, ids)
    refused(bare, rf"{VAL}: {len(ids)} tokens, expected some with text")


def test_half_a_character_inside_the_text_names_its_document(bare):
    sp = load(tokenizer_model())
    ids = document_ids(sp, "one", "two 機", "three")
    end = ids.index(BOS, ids.index(BOS, 1) + 1)  # of the second document
    write_shard(bare / VAL, ids[: end - 1] + ids[end:])
    refused(bare, "audit failed: bytes .*document 2: 6 bytes by the table, 10 decoded")


def test_a_bad_id_late_in_the_last_shard_is_found_before_the_first_step(bare):
    ids = ids_of(bare / TRAIN)
    ids[-3] = 40_000
    write_shard(bare / TRAIN, ids)
    refused(bare, f"{TRAIN}: token 40000, not below VOCAB_SIZE", train_batch_tokens=64)


@pytest.mark.parametrize("name, at", [(VAL, -1), (VAL, 5), (TRAIN, 0), (TRAIN, 4_000)])
def test_an_id_that_is_no_piece_names_the_shard(bare, name, at):
    ids = ids_of(bare / name)
    ids[at] = 384
    write_shard(bare / name, ids)
    refused(bare, f"{name}: token 384, not below VOCAB_SIZE")


@pytest.mark.parametrize("name", [FIRST, VAL])
def test_text_that_does_not_begin_with_a_document_is_refused(bare, name):
    write_shard(bare / name, [5, *ids_of(bare / name)])
    refused(bare, f"{name}: starts with token 5, expected BOS=1")


def test_a_folder_without_data_names_both_splits(bare):
    refused(
        bare,
        "DATA_PATH=nowhere: no file fineweb_train_000000.bin: run data/prepare.py",
        "DATA_PATH=nowhere: no file fineweb_val_000000.bin: run data/prepare.py",
        data_path="nowhere",
    )


BAD_SHARDS = {
    "cut": (lambda content: content[:-2], "17022 bytes, expected 17024 for its 8000 tokens"),
    "one byte more": (lambda content: content + b"x", "17025 bytes, expected 17024"),
    "no shard": (
        lambda content: b"These are no tokens." * 99,
        r"1980 bytes, starts with .*, expected \[2024",
    ),
    "big-endian": (
        lambda content: content[3::-1] + content[4:],
        "17024 bytes, starts with .*, expected",
    ),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
@pytest.mark.parametrize("path", [TRAIN, VAL])
def test_a_damaged_shard_without_a_description_is_one_line(bare, name, path):
    change, expected = BAD_SHARDS[name]
    (bare / TRAIN).write_bytes(change((bare / TRAIN).read_bytes()))
    if path == VAL:
        (bare / VAL).write_bytes((bare / TRAIN).read_bytes())
        shutil.copy(bare / FIRST, bare / TRAIN)
    refused(bare, f"{path}: {expected}")


def test_an_empty_shard_is_said_to_be_empty(bare):
    empty_train(bare)
    refused(bare, f"{TRAIN}: .*0 bytes")


# -----------------------------------------------------------------------------
# tokenizers that do not count their text

TEXTS = [("  lead " if i % 7 == 0 else "") + t.replace(" ", "  ", 3) for i, t in enumerate(prose())]
TEXTS = [f"{text} café" for text in TEXTS[:60]]
RIGHT = "right"  # or how it is refused
BYTES = r"audit failed: bytes .*document 1: (\d+) bytes by the table, (\d+) decoded"
TOKENIZERS = {
    "spaces inside pieces": (dict(split_by_whitespace=False, vocab_size=1200), BYTES),
    "runs of spaces": (
        dict(
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
        ),
        BYTES,
    ),
    "space as a suffix": (dict(treat_whitespace_as_suffix=True), BYTES),
    "no bytes": (dict(byte_fallback=False, character_coverage=0.98, vocab_size=120), BYTES),
    "named BOS": (dict(user_defined_symbols="<s>"), "TOKENIZER_PATH.* BOS -1; expected .*BOS 1"),
    "no BOS": (dict(bos_id=-1), "TOKENIZER_PATH.* BOS -1; expected .*BOS 1"),
    "words": (dict(model_type="word", vocab_size=400), "TOKENIZER_PATH: no piece for U.2581"),
    "space before the text": (dict(add_dummy_prefix=True), RIGHT),
    "letters": (dict(model_type="char"), RIGHT),
    "unigram": (dict(model_type="unigram"), RIGHT),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_counts_the_bytes_of_its_text_or_is_refused(bare, name):
    options, expected = TOKENIZERS[name]
    (bare / TOKENIZER).write_bytes(model := tokenizer_model(**options))
    sp = load(model)
    write_shard(bare / TRAIN, document_ids(sp, *TEXTS))
    write_shard(bare / FIRST, document_ids(sp, *TEXTS))
    write_shard(bare / VAL, ids := document_ids(sp, *TEXTS[:12]))
    described(bare / "data")  # else some of them are not the one of their own text
    if expected is RIGHT:
        figures = finished(call(bare, vocab_size=sp.vocab_size()))
        assert figures["bytes"] == decoded_bytes(sp, ids)
    else:
        refused(bare, expected, vocab_size=sp.vocab_size())


# -----------------------------------------------------------------------------
# text whose case is written as operators


@pytest.fixture
def cased(bare) -> Path:
    """CaseOps with one operator, which raises the next letter; its bytes beside it."""
    model = tokenizer_model(user_defined_symbols="\ue001,\ue002,\ue003,\ue004")
    sp, texts = load(model), [re.sub("[A-Z]", small, text) for text in prose()]
    assert sp.vocab_size() == int(PLACE["VOCAB_SIZE"]) and sp.id_to_piece(4) == "\ue001"
    (bare / TOKENIZER).write_bytes(model)
    write_shard(bare / TRAIN, document_ids(sp, *texts[20:60]))
    write_shard(bare / FIRST, document_ids(sp, *texts[60:99]))
    write_shard(bare / VAL, ids := document_ids(sp, *texts[:8]))
    pieces = [sp.id_to_piece(i).replace("\u2581", " ") for i in ids]
    sizes = [1 if sp.is_byte(i) else len(x.encode()) for i, x in zip(ids, pieces, strict=True)]
    silent = [i == BOS or x == "\ue001" for i, x in zip(ids, pieces, strict=True)]
    write_shard(bare / SIDECAR, np.where(silent, 0, sizes))
    described(bare / "data")
    return bare


def small(match: re.Match) -> str:
    return "\ue001" + match[0].lower()


def test_the_bytes_of_case_ops_are_those_of_the_original(cased):
    figures = finished(call(cased, "transformer"))
    assert figures["bytes"] == sum(len(" ".join(text.split()).encode()) for text in prose()[:8])


def remove_sidecar(folder: Path) -> None:
    (folder / SIDECAR).unlink()


def change_sidecar(folder: Path) -> None:
    sizes = ids_of(folder / SIDECAR)
    sizes[9] += 1
    write_shard(folder / SIDECAR, sizes)


def shorten_sidecar(folder: Path) -> None:
    write_shard(folder / SIDECAR, ids_of(folder / SIDECAR)[:-1])


@pytest.mark.parametrize(
    "change, told, expected",
    [
        (change_sidecar, True, f"stats.json.*{SIDECAR}"),
        (
            change_sidecar,
            False,
            r"audit failed: bytes .*document 1: (\d+) bytes by the table, (\d+) decoded",
        ),
        (shorten_sidecar, False, rf"{SIDECAR}: \d+ entries, \d+ tokens"),
        (remove_sidecar, False, r"DATA_PATH=data: 0 files fineweb_val_bytes_\*.bin, expected some"),
    ],
)
def test_bytes_that_are_not_those_of_the_text_are_refused(cased, change, told, expected):
    change(cased)
    (cased / ("no file" if told else STATS)).unlink(missing_ok=True)
    refused(cased, expected, system="transformer")


def test_case_ops_are_refused_by_systems_that_do_not_read_them(cased):
    refused(cased, "DATA_PATH=data: CaseOps, only read by systems/transformer.py")
    (cased / SIDECAR).unlink()
    described(cased / "data")
    refused(cased, "DATA_PATH=data: CaseOps, only read by systems/transformer.py")


# -----------------------------------------------------------------------------
# an artifact that is scored


def test_scoring_does_not_read_training_text(trained):
    figures = finished(call(trained, eval_only=1))
    for change in (change_train, empty_train, a_folder):
        change(trained)
        assert finished(call(trained, eval_only=1))["val_bpb"] == figures["val_bpb"]


def test_scoring_needs_no_training_text(trained):
    for path in (trained / "data").glob("fineweb_train_*"):
        path.unlink()
    finished(call(trained, eval_only=1))


@pytest.mark.parametrize("change, name", [(change_val, VAL), (change_tokenizer, TOKENIZER)])
def test_scoring_checks_text_and_tokenizer(trained, change, name):
    change(trained)
    refused(trained, f"stats.json.*{name}", eval_only=1)


def test_an_artifact_is_scored_with_its_own_settings_only(trained):
    refused(trained, "VOCAB_SIZE='512': expected 384, as the artifact", eval_only=1, vocab_size=512)
    refused(
        trained,
        "VOCAB_SIZE='512': expected 384, as the artifact has it",
        "MODEL_DIM='64': expected 32, as the artifact has it",
        "LAYOUT='G': expected 'G S', as the artifact has it",
        eval_only=1,
        vocab_size=512,
        model_dim=64,
        layout="G",
    )


def test_another_vocabulary_is_found_without_being_named(trained):
    """No VOCAB_SIZE in the environment: the tokenizer's is compared with the artifact's."""
    (trained / TOKENIZER).write_bytes(tokenizer_model(400))
    described(trained / "data")
    expected = "TOKENIZER_PATH.*400 pieces.*expected VOCAB_SIZE=384"
    refused(trained, expected, eval_only=1, vocab_size=None)


class Trap:
    """Whoever unpickles it makes a file."""

    def __reduce__(self):
        return open, ("trapped", "w")


ARTIFACTS = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[:-1],
    "only its beginning": lambda whole: whole[:20],
    "a byte changed": lambda whole: whole[:99] + bytes([whole[99] ^ 1]) + whole[100:],
    "of an earlier version": lambda whole: b"GDNSWA01" + whole[8:],
    "a pickle": lambda whole: pickle.dumps(Trap()),
    "text": lambda whole: b"final_model",
}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_what_is_no_artifact_is_refused_and_not_executed(trained, name):
    content = ARTIFACTS[name]((trained / "model.ptz").read_bytes())
    (trained / "bad.ptz").write_bytes(content)
    expected = f"ARTIFACT=bad.ptz: damaged, or no artifact: {len(content)} bytes"
    refused(trained, expected, eval_only=1, artifact="bad.ptz")
    assert not (trained / "trapped").exists()


def test_other_files_of_a_run_are_no_artifact(trained):
    for name in "model.ptz.trained.pt", "logs/run.txt", TOKENIZER, VAL:
        refused(trained, f"ARTIFACT={name}: .*no artifact", eval_only=1, artifact=name, scores="")
    expected = "ARTIFACT='scores.npz': expected a file, not in .npz"
    refused(trained, expected, eval_only=1, artifact="scores.npz", scores="")


def test_an_artifact_that_is_not_there_or_a_folder_is_named(trained):
    (trained / "folder").mkdir()
    refused(trained, "No such file or directory: 'none.ptz'", eval_only=1, artifact="none.ptz")
    refused(trained, "Is a directory: 'folder'", eval_only=1, artifact="folder", scores="")


def test_an_artifact_of_another_system_is_refused(trained):
    expected = "model.ptz: .*its system is record, not transformer"
    refused(trained, expected, system="transformer", eval_only=1, layout=None)


# -----------------------------------------------------------------------------
# where a run writes


OUTPUTS = {
    "artifact a folder": (dict(artifact="there"), "there: exists and is no artifact"),
    "artifact in no folder": (dict(artifact="models/"), "ARTIFACT='models/': expected a file"),
    "artifact a folder with a slash": (dict(artifact="there/"), "ARTIFACT='there/': expected a"),
    "artifact empty": (dict(artifact=""), "ARTIFACT='': expected a file, not in .npz"),
    "artifact like scores": (dict(artifact="a.npz"), "ARTIFACT='a.npz': expected a file, not in"),
    "artifact here": (dict(artifact="."), r"\.: exists and is no artifact"),
    "artifact below a file": (dict(artifact="file/model.ptz"), "'file'"),
    "artifact too long": (dict(artifact="x" * 300), "File name too long: 'x{300}'"),
    "scores a folder": (dict(scores="there"), "SCORES='there': expected a name in .npz"),
    "scores a folder with a slash": (dict(scores="there/"), "SCORES='there/': expected a name"),
    "scores below a file": (dict(scores="file/scores.npz"), "'file'"),
    "scores the artifact": (
        dict(scores="model.ptz"),
        "SCORES='model.ptz': expected a name in .npz",
    ),
    "run id too long": (dict(run_id="x" * 300), "File name too long: 'logs/x{300}.txt'"),
    "run id of bytes": (dict(run_id="é" * 130), "File name too long: 'logs/é{130}.txt'"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_where_nothing_can_be_written_is_found_before_the_first_step(folder, name):
    settings, expected = OUTPUTS[name]
    (folder / "there").mkdir()
    (folder / "file").write_text("older")
    refused(folder, expected, **settings)


def test_a_file_for_the_folder_of_logs_is_refused(folder):
    (folder / "logs").write_text("mine")
    refused(folder, "'logs'")


def test_a_folder_for_the_log_is_refused(folder):
    (folder / "logs/run.txt").mkdir(parents=True)
    refused(folder, "Is a directory: 'logs/run.txt'")


@pytest.mark.parametrize("name", ["a/b", "a b", "", "new/folder/é"])
def test_a_run_id_is_the_name_of_its_log(folder, name):
    finished(call(folder, run_id=name, artifact="new folder/model.ptz"))
    assert "figures: " in (folder / f"logs/{name}.txt").read_text().splitlines()[-1]
    assert (folder / "new folder/model.ptz").exists()


@pytest.mark.parametrize(
    "settings",
    [
        dict(artifact=VAL),
        dict(artifact=TOKENIZER),
        dict(artifact="mine.txt"),
        dict(scores=VAL),
        dict(scores="mine.txt"),
        dict(scores="./model.ptz"),
        dict(scores="logs/run.txt"),
        dict(scores="model.ptz.trained.pt"),
        dict(scores="model.ptz.sample.npz"),
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()),
)
def test_nothing_but_an_earlier_output_is_replaced(folder, settings):
    (folder / "mine.txt").write_text("not an output of any run")
    ((name, path),) = settings.items()
    expected = f"{path}: exists and is no artifact or score file: give another name"
    refused(folder, expected if name == "artifact" else f"SCORES='{path}': expected", **settings)


def space(free: int):
    return lambda folder: SimpleNamespace(total=1 << 40, used=1 << 39, free=free)


def test_too_little_space_is_found_before_the_first_step(folder, monkeypatch):
    """16 MB for the artifact; and weights, average, momenta or Hessians: 32 bytes a parameter."""
    log = call(folder, run_id="enough").stdout
    needed = 16_000_000 + 32 * int(re.search(r"model_params:(\d+)", log)[1])
    monkeypatch.setattr(shutil, "disk_usage", space(needed - 1))
    refused(folder, f"model.ptz: .*{needed - 1} bytes are free there, {needed} are", scores="")
    monkeypatch.setattr(shutil, "disk_usage", space(needed))
    finished(call(folder))


@pytest.fixture
def open_to_all(corpus):
    """A folder that other users may read, as are all above it; in it one where they may write."""
    if any(path.stat().st_mode & 0o005 != 0o005 for path in (ROOT, *ROOT.parents)):
        pytest.skip("the source lies where other users cannot read it")
    with tempfile.TemporaryDirectory() as root:
        folder = shutil.copytree(corpus, Path(root) / "folder")
        Path(root).chmod(0o755)
        for path in folder, folder / "logs", folder / "open", folder / "data":
            path.mkdir(exist_ok=True)
            path.chmod(0o755)
        for path in (folder / "data").iterdir():
            path.chmod(0o644)
        (folder / "logs").chmod(0o777)
        (folder / "open").chmod(0o777)
        described(folder / "data")
        yield folder


@contextlib.contextmanager
def another_user():
    os.seteuid(54321)
    try:
        yield
    finally:
        os.seteuid(0)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
OPEN = dict(artifact="open/model.ptz", scores="open/scores.npz")


@needs_root
@pytest.mark.parametrize(
    "settings, closed, expected",
    [
        (dict(scores=""), "data", r"Permission denied: '\.model\.ptz\.lock'"),
        (OPEN | dict(scores="scores.npz"), "data", r"Permission denied: '\.scores\.npz\.lock'"),
        (OPEN | dict(artifact="new/model.ptz"), "data", "Permission denied: 'new'"),
        (OPEN, "logs", "Permission denied: 'logs/run.txt'"),
        (OPEN, TRAIN, f"Permission denied: '{TRAIN}'"),
        (OPEN, VAL, f"Permission denied: '{VAL}'"),
        (OPEN, TOKENIZER, f"Permission denied.*{TOKENIZER}|{TOKENIZER}.*Permission denied"),
    ],
    ids=["artifact", "scores", "folder", "log", "training", "validation", "tokenizer"],
)
def test_what_another_user_may_not_do_is_found_before_the_first_step(
    open_to_all, settings, closed, expected
):
    path = open_to_all / closed
    path.chmod(path.stat().st_mode & 0o7755 if path.is_dir() else 0o600)
    with another_user():
        lines = complaints(call(open_to_all, **settings))
    assert lines and all(re.search(expected, line) for line in lines), lines


@needs_root
def test_an_artifact_that_may_not_be_read_is_one_line(open_to_all):
    finished(call(open_to_all, **OPEN))
    (open_to_all / "open/model.ptz").chmod(0o600)
    with another_user():
        (line,) = complaints(call(open_to_all, eval_only=1, run_id="other", **OPEN))
    assert "open/model.ptz" in line


# -----------------------------------------------------------------------------
# settings


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(seed=2**64), "SEED=18446744073709551616: expected 0 to "),
        (dict(seed=-1), "SEED=-1: expected 0 to "),
        (dict(seed="2**64"), r"SEED='2\*\*64': expected int"),
        (dict(seed=""), "SEED='': expected int"),
        (dict(matrix_lr="inf"), "MATRIX_LR=inf: expected 0 or more"),
        (dict(matrix_lr="nan"), "MATRIX_LR=nan: expected 0 or more"),
        (dict(matrix_lr="1e400"), "MATRIX_LR=inf: expected 0 or more"),
        (dict(iterations=0), "ITERATIONS=0: expected 1 or more"),
        (dict(vocab_size=383), "TOKENIZER_PATH: 384 pieces.*expected VOCAB_SIZE=383"),
        (dict(train_batch_tokens=100), "TRAIN_BATCH_TOKENS=100: expected a multiple of "),
        (dict(preset="dmeo"), "PRESET='dmeo': no preset .*record.dmeo.json"),
        (dict(layout="G X"), "LAYOUT='G X': expected GSA with counts, such as G3 S"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_a_setting_that_cannot_be_is_one_line(folder, settings, expected):
    refused(folder, expected, **settings)


@pytest.mark.parametrize("seed", [0, 10**18])
def test_the_seeds_at_the_bounds_will_do(folder, seed):
    finished(call(folder, seed=seed, ttt="lora", eval_mode="stream"))


def test_numbers_that_cannot_be_are_named_in_one_go(folder):
    refused(
        folder,
        "SEED=-1: expected 0",
        "VOCAB_SIZE=2: expected 3 to 65536",
        "MATRIX_LR=inf: expected",
        "HEAD_DIM=1: expected 2 or more",
        seed=-1,
        vocab_size=2,
        matrix_lr="inf",
        head_dim=1,
    )


def test_files_that_will_not_do_are_named_in_one_go(bare):
    (bare / "there").mkdir()
    change_train(bare)
    cut_train(bare)
    refused(
        bare,
        f"{TRAIN}: 17022 bytes, expected 17024",
        "TOKENIZER_PATH=nowhere.model: ",
        "there: exists and is no artifact",
        tokenizer_path="nowhere.model",
        artifact="there",
    )


def test_a_batch_that_does_not_split_is_named_with_the_files(bare):
    """Not when training begins."""
    cut_train(bare)
    refused(bare, f"{TRAIN}: 17022 bytes", "TRAIN_BATCH_TOKENS=100", train_batch_tokens=100)


def lowest(field) -> int:
    return field.metadata.get("bounds", (0,))[0]


def hyperparameters(system: str) -> type:
    return importlib.import_module(system).Hyperparameters


def sizes_of(system: str) -> list:
    no_sizes = "seed", "vocab_size", "eval_only", "iterations"
    all_fields = fields(hyperparameters(system))
    return [f for f in all_fields if f.type is int and f.name not in no_sizes]


# what a size at its lowest needs besides
COMPANIONS = dict(
    model_dim=dict(smear_dims=0, attn_gate_dims=1, mlp_mult=1),  # a hidden unit, or two
    head_dim=dict(rope_dims=0),
    gdn_heads=dict(gdn_key_heads=1),
    num_heads=dict(num_kv_heads=1),
    train_batch_tokens=dict(train_seq_len=1, curriculum="0:1x1"),
    train_seq_len=dict(curriculum="0:1x1"),
    grad_accum_steps=dict(train_batch_tokens=512),
    eval_seq_len=dict(eval_stride=1),
)
NO_BATCHES = {("pure_gdn", "grad_accum_steps")}  # 0 is within its bounds, and refused
OWN_ONLY = "gdn_hybrid", "hybrid_1895"  # what they have of others is tried with those
TRIED = {f.name for system in SYSTEMS if system not in OWN_ONLY for f in sizes_of(system)}
LOWEST = [
    (system, f.name)
    for system in SYSTEMS
    for f in sizes_of(system)
    if system not in OWN_ONLY or f.name not in TRIED
]
BASE = dict(iterations=1, curriculum="0:1x64", inst_dim=4, train_batch_tokens=64, rope_dims=4)


@pytest.fixture(scope="module")
def short(corpus, tmp_path_factory) -> Path:
    folder = shutil.copytree(corpus, tmp_path_factory.mktemp("short") / "folder")
    write_shard(folder / VAL, ids_of(folder / VAL)[:200])
    return folder


def finite_or_refused(folder: Path, system: str, **settings) -> str:
    result = call(folder, system, **BASE | settings)
    if result.returncode:
        return "\n".join(complaints(result))
    finished(result)
    with np.load(folder / "scores.npz") as scores:
        assert np.isfinite(scores["nats"]).all()
    return ""


@pytest.mark.parametrize("system, name", LOWEST)
def test_every_size_at_its_lowest_gives_a_finite_score(short, system, name):
    """And no size is refused for itself."""
    field = next(f for f in sizes_of(system) if f.name == name)
    settings = COMPANIONS.get(name, {}) | {name: lowest(field)}
    complaint = finite_or_refused(short, system, **settings)
    assert bool(complaint) == ((system, name) in NO_BATCHES), complaint


@pytest.mark.parametrize("system", SYSTEMS)
def test_all_sizes_at_their_lowest_give_a_finite_score(short, system):
    settings = {f.name: lowest(f) for f in sizes_of(system)} | dict(rope_dims=0, smear_dims=0)
    settings |= dict(curriculum="0:1x1", grad_accum_steps=1)
    assert not finite_or_refused(short, system, **settings)


# -----------------------------------------------------------------------------
# what exists


def test_the_log_of_a_training_is_kept_whatever_is_called_later(trained):
    log = (trained / "logs/run.txt").read_text()
    assert log.count(" train_loss:") >= 2
    for later in (
        dict(eval_only=1),
        dict(tokenizer_path="nowhere.model"),
        dict(seed=-1),
        dict(seed=7),
    ):
        call(trained, **later)
        longer = (trained / "logs/run.txt").read_text()
        assert longer.startswith(log)
        log = longer
    trainings = re.findall(r"^step:1/2 train_loss:", log, re.M)
    assert len(trainings) == 2 and log.count("\nfigures: {") == 3


def test_a_second_training_replaces_every_output_of_the_first(trained):
    outputs = "model.ptz", "scores.npz", "model.ptz.trained.pt", "model.ptz.sample.npz"
    before = {name: sha256(trained / name) for name in outputs}
    figures = finished(call(trained, seed=7))
    after = {name: sha256(trained / name) for name in outputs}
    assert figures["artifact_sha256"] == after["model.ptz"]
    assert not before.items() & after.items()


@pytest.mark.parametrize("broken", ["scores", "sample"])
def test_scores_and_sample_are_whole_or_as_before(trained, monkeypatch, broken):
    """The disk is full half way."""
    before, savez = contents(trained), np.savez

    def fails(file, **arrays):
        savez(file, **arrays)
        if broken in file.name:
            file.truncate(1000)
            raise OSError(28, "No space left on device", file.name)

    monkeypatch.setattr(np, "savez", fails)
    result = call(trained, eval_only=1)
    assert result.returncode == 1 and "No space left on device" in result.stderr
    after = contents(trained)
    assert after["scores.npz"] == before["scores.npz"]
    assert after["model.ptz.sample.npz"] == before["model.ptz.sample.npz"] or broken == "scores"
    assert after["model.ptz"] == before["model.ptz"]


# -----------------------------------------------------------------------------
# real processes


def start(folder: Path, nproc: int = 1, **settings) -> subprocess.Popen:
    command = [sys.executable]
    command += [str(ROOT / "tools/ranks.py"), str(nproc)] if nproc > 1 else []
    known = {f.name.upper() for f in fields(hyperparameters("train_gpt"))}
    env = {name: value for name, value in os.environ.items() if name not in known}
    env |= settings_of("train_gpt", settings) | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, str(ROOT / "train_gpt.py")], cwd=folder, env=env, **streams)


def ended(process: subprocess.Popen) -> tuple[int, list[str]]:
    """Exit status, and the lines on stderr."""
    _, error = process.communicate(timeout=120)
    return process.returncode, error.splitlines()


def test_a_user_meets_one_line_and_exit_status_1(folder):
    change_train(folder)
    status, lines = ended(start(folder))
    assert status == 1 and len(lines) == 1 and TRAIN in lines[0]


@pytest.mark.parametrize("change", [change_train, change_val, cut_well])
def test_two_ranks_meet_one_line_and_exit_status_1(folder, change):
    change(folder)
    status, lines = ended(start(folder, nproc=2))
    assert status == 1 and len(lines) == 1 and "stats.json" in lines[0]


def until(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_of_two_runs_with_one_artifact_the_second_is_refused(folder):
    first = start(folder, iterations=1_000_000, train_log_every=1)
    log = folder / "logs/run.txt"
    try:
        until(lambda: log.exists() and "train_loss:" in log.read_text()[-300:], first)
        taken = "{}: another run writes it: wait, or give another name"
        mine = dict(run_id="second", artifact="second.ptz", scores="second.npz")
        refused(folder, taken.format("model.ptz"), **mine | dict(artifact="model.ptz"))
        refused(folder, taken.format("model.ptz"), **mine | dict(artifact="./model.ptz"))
        refused(folder, taken.format("scores.npz"), **mine | dict(scores="scores.npz"))
        finished(call(folder, **mine))
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=60)
    left = {name for name in contents(folder) if name.startswith(("model", "scores"))}
    assert not left  # nothing that looks like a result
    finished(call(folder, run_id="third"))  # a killed run holds nothing
    finished(call(folder, run_id="fourth"))  # nor one that has ended
