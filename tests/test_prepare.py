"""data/prepare.py: demo corpus, shards, overlap of the splits, tokenizer, own text. The download is
in test_prepare_download.py."""

import functools
import hashlib
import io
import json
import lzma
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import brotli
import numpy as np
import pytest
import sentencepiece as spm
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
import prepare  # noqa: E402


def tokens_of(folder, split):
    shards = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    return np.concatenate([np.fromfile(shard, dtype="<u2", offset=1024) for shard in shards])


def documents_of(tokens):
    """Ids of each document, without BOS."""
    assert tokens[0] == prepare.BOS
    return [ids[1:].tolist() for ids in np.split(tokens, np.flatnonzero(tokens == prepare.BOS)[1:])]


def normalised(sp, text):
    """nmt_nfkc as the model applies it, with real spaces."""
    return sp.normalize(text).replace("\u2581", " ")


def overlap(found, total):
    return {"validation_documents_in_training": found, "validation_documents": total}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def everything(root):
    """All files under the root by name, but for inputs beside the data and locks."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for folder in ("datasets", "tokenizers")
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def description(folder):
    """`files` of stats.json, from the description of the format alone."""
    files = {}
    for path in folder.glob("fineweb_*.bin"):
        data = path.read_bytes()
        files[path.name] = {
            "tokens": int.from_bytes(data[8:12], "little"),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    return files


# -----------------------------------------------------------------------------
# demo corpus


DATA = Path(prepare.__file__).parent
README = (DATA / "README.md").read_text("utf-8")


def published(name):
    """The sha256 beside the name in the table of data/README.md."""
    (found,) = re.findall(rf"^\| `{re.escape(name)}` \|.*\| `([0-9a-f]{{64}})` \|$", README, re.M)
    return found


@pytest.fixture(scope="session")
def documents():
    """Lines of the demo's text, read by other means than the program's."""
    with zstandard.open(DATA / "demo.jsonl.zst", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def splits(documents):
    texts = [document["text"] for document in documents]
    return {"val": texts[:32], "train": texts[32:]}


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    prepare.main(["--demo", "--output-root", str(root)])
    return root


@pytest.fixture(scope="session")
def model(demo):
    return demo / "tokenizers" / "demo_1024_bpe.model"


def test_demo_text_is_as_it_was_published(documents):
    path = DATA / "demo.jsonl.zst"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == published(path.name)
    assert path.stat().st_size < 600_000
    texts = [document["text"] for document in documents]
    assert 1_900_000 < sum(map(len, texts)) < 2_100_000
    assert all(text.isascii() and text == text.strip() for text in texts)
    untidy = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]|  | \n|\n\n\n|gutenberg", re.I)
    assert not any(map(untidy.search, texts))
    sizes = [len(text) for text in texts]
    assert 2_700 < min(sizes) and max(sizes) < 6_000
    told = f"of {min(sizes):,} to {max(sizes):,} bytes, {int(np.median(sizes)):,} in the median"
    assert told in README and f"{len(texts)} documents of English, {sum(sizes):,}\nbytes" in README


def test_demo_works_are_those_of_the_table(documents):
    authors = {document["author"] for document in documents}
    assert len(authors) == 13
    for author in authors:
        texts = [document["text"] for document in documents if document["author"] == author]
        (row,) = re.findall(rf"^\| {author} \|.*$", README, re.M)
        *_, works, count, size, sha256, _ = [cell.strip(" `") for cell in row.split("|")]
        text = "".join(texts).encode()
        titles = {document["title"] for document in documents if document["author"] == author}
        assert (int(works), int(count), size) == (len(titles), len(texts), f"{len(text):,}")
        assert sha256 == hashlib.sha256(text).hexdigest()


def digest(name):
    return hashlib.sha256(name.encode()).digest()


def works_of(documents):
    return [f"{document['title']}, {document['author']}" for document in documents]


def test_demo_holds_out_whole_works_by_a_rule(documents):
    """So that nobody has chosen which are validation."""
    works = works_of(documents)
    held_out = sorted(set(works), key=digest)[:9]
    assert set(works[:32]) == set(held_out) and set(works[32:]).isdisjoint(held_out)


def test_demo_documents_stand_in_the_order_of_a_rule(documents):
    for split in (documents[:32], documents[32:]):
        names = [
            f"{work}, part {document['part']}"
            for work, document in zip(works_of(split), split, strict=True)
        ]
        assert names == sorted(set(names), key=digest)


def test_demo_works_are_cut_between_sentences(documents):
    parts = {}
    for work, document in zip(works_of(documents), documents, strict=True):
        parts.setdefault(work, {})[document["part"]] = document["text"]
    for texts in parts.values():
        assert sorted(texts) == list(range(1, len(texts) + 1))
        for part, text in texts.items():
            assert re.match(r"[\"'(]*[A-Z]", text)
            assert part == len(texts) or re.search(r"[.!?][\"')]*$", text)


def test_demo_train_and_val_share_hardly_a_run_of_twenty_words(splits):
    def runs(text):
        words = re.findall(r"[a-z']+", text.lower())
        return {tuple(words[i : i + 20]) for i in range(len(words) - 19)}

    val = [runs(text) for text in splits["val"]]
    train = set().union(*map(runs, splits["train"]))
    # one address quotes itself in a later one
    assert all(len(run & train) < 0.02 * len(run) for run in val)
    assert 100_000 < sum(map(len, splits["val"])) < 150_000


def test_demo_refuses_another_text(tmp_path, monkeypatch):
    path = tmp_path / "demo.jsonl.zst"
    monkeypatch.setattr(prepare, "DEMO_TEXT", path)
    with pytest.raises(ValueError, match="demo.jsonl.zst: not there; --demo needs it: restore"):
        prepare.main(["--demo", "--output-root", str(tmp_path)])
    path.write_bytes(b"{}")
    with pytest.raises(ValueError, match="demo.jsonl.zst: found sha256 44136fa.*; expected"):
        prepare.main(["--demo", "--output-root", str(tmp_path)])
    assert everything(tmp_path) == {}


def test_demo_is_the_same_everywhere(demo, model):
    folder = demo / "datasets/demo"
    for path in (model, *folder.glob("*.bin")):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == published(path.name)
    stats = json.loads((folder / "stats.json").read_text())
    assert stats["text_sha256"] == dict.fromkeys(("train", "val"), published("demo.jsonl.zst"))


@pytest.mark.parametrize("threads", [1, 2])
def test_demo_tokenizer_does_not_depend_on_threads(threads, model, tmp_path, monkeypatch):
    train = spm.SentencePieceTrainer.train
    limited = functools.partial(train, num_threads=threads)
    monkeypatch.setattr(spm.SentencePieceTrainer, "train", limited)
    texts = prepare.DocumentRange(prepare.DEMO_TEXT, 32, None)
    again = prepare.load_tokenizer(prepare.train_tokenizer(texts, 1024, tmp_path / "again"))
    sp = prepare.load_tokenizer(model)
    for i in range(1024):
        assert (again.id_to_piece(i), again.get_score(i)) == (sp.id_to_piece(i), sp.get_score(i))


def test_demo_replaces_one_made_of_another_text(demo, tmp_path):
    root = tmp_path / "root"
    docs = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    options = ["--vocab-size", "300", "--num-val-docs", "5", "--output-root", str(root)]
    prepare.main(["--docs", str(docs), "--name", "demo", *options])
    prepare.main(["--demo", "--output-root", str(root)])
    assert contents(root / "datasets/demo") == contents(demo / "datasets/demo")


def test_demo_shards_spell_the_normalised_text(demo, model, splits):
    sp = spm.SentencePieceProcessor(model_file=str(model))
    for split, texts in splits.items():
        stored = documents_of(tokens_of(demo / "datasets/demo", split))
        assert len(stored) == len(texts)
        for ids, text in zip(stored, texts, strict=True):
            assert sp.decode(ids) == normalised(sp, text)


def test_demo_figures_can_be_recomputed(demo, model):
    sp = spm.SentencePieceProcessor(model_file=str(model))
    folder = demo / "datasets/demo"
    stats = json.loads((folder / "stats.json").read_text())
    for split in ("train", "val"):
        tokens = tokens_of(folder, split)
        text = "".join(map(sp.decode, documents_of(tokens))).encode()
        assert stats[split]["tokens"] == len(tokens)
        assert stats[split]["documents"] == np.count_nonzero(tokens == prepare.BOS)
        assert stats[split]["bytes"] == len(text)
        assert stats[split]["bytes_per_token"] == pytest.approx(len(text) / len(tokens), abs=1e-4)
    assert stats["overlap"] == overlap(0, stats["val"]["documents"])
    sizes = {
        "brotli-11": len(brotli.compress(text, quality=11, lgwin=24)),
        "xz-9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    assert stats["val_compressor_bpb"] == {
        name: round(8 * size / len(text), 4) for name, size in sizes.items()
    }


def test_demo_tokenizer_has_the_competition_settings(model):
    sp = prepare.load_tokenizer(model)
    assert sp.vocab_size() == 1024
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
    assert sum(sp.is_byte(i) for i in range(1024)) == 256
    assert sp.encode("1920", out_type=str) == list("1920")
    assert not sp.encode("the", out_type=str)[0].startswith("\u2581")


# -----------------------------------------------------------------------------
# shards and tokenizer


def test_shard_header_and_body(tmp_path):
    path, tokens = tmp_path / "a.bin", np.array([1, 5, 65535, 256], dtype=np.uint16)
    prepare.write_shard(path, tokens)
    data = path.read_bytes()
    assert data[:12] == (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + (4).to_bytes(
        4, "little"
    )
    assert data[12:1024] == bytes(1012)
    assert data[1024:] == b"\x01\x00\x05\x00\xff\xff\x00\x01"
    assert prepare.verify_shard(path) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(
    "damage, found, expected",
    [
        (lambda data: data[:-2], "found 1042 bytes", "expected 1044"),
        (lambda data: data + b"\0", "found 1045 bytes", "expected 1044"),
        (lambda data: data[:100], "found 100 bytes", "expected 1044"),
        (lambda data: data[:8] + bytes(4) + data[12:1024], "found 0 tokens", "expected at least 1"),
        (lambda data: b"", "found magic 0, version 0", "expected 20240520, 1"),
        (lambda data: b"<html>" + data[6:], "found magic 1836345404", "expected 20240520, 1"),
        (lambda data: data[:4] + b"\2" + data[5:], "version 2", "expected 20240520, 1"),
    ],
)
def test_verify_shard_names_file_found_and_expected(tmp_path, damage, found, expected):
    path = tmp_path / "fineweb_val_000000.bin"
    prepare.write_shard(path, np.arange(10))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name}: .*{found}.*{expected}"):
        prepare.verify_shard(path)


@pytest.mark.parametrize("shard_tokens", [1, 7, 10, 11, 1000])
def test_documents_straddle_shards(tmp_path, shard_tokens):
    documents = [[1, 5, 6, 7], [1], [1, *range(10, 30)], [1, 8]]
    flat = [token for document in documents for token in document]
    count = prepare.write_shards(tmp_path, "train", documents, shard_tokens, vocab_size=100)
    sizes = [prepare.verify_shard(path) for path in sorted(tmp_path.iterdir())]
    assert len(sizes) == count and set(sizes[:-1]) <= {shard_tokens}
    assert tokens_of(tmp_path, "train").tolist() == flat


def test_write_shards_refuses_ids_outside_the_vocabulary(tmp_path):
    with pytest.raises(AssertionError):
        prepare.write_shards(tmp_path, "train", [[1, 50]], 100, vocab_size=50)
    assert not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------
# overlap of the splits


def write_shards(folder, split, shards):
    for index, tokens in enumerate(shards):
        prepare.write_shard(folder / f"fineweb_{split}_{index:06d}.bin", np.array(tokens, int))


def slow_documents(shards):
    """(tokens, numbers of the shards they stand in) of each document of the whole text."""
    documents = []
    for number, shard in enumerate(shards):
        for token in shard:
            if token == 1:
                documents.append(([], set()))
            if documents:
                documents[-1][0].append(token)
                documents[-1][1].add(number)
    return documents


def slow_overlap(val, train):
    """(documents found, documents, number of the first training shard with one)."""
    val = [document for document, _ in slow_documents(val)]
    train = [(document, max(where)) for document, where in slow_documents(train) if len(where) == 1]
    found = [document for document in val if document in [other for other, _ in train]]
    return len(found), len(val), next((where for other, where in train if other in found), None)


SHARDS = st.lists(st.lists(st.sampled_from([1, 1, 5, 257]), min_size=1, max_size=12), min_size=1)


@given(SHARDS, SHARDS)
@settings(deadline=None, max_examples=300)
@example([[1, 5, 6, 1, 7]], [[1, 5, 6]])
@example([[1, 5, 6, 1, 7]], [[1, 5], [6, 1, 7]])  # the border cuts the first
@example([[1, 5, 1, 7]], [[1, 5], [6, 1, 8]])  # what stands before the border is not a document
@example([[1, 5, 1, 7]], [[1, 5], [1, 6]])  # this border cuts nothing
@example([[1, 5, 1, 7]], [[5, 1, 7, 1, 5], [5], [5, 1]])
@example([[1, 5], [6, 1], [7, 1, 8]], [[1, 5, 6, 1, 7, 1, 9]])  # borders in the validation text
@example([[1, 5, 1, 6, 1, 5]], [[1, 5]])  # twice in the validation text
@example([[1, 5, 1, 6]], [[1, 5, 1, 5], [1, 5]])  # three times in the training text
@example([[1, 1, 5]], [[1, 6, 1, 1, 7]])  # an empty document
@example([[1, 1, 5]], [[1, 6, 1], [7]])  # its BOS belongs to a longer one
@example([[1, 5, 6]], [[1, 5], [1, 5, 6, 7], [6, 1, 6, 5]])  # neither part nor order is enough
@example([[1, 257]], [[1, 1, 257]])  # bytes alike: 01 00 01 01
@example([[5, 6]], [[1, 5]])  # no validation document
def test_overlap_is_that_of_a_slow_search(val, train):
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), "val", val)
        write_shards(Path(folder), "val_bytes", train)
        write_shards(Path(folder), "train", train)
        found, total, first = prepare.find_overlap(Path(folder))
    assert (found, total, first and int(first[-10:-4])) == slow_overlap(val, train)


@pytest.mark.parametrize("total, allowed", [(20, 1), (39, 1), (40, 2), (140, 7), (19, 0), (1, 0)])
def test_five_percent_may_overlap_and_no_document_more(tmp_path, total, allowed):
    documents = [[1, 10 + i, 9] for i in range(total)]
    write_shards(tmp_path, "val", documents)
    write_shards(tmp_path, "train", [[1, 8], sum(documents[:allowed], [1])])
    assert prepare.measure_overlap(tmp_path, "remedy") == overlap(allowed, total)
    write_shards(tmp_path, "train", [[1, 8], sum(documents[: allowed + 1], [1])])
    message = (
        f"{allowed + 1} of {total} validation documents .* the first in fineweb_train_000001.bin; "
        "at most 5 % may: remedy$"
    )
    with pytest.raises(ValueError, match=message):
        prepare.measure_overlap(tmp_path, "remedy")


def test_overlap_refuses_a_bad_shard(tmp_path):
    write_shards(tmp_path, "val", [[1, 5]])
    write_shards(tmp_path, "train", [[1, 6], [1, 7]])
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="fineweb_train_000001.bin: found 1027 bytes"):
        prepare.find_overlap(tmp_path)


# -----------------------------------------------------------------------------
# files and tokenizer


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    prepare.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        prepare.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("abcabdacd" * 5, {}, "no piece for a lone space"),
        ("a b c a b d", {"bos_id": 2, "eos_id": 1}, "found BOS id 2; expected 1"),
    ],
)
def test_unfit_tokenizers_are_refused(tmp_path, text, options, message):
    stream = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20),
        model_writer=stream,
        model_type="bpe",
        vocab_size=270,
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        pad_id=0,
        unk_id=3,
        minloglevel=2,
        **{"bos_id": 1, "eos_id": 2} | options,
    )
    path = tmp_path / "unfit.model"
    path.write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match=f"unfit.model: .*{message}"):
        prepare.load_tokenizer(path)


# -----------------------------------------------------------------------------
# own text

TEXTS = [
    f"Document {i}: " + " ".join(f"{i * j} apples and {j} pears" for j in range(1, 30))
    for i in range(60)
]


def write_jsonl(path, texts):
    data = "".join(json.dumps({"text": text, "source": "test"}) + "\n" for text in texts).encode()
    if path.suffix == ".zst":
        # over the decompressor's default limit
        parameters = zstandard.ZstdCompressionParameters(window_log=28)
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
        with compressor.stream_writer(open(path, "wb")) as writer:
            writer.write(data)
    else:
        path.write_bytes(data)
    return path


def shard_docs(root, docs, *options):
    prepare.main(
        ["--docs", str(docs), "--name", "own", "--output-root", str(root), *map(str, options)]
    )
    return root / "datasets/own"


def test_jsonl_and_zst_give_the_same_shards(tmp_path, model):
    options = ("--tokenizer", model, "--num-val-docs", 5, "--shard-tokens", 1000)
    plain = shard_docs(tmp_path / "a", write_jsonl(tmp_path / "docs.jsonl", TEXTS), *options)
    packed = shard_docs(tmp_path / "b", write_jsonl(tmp_path / "docs.jsonl.zst", TEXTS), *options)
    assert contents(plain) == contents(packed) and len(contents(plain)) > 5
    stats = [json.loads((folder / "stats.json").read_text()) for folder in (plain, packed)]
    for told, name in zip(stats, ("docs.jsonl", "docs.jsonl.zst"), strict=True):
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert told.pop("text_sha256") == {"train": digest, "val": digest}
    assert stats[0] == stats[1]


def test_the_first_documents_are_held_out_and_caps_hold(tmp_path, model):
    sp, docs = prepare.load_tokenizer(model), write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    folder = shard_docs(
        tmp_path,
        docs,
        "--tokenizer",
        model,
        "--num-val-docs",
        5,
        "--max-train-docs",
        7,
        "--max-val-docs",
        3,
    )
    texts = {
        split: [sp.decode(ids) for ids in documents_of(tokens_of(folder, split))]
        for split in ("val", "train")
    }
    assert texts == {"val": TEXTS[:3], "train": TEXTS[5:12]}


def test_own_tokenizer_is_trained_on_the_training_part_alone(tmp_path):
    val = write_jsonl(tmp_path / "val.jsonl", ["zyzzyva " * 200])
    docs = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    shard_docs(tmp_path, docs, "--vocab-size", 300, "--val-docs", val)
    sp = prepare.load_tokenizer(tmp_path / "tokenizers/own_300_bpe.model")
    assert sp.vocab_size() == 300
    assert sp.is_byte(sp.encode("z")[0])  # z occurs in the validation text only


def test_shards_of_an_earlier_run_are_removed(tmp_path, model):
    docs = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    folder = shard_docs(
        tmp_path, docs, "--tokenizer", model, "--num-val-docs", 5, "--shard-tokens", 500
    )
    before = len(contents(folder))
    folder = shard_docs(tmp_path, docs, "--tokenizer", model, "--num-val-docs", 5)
    assert before > 2 == len(contents(folder))


@pytest.mark.parametrize(
    "line", ["{oops", "", '["text"]', '{"txt": "a"}', '{"text": 3}', "7", "null", "\xff"]
)
def test_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(
        b'{"text": "a"}\n{"text": ""}\n' + line.encode("latin-1") + b'\n{"text": "b"}\n'
    )
    with pytest.raises(
        ValueError, match=r"docs.jsonl, line 3: expected a JSON object with a string `text`"
    ):
        list(prepare.read_documents(path))


def test_odd_characters_do_not_crash(tmp_path, model):
    odd = [
        "a\0b",
        "\x00",
        "\x01\x02\x7f\x85 \u200b\ufeff",
        "<s> not a control token </s>",
        "\u2581\u2581x",
        "\ud83d half",
        "\U0001f600 \uff46\uff55\uff4c\uff4c \u00bd \ufb01",
        "line\r\nbreak\ttab",
        "x" * 50_000,
    ]
    folder = shard_docs(
        tmp_path,
        write_jsonl(tmp_path / "docs.jsonl", odd + TEXTS),
        "--vocab-size",
        300,
        "--num-val-docs",
        len(odd),
    )
    sp = prepare.load_tokenizer(tmp_path / "tokenizers/own_300_bpe.model")
    stored = documents_of(tokens_of(folder, "val"))
    assert len(stored) == len(odd)
    for ids, text in zip(stored, odd, strict=True):
        assert sp.decode(ids) == normalised(sp, text.encode("utf-8", "replace").decode())


def test_train_and_val_must_not_overlap(tmp_path, model):
    docs = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    val = write_jsonl(tmp_path / "val.jsonl", ["new", "  " + TEXTS[7] + "\n"])
    with pytest.raises(ValueError, match="validation document 1 is also training document 7"):
        shard_docs(tmp_path, docs, "--tokenizer", model, "--val-docs", val)
    assert not (tmp_path / "datasets/own/stats.json").exists()


def test_what_was_made_is_told_in_words(capsys):
    val = dict(documents=32, tokens=50_892, bytes=143_506, shards=1, bytes_per_token=2.8198)
    stats = dict(name="own", tokenizer="own.model", vocab_size=300, overlap=overlap(0, 32))
    stats |= dict(train=dict(shards=2, tokens=1000), val=val)
    prepare.print_stats(stats | dict(val_compressor_bpb={"brotli-11": 2.4868, "xz-9e": 2.7077}))
    prepare.print_stats(stats)
    own, train, val, _, compressed, *_, skipped = capsys.readouterr().out.splitlines()
    assert (own, train) == ("own: own.model, 300 pieces", "train: 2 shards, 1,000 tokens")
    assert val == "val: 32 documents, 50,892 tokens, 143,506 bytes (2.8198 a token), 1 shard"
    assert compressed.endswith("bits per byte of compressors: brotli-11 2.4868, xz-9e 2.7077")
    assert "not computed" in skipped


def spaced(texts):
    """Other texts of the same tokens: the model collapses spaces."""
    return [text.replace(" ", "  ") for text in texts]


@pytest.mark.parametrize("options", [[], ["--caseops"]])
def test_documents_of_the_same_tokens_are_counted(tmp_path, capsys, options):
    docs = write_jsonl(tmp_path / "docs.jsonl", TEXTS[20:] + spaced(TEXTS[:1]))
    val = write_jsonl(tmp_path / "val.jsonl", TEXTS[:20])
    folder = shard_docs(tmp_path, docs, "--vocab-size", 300, "--val-docs", val, *options)
    assert json.loads((folder / "stats.json").read_text())["overlap"] == overlap(1, 20)
    assert "overlap: 1 of 20 validation documents" in capsys.readouterr().out
    write_jsonl(docs, TEXTS[20:] + spaced(TEXTS[:2]))
    message = r"own: 2 of 20 validation documents \(10.0%\) .* take them out of the training text"
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=message):
        shard_docs(tmp_path, docs, "--vocab-size", 300, "--val-docs", val, *options)
    assert everything(tmp_path) == before


def test_a_leak_ends_the_command_with_one_line(tmp_path, model):
    docs = write_jsonl(tmp_path / "docs.jsonl", TEXTS[:9] + spaced(TEXTS[:8]))
    command = [sys.executable, prepare.__file__, "--docs", docs, "--num-val-docs", "9"]
    command += ["--name", "own", "--tokenizer", model, "--output-root", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True)
    folder = tmp_path / "datasets/own"
    assert ended.returncode == 1 and not (folder / "stats.json").exists()
    assert ended.stderr.splitlines()[-1] == (
        f"prepare.py: {folder}: 8 of 9 validation documents (88.9%) stand in the training shards, "
        "the first in fineweb_train_000000.bin; at most 5 % may: take them out of the training "
        "text, or hold out other documents (--val-docs)"
    )
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("failing", ["write_shard", "find_overlap", "describe_shards"])
def test_a_failed_call_leaves_the_old_dataset(tmp_path, monkeypatch, failing):
    docs = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    shard_docs(tmp_path, docs, "--vocab-size", 300, "--num-val-docs", 5)
    before = everything(tmp_path)

    def full_disk(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(prepare, failing, full_disk)
    write_jsonl(docs, TEXTS[:40])  # would give another tokenizer of the same name
    with pytest.raises(OSError, match="disk full"):
        shard_docs(tmp_path, docs, "--vocab-size", 300, "--num-val-docs", 5)
    assert everything(tmp_path) == before


def test_a_split_without_text_is_refused(tmp_path, model):
    docs = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    with pytest.raises(ValueError, match="no text for the train split"):
        shard_docs(tmp_path, docs, "--tokenizer", model, "--num-val-docs", len(TEXTS))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--variant", "byte260"],
        ["--variant", "sp1024", "--demo"],
        ["--docs", "a.jsonl", "--vocab-size", "300", "--num-val-docs", "1"],
        ["--docs", "a.jsonl", "--name", "../a", "--vocab-size", "300", "--num-val-docs", "1"],
        ["--docs", "a.jsonl", "--name", "a", "--num-val-docs", "1"],
        ["--docs", "a.jsonl", "--name", "a", "--vocab-size", "300"],
    ],
)
def test_command_line_refuses_what_does_not_fit(arguments, capsys):
    with pytest.raises(SystemExit):
        prepare.main(arguments)
    assert "error: " in capsys.readouterr().err
