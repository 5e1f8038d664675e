"""data/prepare.py: every bad input gives one line, before anything that exists is replaced."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from corpus import DOCUMENTS, document_ids, load, prose, tokenizer_model
from test_prepare import description, everything, prepare

import train_gpt

TEXTS = [f"{number}. {text}" for number, text in enumerate(prose()[:100])]


def lines(texts, encoding="utf-8"):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(encoding)


GOOD = lines(TEXTS)
PACKED, ZIPPED = zstandard.compress(GOOD), gzip.compress(GOOD)
CHECKED = zstandard.ZstdCompressor(write_checksum=True).compress(GOOD)


def docs(path, root, *options, name="own"):
    return ["--docs", str(path), "--name", name, "--output-root", str(root), *map(str, options)]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A root with a dataset that every failed call must leave alone."""
    root = tmp_path_factory.mktemp("old")
    (root / "docs.jsonl").write_bytes(lines(TEXTS[::-1]))
    prepare.main(docs(root / "docs.jsonl", root, "--num-val-docs", 5, "--vocab-size", 400))
    return root


@pytest.fixture
def refused(old, capsys):
    """refused(arguments) -> (exit status, line) of a call that changes nothing."""

    def call(arguments):
        before = everything(old)
        with pytest.raises(SystemExit) as ended:
            prepare.report(arguments)
        code, error = ended.value.code, capsys.readouterr().err
        status, text = (1, code + "\n") if isinstance(code, str) else (code, error)
        assert text.startswith("prepare.py: ") and text.count("\n") == 1
        assert everything(old) == before
        names = {path.name for path in (old / "datasets").iterdir() if path.is_dir()}
        assert names == {"own"}
        return status, text

    return call


# -----------------------------------------------------------------------------
# text

