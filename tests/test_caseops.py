"""data/prepare.py --caseops: the transform, its tokenizer, the bytes of each validation token."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from corpus import DOCUMENTS, prose
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_prepare import everything, prepare

T, A, C, E = "\ue001\ue002\ue003\ue004"
BYTES = "fineweb_val_bytes_{:06d}.bin"

EVERY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too
ODD_CHARACTERS = st.sampled_from(
    f"abyzABYZ{T}{A}{C}{E} \n\0\x01'1éÉ\u0301\u030cＡｂ\u212a\u0130ﬁ机🙂\u2581@[`{{\ud83d"
)
TEXT = st.lists(st.text(EVERY_CHARACTER, max_size=5) | st.text(ODD_CHARACTERS)).map("".join)
# what `read_documents` can return
READABLE = TEXT.map(lambda text: text.encode("utf-8", "replace").decode())

# -----------------------------------------------------------------------------
# the transform


@pytest.mark.parametrize(
    "text, encoded",
    [
        ("", ""),
        ("lower case, 123 é É", "lower case, 123 é É"),
        ("The", f"{T}the"),
        ("A", f"{T}a"),
        ("a A I", f"a {T}a {T}i"),
        ("Ab aB AB", f"{T}ab a{C}b {A}ab"),
        ("USA", f"{A}usa"),
        ("USAs", f"{T}u{C}s{C}as"),
        ("McDonald", f"{T}mc{C}donald"),
        ("iPhone", f"i{C}phone"),
        ("iOS", f"i{C}o{C}s"),
        ("A1 1A B2B", f"{T}a1 1{T}a {T}b2{T}b"),
        ("don't DON'T O'Neil", f"don't {A}don'{T}t {T}o'{T}neil"),
        ("HTML_PARSER", f"{A}html_{A}parser"),
        ("ÉCOLE École", f"É{A}cole École"),  # ASCII letters only
        ("\u0130X \u212a ＡＢ", f"\u0130{T}x \u212a ＡＢ"),
        ("[A]@Z`a{", f"[{T}a]@{T}z`a{{"),  # the neighbours of the letters
        (f"USA{T}", f"{A}usa{E}{T}"),
        (f"USA{T}b", f"{A}usa{E}{T}b"),
        (f"US{A}AB{C}", f"{A}us{E}{A}{A}ab{E}{C}"),
        (f"{T}A", f"{E}{T}{T}a"),
        (f"x{E}", f"x{E}{E}"),
        (f"{T}{A}{C}{E}", f"{E}{T}{E}{A}{E}{C}{E}{E}"),
        ("A\nB", f"{T}a\n{T}b"),
    ],
)
def test_transform_by_hand(text, encoded):
    assert prepare.encode_case(text) == encoded
    assert prepare.decode_case(encoded) == text


@given(TEXT)
@example("\udc00A\ud800")
@settings(max_examples=1000, deadline=None)
def test_transform_is_lossless(text):
    encoded = prepare.encode_case(text)
    assert prepare.decode_case(encoded) == text
    plain = (
        encoded.replace(E + E, "")
        .replace(E + T, "")
        .replace(E + A, "")
        .replace(E + C, "")
        .replace(E, "?")
    )
    assert not any("A" <= character <= "Z" for character in plain)
    assert "?" in text or "?" not in plain  # every ESC stands before an operator character


@given(TEXT)
@settings(deadline=None)
def test_any_string_can_be_decoded(text):
    decoded = prepare.decode_case(text)
    assert decoded.lower().count("a") == text.lower().count("a")  # no letter is lost
    assert prepare.decode_case(prepare.encode_case(decoded)) == decoded


@pytest.mark.parametrize(
    "text, decoded",
    [
        (E, ""),
        (T, ""),
        (f"{A} ab", " ab"),
        (f"{T}é", "é"),
        (f"{A}{E}{E}b", f"{E}b"),
        (f"{T}{T}a", "A"),
        (f"{E}\nA", "\nA"),
        (f"{A}ab{C}cd", "ABCd"),
        (f"{A}ab\u0301cd", "AB\u0301cd"),
        ("As It Is", "As It Is"),
    ],
)
def test_decoding_what_the_transform_does_not_write(text, decoded):
    assert prepare.decode_case(text) == decoded


def test_long_runs_take_linear_time():
    for text in ("x" * 300_000, "X" * 300_000, "xX" * 150_000, f"{E}" * 300_000):
        assert prepare.decode_case(prepare.encode_case(text)) == text


# -----------------------------------------------------------------------------
# tokenizer and bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("tokenizer") / "prose_500_bpe"
    return prepare.train_tokenizer(
        prose() + 50 * tuple(DOCUMENTS.values()), 500, prefix, caseops=True
    )


@pytest.fixture(scope="module")
def sp(model):
    return prepare.load_tokenizer(model, caseops=True)


def encode(sp, *texts):
    return [ids for _, ids in prepare.encode_documents(sp, texts, caseops=True)]


def original(sp, ids):
    return prepare.decode_case(sp.decode(ids))


def slow_bytes(sp, ids):
    """Bytes of each token, from labelled bytes: by the description of the transform alone."""
    surface = []  # (byte, token it comes from)
    for number, i in enumerate(ids):
        piece = sp.id_to_piece(i)
        if i == 1:
            continue
        data = (
            bytes([int(piece[3:5], 16)]) if sp.is_byte(i) else piece.replace("\u2581", " ").encode()
        )
        surface += [(byte, number) for byte in data]
    counts, at, escaped = [0] * len(ids), 0, False
    for character in bytes(byte for byte, _ in surface).decode():
        labels = [number for _, number in surface[at : at + len(character.encode())]]
        at += len(labels)
        if escaped or character not in (T, A, C, E):
            for number in labels:
                counts[number] += 1
            escaped = False
        else:
            escaped = character == E
    return counts


def test_tokenizer_has_the_operators_after_the_control_pieces(model, sp):
    assert model.name == "prose_500_bpe_caseops.model"
    assert [sp.id_to_piece(i) for i in range(9)] == [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        T,
        A,
        C,
        E,
        "<0x00>",
    ]
    assert sum(sp.is_byte(i) for i in range(8, 264)) == 256
    pieces = [sp.id_to_piece(i) for i in range(264, sp.vocab_size())]
    assert not any(
        character in f"ABCDEFGHIJKLMNOPQRSTUVWXYZ{T}{A}{C}{E}" for character in "".join(pieces)
    )
    assert sp.encode(f"{T}the {A}the", out_type=str)[0] == T and sp.encode(
        "2024", out_type=str
    ) == list("2024")
    assert sp.encode(f"{T}the")[1:] == sp.encode(f"{A}the")[1:]  # the letters are the same tokens


def test_tokenizer_without_caseops_has_no_operators(tmp_path):
    plain = prepare.load_tokenizer(prepare.train_tokenizer(prose(), 400, tmp_path / "plain"))
    assert plain.is_byte(4) and plain.piece_to_id(T) == plain.unk_id()


@given(st.lists(READABLE, max_size=4))
@settings(deadline=None, max_examples=500)
def test_bytes_of_any_text(sp, texts):
    table = prepare.piece_bytes(sp)
    for text, ids in zip(texts, encode(sp, *texts), strict=True):
        assert ids[0] == prepare.BOS and prepare.BOS not in ids[1:]
        counts = prepare.case_bytes(table, ids)
        assert len(counts) == len(ids) and counts.dtype == np.uint16
        assert counts.sum() == len(original(sp, ids).encode())
        assert counts.tolist() == slow_bytes(sp, ids)
        transformed = prepare.encode_case(prepare.normalised(sp, text))
        if prepare.normalised(sp, transformed) == transformed:
            assert original(sp, ids) == prepare.normalised(sp, text)


@pytest.mark.parametrize(
    "text",
    [
        *DOCUMENTS.values(),
        "THE End",
        f"A{E}{T}b {E}{E}{E} {C}",
        T,
        "ＡＢｃ",
        "aＢ",
        "E\u0301A\u030a",
        "™s",
        "A\u3000B",
    ],
    ids=ascii,
)
def test_text_is_the_normalised_one(sp, text):
    (ids,) = encode(sp, text)
    assert original(sp, ids) == sp.normalize(text).replace("\u2581", " ")
    assert prepare.case_bytes(prepare.piece_bytes(sp), ids).tolist() == slow_bytes(sp, ids)


def test_bytes_by_hand(sp):
    def counted(text):
        (ids,) = encode(sp, text)
        pieces = [sp.id_to_piece(i) for i in ids]
        return list(
            zip(pieces, prepare.case_bytes(prepare.piece_bytes(sp), ids).tolist(), strict=True)
        )

    assert sp.piece_to_id("机") == sp.unk_id() != sp.piece_to_id("é")
    assert counted("a机é") == [
        ("<s>", 0),
        ("a", 1),
        ("<0xE6>", 1),
        ("<0x9C>", 1),
        ("<0xBA>", 1),
        ("é", 2),
    ]
    assert counted("X 7 Z") == [
        ("<s>", 0),
        (T, 0),
        ("x", 1),
        ("\u2581", 1),
        ("7", 1),
        ("\u2581", 1),
        (T, 0),
        ("z", 1),
    ]
    assert counted(f"{E}{E}{A}Q{T}") == [
        ("<s>", 0),
        (E, 0),
        (E, 3),
        (E, 0),
        (E, 3),
        (E, 0),
        (A, 3),
        (T, 0),
        ("q", 1),
        (E, 0),
        (T, 3),
    ]
    assert counted("") == [("<s>", 0)]


def test_bytes_of_operators_that_the_transform_does_not_write(sp):
    table, a = prepare.piece_bytes(sp), sp.piece_to_id("a")
    for ids in (
        [1, 7],
        [1, 7, a],
        [1, 7, 7],
        [1, 7, 7, 4, a],
        [1, 4],
        [1, 4, 7, 4],
        [1, 5, 5, a],
        [1, 6, 7],
    ):
        counts = prepare.case_bytes(table, ids)
        assert counts.sum() == len(original(sp, ids).encode()) and counts.tolist() == slow_bytes(
            sp, ids
        )


def unfit_model(path, **options):
    stream, pieces = io.BytesIO(), {"user_defined_symbols": [T, A, C, E]}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{T}a {A}b {C}c {E}d"] * 20),
        model_writer=stream,
        model_type="bpe",
        vocab_size=280,
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        pad_id=0,
        unk_id=3,
        minloglevel=2,
        **(pieces | {"bos_id": 1, "eos_id": 2} | options),
    )
    path.write_bytes(stream.getvalue())
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"user_defined_symbols": []},
        {"user_defined_symbols": [T, A, C]},
        {"user_defined_symbols": [A, T, C, E]},
        {"user_defined_symbols": ["x", T, A, C, E]},
        {"user_defined_symbols": [T, A, C, E, f"{T}a"]},
        {"user_defined_symbols": [], "control_symbols": [T, A, C, E]},
    ],
    ids=str,
)
def test_models_without_the_operators_are_refused(tmp_path, options):
    path = unfit_model(tmp_path / "unfit.model", **options)
    with pytest.raises(
        ValueError, match=r"unfit.model: --caseops needs U\+E001 to U\+E004 .*\[4, 5, 6, 7\]"
    ):
        prepare.load_tokenizer(path, caseops=True)


def test_models_with_another_bos_are_refused(tmp_path):
    with pytest.raises(ValueError, match="found BOS id 2; expected 1"):
        prepare.load_tokenizer(
            unfit_model(tmp_path / "unfit.model", bos_id=2, eos_id=1), caseops=True
        )


def test_a_model_with_operators_is_refused_for_plain_text(model):
    with pytest.raises(
        ValueError, match="prose_500_bpe_caseops.model: has pieces for case operators"
    ):
        prepare.load_tokenizer(model)


def test_plain_text_may_hold_operator_characters(tmp_path):
    path = prepare.train_tokenizer(
        [f"{text} {T}{A}{C}{E}" for text in prose()], 500, tmp_path / "plain"
    )
    plain = prepare.load_tokenizer(path)
    assert plain.piece_to_id(T) != plain.unk_id()
    with pytest.raises(ValueError, match="plain.model: --caseops needs"):
        prepare.load_tokenizer(path, caseops=True)


# -----------------------------------------------------------------------------
# datasets

TEXTS = [
    f"Document {i}: McDonald's USA, {i} iPhones. " + " ".join(prose()[i : i + 3]) for i in range(60)
]
VAL = [f"NASA {text[::-1]} \U0001f600 É ＡＢＣ" for text in TEXTS[:20]] + [
    f"A{T}b {E}",
    *DOCUMENTS.values(),
]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def build(root, *options, train=TEXTS, val=VAL, name="own"):
    docs, val_docs = write_jsonl(root / "docs.jsonl", train), write_jsonl(root / "val.jsonl", val)
    prepare.main(
        [
            "--docs",
            str(docs),
            "--val-docs",
            str(val_docs),
            "--name",
            name,
            "--output-root",
            str(root),
            *map(str, options),
        ]
    )
    return root / "datasets" / name


def stats_of(folder):
    return json.loads((folder / "stats.json").read_text())


def read(paths):
    return np.concatenate([np.fromfile(path, dtype="<u2", offset=1024) for path in sorted(paths)])


def per_document(tokens, values):
    return np.split(values, np.flatnonzero(tokens == prepare.BOS)[1:])


@pytest.mark.parametrize("shard_tokens", [97, 1000, 100_000])
def test_sidecar_sums_to_the_text_of_each_document(tmp_path, model, sp, shard_tokens):
    folder = build(tmp_path, "--caseops", "--tokenizer", model, "--shard-tokens", shard_tokens)
    shards = sorted(folder.glob("fineweb_val_[0-9]*.bin"))
    sidecars = [folder / shard.name.replace("_val_", "_val_bytes_") for shard in shards]
    assert sidecars == sorted(folder.glob("fineweb_val_bytes_*.bin")) and not list(
        folder.glob("*train_bytes*")
    )
    for shard, sidecar in zip(shards, sidecars, strict=True):
        assert shard.read_bytes()[:1024] == sidecar.read_bytes()[:1024]
        assert prepare.verify_shard(sidecar) == prepare.verify_shard(shard)
    tokens, counts = read(shards), read(sidecars)
    texts = [prepare.normalised(sp, text) for text in VAL if text.strip()]
    documents = [ids.tolist() for ids in per_document(tokens, tokens)]
    assert [original(sp, ids) for ids in documents] == texts
    sums = [values.sum() for values in per_document(tokens, counts)]
    assert sums == [len(text.encode()) for text in texts]
    assert counts.tolist() == [count for ids in documents for count in slow_bytes(sp, ids)]
    figures = stats_of(folder)["val"]
    assert stats_of(folder)["caseops"] is True
    assert figures["sidecar_bytes"] == figures["bytes"] == sum(sums)
    assert figures["tokens"] == len(tokens) == len(counts)
    assert figures["documents"] == len(texts) and figures["documents_with_lost_case"] == 0
    text = "".join(texts).encode()
    assert stats_of(folder)["val_compressor_bpb"] == prepare.compressor_bpb(text)


def test_training_shards_spell_the_text(tmp_path, model, sp):
    folder = build(tmp_path, "--caseops", "--tokenizer", model, "--shard-tokens", 1000)
    tokens = read(folder.glob("fineweb_train_*.bin"))
    texts = [prepare.normalised(sp, text) for text in TEXTS]
    assert [original(sp, ids.tolist()) for ids in per_document(tokens, tokens)] == texts
    assert stats_of(folder)["train"]["bytes"] == sum(len(text.encode()) for text in texts)
    assert sp.decode(tokens.tolist()[1:]).count(T) > 100


def test_bytes_are_those_of_the_same_text_without_caseops(tmp_path):
    plain, cased = (
        build(tmp_path, "--vocab-size", 400, name="plain"),
        build(tmp_path, "--caseops", "--vocab-size", 400),
    )
    assert sorted(path.name for path in (tmp_path / "tokenizers").iterdir()) == [
        "own_400_bpe_caseops.model",
        "plain_400_bpe.model",
    ]
    for split in ("train", "val"):
        assert stats_of(plain)[split]["bytes"] == stats_of(cased)[split]["bytes"]
    assert stats_of(plain)["val_compressor_bpb"] == stats_of(cased)["val_compressor_bpb"]
    assert stats_of(plain)["caseops"] is False and not list(plain.glob("*bytes*"))
    assert "sidecar_bytes" not in stats_of(plain)["val"]


def test_all_validation_documents_are_used(tmp_path, model):
    val = [f"Number {i}" for i in range(10_050)]
    folder = build(tmp_path, "--caseops", "--tokenizer", model, val=val)
    assert (
        stats_of(folder)["val"]["documents"]
        == len(val)
        == (read(folder.glob("*val_0*.bin")) == 1).sum()
    )


def test_overlap_of_the_original_texts_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="validation document 1 is also training document 7"):
        build(tmp_path, "--caseops", "--tokenizer", model, val=["New", f" {TEXTS[7]}\n"])
    assert not (tmp_path / "datasets/own/stats.json").exists()
    build(
        tmp_path, "--caseops", "--tokenizer", model, val=[TEXTS[7].upper(), TEXTS[8].lower()]
    )  # other texts
    build(tmp_path, "--caseops", "--tokenizer", model, val=[prepare.encode_case(TEXTS[7])])


def test_tokenizer_is_trained_on_the_transformed_training_text(tmp_path):
    val = ["zyzzyva " * 200]
    build(
        tmp_path,
        "--caseops",
        "--vocab-size",
        320,
        train=["THE Quick McDonald " * 50 + text.replace("z", "") for text in prose()[:9]],
        val=val,
    )
    sp = prepare.load_tokenizer(tmp_path / "tokenizers/own_320_bpe_caseops.model", caseops=True)
    assert (
        sp.piece_to_id("quick") > 263 and sp.piece_to_id("Q") == sp.piece_to_id("z") == sp.unk_id()
    )


def test_sidecars_of_an_earlier_run_are_removed(tmp_path, model):
    folder = build(tmp_path, "--caseops", "--tokenizer", model, "--shard-tokens", 500)
    assert len(list(folder.glob("*bytes*"))) > 2
    build(tmp_path, "--caseops", "--tokenizer", model)
    assert [path.name for path in folder.glob("*bytes*")] == [BYTES.format(0)]
    build(tmp_path, "--vocab-size", 400)
    assert not list(folder.glob("*bytes*"))


def test_completeness_mark_waits_for_the_sidecar(tmp_path, model, monkeypatch):
    build(tmp_path, "--caseops", "--tokenizer", model)
    before, write_shard = everything(tmp_path), prepare.write_shard

    def full_disk(path, tokens):
        if "bytes" in path.name:
            raise OSError("disk full")
        write_shard(path, tokens)

    monkeypatch.setattr(prepare, "write_shard", full_disk)
    with pytest.raises(OSError, match="disk full"):
        build(tmp_path, "--caseops", "--tokenizer", model)
    assert everything(tmp_path) == before


def test_wrong_bytes_are_refused_before_the_mark(tmp_path, model, monkeypatch):
    right = prepare.case_bytes
    monkeypatch.setattr(
        prepare, "case_bytes", lambda table, ids: right(table, ids) + (np.array(ids) == 4)
    )
    with pytest.raises(
        ValueError,
        match=r"val document 0 \(from 0\): its tokens account for \d+ bytes; expected the",
    ):
        build(tmp_path, "--caseops", "--tokenizer", model)
    assert not (tmp_path / "datasets/own/stats.json").exists()


def test_case_that_normalisation_takes_is_reported(tmp_path, model, sp):
    """There is a small j with a caron in Unicode, but no capital one."""
    folder = build(tmp_path, "--caseops", "--tokenizer", model, val=["J\u030c", "plain"])
    assert stats_of(folder)["val"]["documents_with_lost_case"] == 1
    tokens = read([folder / "fineweb_val_000000.bin"])
    assert original(sp, tokens.tolist()) == "\u01f0plain"
    assert read([folder / BYTES.format(0)]).sum() == 7 == stats_of(folder)["val"]["bytes"]


def test_a_given_model_must_have_the_operators(tmp_path, model):
    plain = prepare.train_tokenizer(prose(), 400, tmp_path / "plain")
    with pytest.raises(ValueError, match="plain.model: --caseops needs"):
        build(tmp_path, "--caseops", "--tokenizer", plain)
    with pytest.raises(ValueError, match="has pieces for case operators; use it with --caseops"):
        build(tmp_path, "--tokenizer", model)


def test_demo_with_caseops_lies_beside_the_demo(tmp_path):
    for options in ([], ["--caseops"]):
        prepare.main(["--demo", *options, "--output-root", str(tmp_path)])
    plain, cased = (stats_of(tmp_path / "datasets" / name) for name in ("demo", "demo_caseops"))
    assert (plain["caseops"], cased["caseops"]) == (False, True)
    assert plain["val"]["bytes"] == cased["val"]["sidecar_bytes"]
    assert Path(cased["tokenizer"]).name == "demo_1024_bpe_caseops.model"


def test_official_shards_are_not_transformed(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--variant", "sp1024", "--caseops"])
    assert "--caseops needs --docs or --demo" in capsys.readouterr().err
