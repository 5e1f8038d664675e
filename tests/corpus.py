"""Text, tokenizers and shards made inside the tests: nothing is downloaded or read from outside.

The tokenizers have the competition's settings, the shards its format; both are written from their
description, independently of train_gpt.py and data/prepare.py.
"""

import argparse
import functools
import hashlib
import inspect
import io
import json
import logging
import struct
from pathlib import Path

import numpy as np
import sentencepiece as spm

BOS = 1
# SentencePiece's types of a piece, see sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# what byte counts go wrong on: every script, every kind of space, every kind of piece
DOCUMENTS = {
    "ascii": "The quick brown fox jumps over the lazy dog, again and again.",
    "one_letter": "x",
    "empty": "",
    "only_spaces": "     ",
    "digits": "3.14159 2,718,281 0x7f 1e-05 100000000",
    "leading_spaces": "    return self",
    "trailing_spaces": "the end    ",
    "repeated_spaces": "a  b   c    d     e",
    "tabs_and_newlines": "def f(x):\n\treturn x\n\n\n\t\t# done\r\n",
    "latin": "naïve café, Ærøskøbing, Łódź, straße",
    "combining_marks": "e\u0301 o\u0308 a\u030a n\u0303 \u0915\u094d\u0937\u093f",
    "cyrillic_and_greek": "Привет, мир! Καλημέρα κόσμε",
    "cjk": "機械学習は楽しい。自然语言处理,한국어 문장",
    "right_to_left": "שלום עולם مرحبا بالعالم",
    "emoji": "🙂🚀 ok 👩‍👩‍👧‍👦 🇺🇳 ✅",
    "astral": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎",
    "control_characters": "a\x01b\x02c\x07d\x1be\x7f",
    "nul": "a\x00b",
    "zero_width": "a\u200bb\u200dc\ufeffd\u00ade",
    "wide_spaces": "a\u00a0b\u2003c\u3000d\u2028e",
    "ligatures": "ﬁnal ½ ™ ㎏ Ⅷ",
    "sentencepiece_space": "\u2581a \u2581\u2581b\u2581",
    "looks_like_control": "<s> </s> <unk> <pad> <0x41>",
    "private_use": "\ue001x\ue004 \uffff",
}


@functools.cache
def prose() -> tuple[str, ...]:
    """Some hundred documents of English with code in it: docstrings of the standard library."""
    modules = argparse, inspect, json, logging, functools, io, struct
    members = [member for module in modules for member in vars(module).values() if callable(member)]
    texts = {inspect.getdoc(thing) or "" for thing in (*modules, *members)}
    return tuple(sorted(text for text in texts if len(text) > 40))


@functools.cache
def tokenizer_model(
    vocab_size: int = 384, multilingual: bool = False, every: int = 1, **options
) -> bytes:
    """A SentencePiece model trained on `prose` with the competition's settings; options: its own.

    multilingual: on DOCUMENTS too, so often that letters of two to four bytes become pieces.
    every: 2 = on every second document, and so on.
    """
    model = io.BytesIO()
    texts = prose()[::every] + 50 * tuple(DOCUMENTS.values()) * multilingual
    settings = dict(
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=0.999,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=False,
        pad_id=0,
        bos_id=BOS,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    lines = (line for text in texts for line in text.replace("\0", " ").splitlines())
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, **(settings | options)
    )
    return model.getvalue()


def load(model: bytes) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_proto=model)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def edit_pieces(model: bytes, pieces: dict[int, tuple[str, int]]) -> bytes:
    """The model with the pieces of these ids replaced by (text, type): no option makes UNUSED ones.

    A model is a protobuf message; its field 1, repeated, is a piece: text (1), score (2), type (3).
    """
    out, at, index = b"", 0, 0
    while at < len(model):
        start = at
        key, at = _varint(model, at)
        assert key & 7 == 2, "all fields of a model are messages"
        size, at = _varint(model, at)
        at += size
        if key >> 3 == 1:
            if index in pieces:
                text, kind = pieces[index][0].encode(), pieces[index][1]
                body = bytes([10, len(text)]) + text + struct.pack("<BfBB", 21, -index, 24, kind)
                out, start = out + bytes([10, len(body)]) + body, at
            index += 1
        out += model[start:at]
    return out


def document_ids(sp: spm.SentencePieceProcessor, *texts: str) -> list[int]:
    """Each document is BOS and its ids, nothing between them."""
    return [i for text in texts for i in (BOS, *sp.encode(text))]


def decoded_bytes(sp: spm.SentencePieceProcessor, ids: list[int]) -> int:
    """UTF-8 bytes of the text of a stream of documents, by decoding each."""
    starts = [i for i, token in enumerate(ids) if token == BOS] + [len(ids)]
    return sum(len(sp.decode(ids[a:b]).encode()) for a, b in zip(starts, starts[1:], strict=False))


def write_shard(path, tokens, header=(20240520, 1, None), fill: int = 0) -> None:
    """An official shard: 256 int32, of which three mean something, then uint16; little-endian."""
    words = np.full(256, fill, dtype="<i4")
    words[:3] = [len(tokens) if word is None else word for word in header]
    path.write_bytes(words.tobytes() + np.asarray(tokens).astype("<u2").tobytes())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def described(data: Path, **changes) -> Path:
    """The folder with a stats.json that says what is in it."""
    files = {
        path.name: {"tokens": (path.stat().st_size - 1024) // 2, "sha256": sha256(path)}
        for path in data.glob("fineweb_*.bin")
    }
    stats = {"tokenizer_sha256": sha256(data / "tokenizer.model"), "files": files}
    (data / "stats.json").write_text(json.dumps(stats | changes))
    return data


def write_corpus(folder, train_tokens: int = 6000, val_tokens: int = 1200) -> dict:
    """Two training shards, a validation shard, their tokenizer. Returns the settings of a run."""
    model = tokenizer_model()
    ids = document_ids(load(model), *DOCUMENTS.values(), *prose())
    assert len(ids) >= train_tokens + val_tokens
    train, val = ids[:train_tokens], [BOS, *ids[train_tokens:]][:val_tokens]
    cut = train_tokens // 3
    write_shard(folder / "fineweb_train_000000.bin", train[:cut])
    write_shard(folder / "fineweb_train_000001.bin", train[cut:])
    write_shard(folder / "fineweb_val_000000.bin", val)
    (folder / "tokenizer.model").write_bytes(model)
    return dict(
        data_path=str(folder),
        tokenizer_path=str(folder / "tokenizer.model"),
        vocab_size=load(model).vocab_size(),
    )
