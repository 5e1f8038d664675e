"""Bytes of every token against the decoded text: every kind of piece before every kind of piece."""

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
)
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import build_sentencepiece_luts, token_bytes

TOKENIZERS = {
    "english": dict(),
    "few_merges": dict(vocab_size=345, character_coverage=0.98),
    "multilingual": dict(vocab_size=768, multilingual=True),
    "with_symbols": dict(
        vocab_size=400, user_defined_symbols="<tag>,日本,<a>", control_symbols="<ctl>,<b>"
    ),
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
    """A prefix that ends between two characters has as many bytes of text as are counted."""
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
    return load(
        edit_pieces(
            model,
            {
                V - 1: ("▁hello", NORMAL),
                V - 2: ("hello", NORMAL),
                V - 3: ("▁gone", UNUSED),
                V - 4: ("<case>", USER_DEFINED),
                V - 5: ("▁ctl", CONTROL),
                V - 6: ("▁日本", NORMAL),
            },
        )
    )


@pytest.mark.parametrize(
    "previous, target, expected",
    [
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
    ],
)
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


@pytest.mark.parametrize(
    "options, vocab_size, expected",
    [
        pytest.param(dict(), 383, "VOCAB_SIZE", id="smaller_vocabulary"),
        pytest.param(dict(), 385, "VOCAB_SIZE", id="larger_vocabulary"),
        pytest.param(dict(bos_id=2, eos_id=1), 384, "BOS", id="other_bos"),
        pytest.param(dict(bos_id=-1, eos_id=1, unk_id=2), 384, "BOS", id="no_bos"),
    ],
)
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