JSON = "expected a JSON object with a string `text`; found"
FILES = {
    "bad_line": (GOOD + b'{"text": "cut o\n', rf"line 101: {JSON} b'\{{\"text\": \"cut o"),
    "not_utf8": ('{"text": "café"}\n'.encode("latin-1"), rf"line 1: {JSON} .*caf\\xe9"),
    "utf16": (lines(TEXTS, "utf-16"), f"line 1: {JSON}"),
    "text_is_a_number": (b'{"text": 3}\n', f"line 1: {JSON}"),
    "text_is_nan": (b'{"text": NaN}\n', f"line 1: {JSON}"),
    "no_text": (GOOD + b'{"body": "a"}\n', f"line 101: {JSON}"),
    "nested_deeply": (b"[" * 200_000, f"line 1: {JSON}"),
    "empty": (b"", "no text for the train split: found no document in .*docs"),
    "spaces": (lines(["   ", "\n\t"] * 20), "no text for the train split: found no document in"),
    "too_short": (lines(TEXTS[:5]), "no document in .*docs after its first 5 documents"),
    "no_bytes": (lines(["\x01", "\x02", "\x03", "\x04", "\x05"]) + GOOD, "documents have no bytes"),
    "gz_cut": (ZIPPED[:-500], "compressed file is cut or damaged: .*end-of-stream"),
    "gz_cut_in_its_end": (ZIPPED[:-3], "compressed file is cut or damaged"),
    "gz_damaged": (ZIPPED[:-8] + b"checksum", "compressed file is cut or damaged: CRC"),
    "zst_cut": (PACKED[:-1], "compressed file is cut or damaged: it ends inside a frame"),
    "zst_cut_in_its_second_frame": (PACKED + PACKED[:-9], "cut or damaged: it ends inside a frame"),
    "zst_damaged": (CHECKED[:-4] + b"hash", "cut or damaged: zstd .*checksum"),
    "zst_followed_by_junk": (PACKED + b"junkjunk", "cut or damaged: .*Unknown frame"),
    "xz": (lzma.compress(GOOD), "found an xz file; expected JSON lines, plain, .gz or .zst"),
    "bzip2": (bz2.compress(GOOD), "found a bzip2 file; expected JSON lines"),
    "zip": (b"PK\3\4" + GOOD, "found a zip file; expected JSON lines"),
    "parquet": (b"PAR1" + GOOD, "found a parquet file; expected JSON lines"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_text(refused, old, tmp_path, name):
    data, message = FILES[name]
    path = tmp_path / "docs"
    path.write_bytes(data)
    status, line = refused(docs(path, old, "--num-val-docs", 5, "--vocab-size", 400))
    assert status == 1
    matches(line, message)
    assert name in ("no_bytes",) or str(path) in line


def matches(line, message):
    assert re.search(message, line), line


@pytest.mark.parametrize(
    "data",
    [
        GOOD,
        b"\xef\xbb\xbf" + GOOD,  # a byte-order mark
        ZIPPED,
        gzip.compress(GOOD[:9000]) + gzip.compress(GOOD[9000:]),
        PACKED,
        zstandard.compress(GOOD[:9000]) + zstandard.compress(GOOD[9000:]),
        b"\x50\x2a\x4d\x18\x04\0\0\0size" + PACKED,  # a frame to skip, as pzstd writes
        zstandard.ZstdCompressor(write_content_size=False).compress(GOOD),
        GOOD[:-1],
        GOOD.replace(b"\n", b"\r\n"),
    ],
    ids=range(10),
)
def test_the_same_text_in_other_clothes(tmp_path, data):
    path = tmp_path / "docs"
    path.write_bytes(data)
    assert list(prepare.read_documents(path)) == TEXTS


@pytest.mark.parametrize("length", [1, 7, 1000, len(PACKED) // 2, len(PACKED) - 1])
def test_any_cut_of_a_frame_is_found(tmp_path, length):
    path = tmp_path / "docs"
    path.write_bytes(PACKED + PACKED[:length] if length < 4 else PACKED[:length])
    with pytest.raises(ValueError, match="docs: .*cut|docs, line 1:"):
        list(prepare.read_documents(path))


# -----------------------------------------------------------------------------
# settings

SPLIT, SIZE = ["--num-val-docs", "5"], ["--vocab-size", "400"]
SETTINGS = {
    "num_val_docs_0": (["--num-val-docs", "0", *SIZE], 2, "--num-val-docs: found '0'; expected a"),
    "num_val_docs_negative": (["--num-val-docs", "-1", *SIZE], 2, "--num-val-docs: found '-1'"),
    "num_val_docs_no_number": (
        ["--num-val-docs", "1e3", *SIZE],
        2,
        "found '1e3'; expected",
    ),
    "num_val_docs_all": (
        ["--num-val-docs", "100", *SIZE],
        1,
        "no text for the train split: .*after its first 100 documents",
    ),
    "num_val_docs_more": (["--num-val-docs", "2000", *SIZE], 1, "after its first 2,000 documents"),
    "max_train_docs_0": (
        [*SPLIT, *SIZE, "--max-train-docs", "0"],
        2,
        "--max-train-docs: found '0'",
    ),
    "max_val_docs_0": ([*SPLIT, *SIZE, "--max-val-docs", "0"], 2, "--max-val-docs: found '0'"),
    "shard_tokens_0": ([*SPLIT, *SIZE, "--shard-tokens", "0"], 2, "--shard-tokens: found '0'"),
    "shard_tokens_negative": ([*SPLIT, *SIZE, "--shard-tokens", "-9"], 2, "found '-9'"),
    "shard_tokens_huge": (
        [*SPLIT, *SIZE, "--shard-tokens", "9" * 20],
        2,
        "expected a whole number from 1 to 2,147,483,647",
    ),
    "vocab_size_0": ([*SPLIT, "--vocab-size", "0"], 2, "--vocab-size: found '0'; expected a"),
    "vocab_size_65537": ([*SPLIT, "--vocab-size", "65537"], 2, "from 1 to 65,536"),
    "vocab_size_too_small": (
        [*SPLIT, "--vocab-size", "200"],
        1,
        r"--vocab-size 200: bytes, control pieces and characters of the training text need 3\d\d",
    ),
    "vocab_size_too_large": (
        [*SPLIT, "--vocab-size", "60000"],
        1,
        r"--vocab-size 60000: the training text gives only \d+ pieces: ask for no more",
    ),
    "no_split": (SIZE, 2, "needs either --val-docs or --num-val-docs"),
    "no_tokenizer": (SPLIT, 2, "needs either --tokenizer or --vocab-size"),
    "train_shards_of_own_text": (
        [*SPLIT, *SIZE, "--train-shards", "3"],
        2,
        "--train-shards needs --variant; found with --docs",
    ),
    "abbreviated": ([*SPLIT, "--vocab", "300"], 2, "unrecognized arguments: --vocab 300"),
    "name_with_path": ([*SPLIT, *SIZE, "--name", "../a"], 2, "needs a --name of at most 100"),
    "name_of_a_folder": ([*SPLIT, *SIZE, "--name", ".."], 2, "needs a --name of at most 100"),
    "name_too_long": ([*SPLIT, *SIZE, "--name", "n" * 101], 2, "needs a --name of at most 100"),
    "tokenizer_missing": (
        [*SPLIT, "--tokenizer", "no.model"],
        2,
        "--tokenizer: found no file at no.model",
    ),
    "val_docs_a_folder": ([*SIZE, "--val-docs", "/"], 2, "--val-docs: found a folder at /"),
    "val_docs_a_pipe": ([*SIZE, "--val-docs", "/dev/null"], 2, "--val-docs: found a pipe"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_bad_settings(refused, old, tmp_path, name):
    options, expected, message = SETTINGS[name]
    path = tmp_path / "docs"
    path.write_bytes(GOOD)
    status, line = refused(docs(path, old, *options))
    assert status == expected
    matches(line, message)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variant", "sp384", "--train-shards", "0"], "--train-shards: found '0'"),
        (["--variant", "sp384", "--shard-tokens", "5"], "--shard-tokens needs --docs or --demo"),
        (["--variant", "sp0"], "--variant sp0: expected sp and a vocabulary size"),
        (["--demo", "--name", "mine"], "--name needs --docs; found with --demo"),
        (["--docs", "no.jsonl"], "--docs: found no file at no.jsonl"),
        (["--docs", "/"], "--docs: found a folder at /; expected a file"),
    ],
)
def test_bad_settings_of_other_sources(refused, arguments, message):
    status, line = refused(arguments)
    assert status == 2
    matches(line, message)


def test_a_folder_that_cannot_be_written_is_found_before_the_text_is_read(refused, tmp_path):
    path = tmp_path / "docs"
    path.write_bytes(b"not read")
    for root in (path, Path("/proc/nothing")):
        status, line = refused(docs(path, root, *SPLIT, *SIZE))
        assert status == 1
        matches(line, f"--output-root {root}: cannot write in .*datasets: ")


def test_it_is_found_before_the_demo_is_made(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(prepare, "check_demo_text", lambda: 1 / 0)
    _, line = refused(["--demo", "--output-root", str(tmp_path / "file")])
    matches(line, "--output-root .*file: cannot write in .*datasets: Not a directory")


def test_a_mount_point_is_found_before_the_text_is_read(refused, old, tmp_path, monkeypatch):
    path = tmp_path / "docs"
    path.write_bytes(b"not read")
    monkeypatch.setattr(os.path, "ismount", lambda folder: folder == old / "datasets/own")
    status, line = refused(docs(path, old, *SPLIT, *SIZE))
    assert status == 1 and "own is a mount point, which cannot be replaced" in line


def test_the_space_is_looked_for_before_the_shards(refused, old, tmp_path, monkeypatch):
    path = tmp_path / "docs"
    path.write_bytes(GOOD)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    status, line = refused(docs(path, old, *SPLIT, *SIZE))
    assert status == 1
    matches(line, "datasets: the training shards need about 0.1 MB, and 0.0 MB are free: free some")


def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left on device: .*a.bin"):
        with prepare.atomic(tmp_path / "a.bin") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_bytes(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_a_second_call_on_the_same_dataset_is_refused(refused, old, tmp_path):
    with prepare.Place(old, "own").locked():
        status, line = refused(docs(old / "docs.jsonl", old, *SPLIT, *SIZE))
    assert status == 1
    matches(line, "own: another prepare.py is at work on it; wait for its end")


# -----------------------------------------------------------------------------
# tokenizers


def counted(sp, ids):
    """Bytes of a document as the competition's script counts them, token by token."""
    total, boundary = 0, True
    for token in ids:
        piece, before = sp.id_to_piece(token), boundary
        boundary = sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token)
        if sp.is_byte(token):
            total += 1
        elif not boundary:
            space = piece.startswith("\u2581")
            total += len(piece[space:].encode()) + (space and not before)
    return total


TOKENIZERS = {
    "super_words": dict(split_by_whitespace=False, vocab_size=1500),
    "space_as_suffix": dict(treat_whitespace_as_suffix=True),
    "leading_spaces_kept": dict(remove_extra_whitespaces=False),
    "no_bytes_for_unknown": dict(byte_fallback=False, character_coverage=0.98, vocab_size=150),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_do_not_count_their_text(refused, old, tmp_path, name):
    model = tokenizer_model(**dict(vocab_size=384) | TOKENIZERS[name])
    texts = [f"  {text} \u673a" for text in TEXTS]
    (tmp_path / "odd.model").write_bytes(model)
    (tmp_path / "docs").write_bytes(lines(texts))
    options = [*SPLIT, "--tokenizer", tmp_path / "odd.model"]
    status, line = refused(docs(tmp_path / "docs", old, *options))
    assert status == 1 and "odd.model: val document " in line
    if name == "no_bytes_for_unknown":
        matches(line, r"document 0 \(from 0\): the tokenizer does not give back .*\\u2047")
        return
    sp = load(model)
    documents = [document_ids(sp, text) for text in texts[:5]]
    figures = [(counted(sp, ids), len(sp.decode(ids).encode())) for ids in documents]
    first = next(number for number, (told, true) in enumerate(figures) if told != true)
    told, true = figures[first]
    assert (
        f"document {first} (from 0): its tokens account for {told} bytes; expected the {true} of"
        in line
    )


def test_a_tokenizer_that_loses_text_of_the_training_split(refused, old, tmp_path):
    options = dict(byte_fallback=False, character_coverage=1.0, vocab_size=300)
    (tmp_path / "odd.model").write_bytes(tokenizer_model(**options))
    (tmp_path / "docs").write_bytes(lines([*TEXTS[:50], "a \u673a"]))
    options = [*SPLIT, "--tokenizer", tmp_path / "odd.model"]
    _, line = refused(docs(tmp_path / "docs", old, *options))
    assert "odd.model: train document 45 (from 0): the tokenizer does not give back" in line
    assert "at character 2; expected '\\u673a'" in line


MODELS = {
    "empty": (b"", "found 0 bytes; expected a SentencePiece model"),
    "cut": (tokenizer_model(384)[:-100], r"found [\d,]+ bytes; expected a SentencePiece model"),
    "text": (GOOD, r"found [\d,]+ bytes; expected a SentencePiece model"),
}


@pytest.mark.parametrize("name", MODELS)
def test_files_that_are_no_tokenizer(refused, old, tmp_path, name):
    data, message = MODELS[name]
    (tmp_path / "odd.model").write_bytes(data)
    (tmp_path / "docs").write_bytes(b"not read")
    options = [*SPLIT, "--tokenizer", tmp_path / "odd.model"]
    status, line = refused(docs(tmp_path / "docs", old, *options))
    assert status == 1
    matches(line, f"odd.model: {message}")


def test_bos_must_not_be_a_piece_of_text(refused, old, tmp_path):
    model = tokenizer_model(384, user_defined_symbols="<s>")
    (tmp_path / "odd.model").write_bytes(model)
    (tmp_path / "docs").write_bytes(b"not read")
    options = [*SPLIT, "--tokenizer", tmp_path / "odd.model"]
    _, line = refused(docs(tmp_path / "docs", old, *options))
    matches(line, "odd.model: found BOS (id -1; expected 1|as a piece of text)")


@pytest.mark.parametrize(
    "options",
    [{}, dict(add_dummy_prefix=True), dict(split_by_whitespace=False, vocab_size=1500)],
    ids=["plain", "prefix", "super_words"],
)
def test_bytes_are_those_of_the_training_program(options):
    sp = load(tokenizer_model(**dict(vocab_size=500, multilingual=True) | options))
    luts = train_gpt.build_sentencepiece_luts(sp, sp.vocab_size(), torch.device("cpu"))
    rng, table = random.Random(0), prepare.ByteTable(sp)
    for text in [*DOCUMENTS.values(), *prose()[:20]]:
        for ids in (
            document_ids(sp, text),
            [1, *rng.choices(range(sp.vocab_size()), k=len(text))],
        ):
            tokens = torch.tensor(ids)
            expected = train_gpt.token_bytes(luts, tokens[:-1], tokens[1:]).sum().item()
            assert table.count(ids) == expected == counted(sp, ids)


def test_a_prefix_space_is_no_byte(tmp_path):
    """The tokenizer puts a space before each text, and takes it away again."""
    model = tokenizer_model(384, add_dummy_prefix=True)
    (tmp_path / "t.model").write_bytes(model)
    (tmp_path / "docs").write_bytes(lines(TEXTS))
    prepare.main(docs(tmp_path / "docs", tmp_path, *SPLIT, "--tokenizer", tmp_path / "t.model"))
    stats = json.loads((tmp_path / "datasets/own/stats.json").read_text())
    spelled = [load(model).decode(load(model).encode(text)) for text in TEXTS[:5]]
    assert stats["val"]["bytes"] == len("".join(spelled).encode())


def test_a_tokenizer_of_another_dataset_is_not_replaced(refused, old, tmp_path):
    root = tmp_path / "root"
    (tmp_path / "docs").write_bytes(GOOD)
    prepare.main(docs(tmp_path / "docs", root, *SPLIT, *SIZE, name="first"))
    model = root / "tokenizers/first_400_bpe.model"
    options = [*SPLIT, "--tokenizer", model]
    prepare.main(docs(tmp_path / "docs", root, *options, name="second"))
    prepare.main(docs(tmp_path / "docs", root, *SPLIT, *SIZE, name="first"))  # the same again
    before = everything(root)
    (tmp_path / "docs").write_bytes(lines(TEXTS[:60]))
    _, line = refused(docs(tmp_path / "docs", root, *SPLIT, *SIZE, name="first"))
    matches(line, f"{model}: the dataset second was made with it, and first needs another")
    assert everything(root) == before
    shutil.rmtree(root / "datasets/second")
    prepare.main(docs(tmp_path / "docs", root, *SPLIT, *SIZE, name="first"))
    assert model.read_bytes() != before["tokenizers/first_400_bpe.model"]


# -----------------------------------------------------------------------------
# what a dataset is made of, and where it can be made


@pytest.mark.parametrize("caseops", [False, True])
def test_the_description_fits(tmp_path, caseops):
    (tmp_path / "docs").write_bytes(GOOD)
    options = [*SPLIT, *SIZE, "--shard-tokens", 2000, *["--caseops"] * caseops]
    prepare.main(docs(tmp_path / "docs", tmp_path, *options))
    folder = tmp_path / "datasets/own"
    stats = json.loads((folder / "stats.json").read_text())
    assert stats["files"] == description(folder) and len(stats["files"]) > 4
    assert ("fineweb_val_bytes_000000.bin" in stats["files"]) is caseops
    model = Path(stats["tokenizer"]).read_bytes()
    assert stats["tokenizer_sha256"] == hashlib.sha256(model).hexdigest()
    assert {path.name for path in folder.iterdir()} == {"stats.json", *stats["files"]}


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "docs").write_bytes(GOOD)
    prepare.main(docs(tmp_path / "docs", tmp_path, *SPLIT, *SIZE, "--shard-tokens", 2000))
    folder = tmp_path / "datasets/own"
    (folder / "notes").mkdir()
    (folder / "notes/a.txt").write_text("mine")
    (folder / "fineweb_train_000000.bin.tmp").write_text("of a run that was killed")
    prepare.main(docs(tmp_path / "docs", tmp_path, *SPLIT, *SIZE))
    assert (folder / "notes/a.txt").read_text() == "mine"
    assert {path.name for path in folder.iterdir()} == {"notes", "stats.json", *description(folder)}
    assert len(description(folder)) == 2


def test_a_dataset_on_another_disk(tmp_path):
    """The folder is a link: what it points to is replaced, the link stays."""
    (tmp_path / "docs").write_bytes(GOOD)
    (tmp_path / "disk").mkdir()
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/own").symlink_to(tmp_path / "disk/own")
    for options in ([], ["--shard-tokens", 2000]):
        prepare.main(docs(tmp_path / "docs", tmp_path, *SPLIT, *SIZE, *options))
        assert (tmp_path / "datasets/own").is_symlink()
        stats = json.loads((tmp_path / "disk/own/stats.json").read_text())
        assert stats["files"] == description(tmp_path / "disk/own")


def test_anywhere(tmp_path):
    """Spaces and letters in names, no home, an ASCII locale, no terminal."""
    root = tmp_path / "a folder é"
    root.mkdir()
    (root / "my docs.jsonl").write_bytes(GOOD)
    env = dict(PATH=os.environ["PATH"], LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    env |= dict(PYTHONSAFEPATH="1", HOME="/nonexistent", OMP_NUM_THREADS="1")
    command = [sys.executable, prepare.__file__, *docs(root / "my docs.jsonl", root, *SPLIT, *SIZE)]
    ended = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert ended.returncode == 0 and ended.stderr == ""
    stats = json.loads((root / "datasets/own/stats.json").read_text())
    assert stats["files"] == description(root / "datasets/own")


# -----------------------------------------------------------------------------
# signals

WAITING = """
import sys, threading
sys.path.insert(0, {folder!r})
import prepare
def main(argv):
    print("ready", flush=True)
    threading.Event().wait()
prepare.main = main
prepare.command()
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_one_line(number, status):
    source = WAITING.format(folder=str(Path(prepare.__file__).parent))
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", source]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, error = process.communicate()
    assert process.returncode == status
    assert error == (
        f"prepare.py: {number.name}: stopped. A dataset that was there stays; call again to go on\n"
    )


def test_what_is_raised_while_the_tokenizer_is_trained_comes_out():
    def texts(error):
        yield from TEXTS
        raise error

    for error in (ValueError("docs.jsonl, line 3: bad"), KeyboardInterrupt(), OSError(5, "I/O")):
        with pytest.raises(type(error)) as raised:
            prepare.train_tokenizer(texts(error), 400, Path("not written"))
        assert raised.value is error


def test_ids_of_an_empty_document_are_counted():
    sp = load(tokenizer_model(384))
    assert prepare.ByteTable(sp).count([1]) == 0
    assert prepare.ByteTable(sp).count(np.array([1, sp.piece_to_id("\u2581")]).tolist()) == 0
