"""Write the token shards and the tokenizer that train_gpt.py reads, from one of three sources:

    python data/prepare.py --variant sp8192 --train-shards 80
        FineWeb shards, from the Hugging Face hub
    python data/prepare.py --docs text.jsonl.zst --num-val-docs 500 --vocab-size 1024 --name mytext
        own text
    python data/prepare.py --demo
        offline, seconds: demo.jsonl.zst beside this file, a novel and speeches; README.md says
        which. The same everywhere
    ... --docs or --demo with --caseops
        case as operator characters, see `encode_case`; a lossless transform

Layout under --output-root (default: the folder of this file); <name> is fineweb10B_<variant>,
--name, demo or demo_caseops:

    datasets/<name>/fineweb_{train,val}_%06d.bin
    datasets/<name>/fineweb_val_bytes_%06d.bin
        with --caseops: bytes of each validation token, see `case_bytes`
    datasets/<name>/stats.json
        what the dataset is made of: `tokenizer_sha256`, `text_sha256` (of the file with the texts
        of each split; not of downloads), and tokens and sha256 of each shard in `files`; see
        `measure_overlap` for `overlap`
    tokenizers/*_<vocab size>_bpe.model
        with --caseops: ..._bpe_caseops.model
    manifest.json
        of the last download

Shard: 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens as
little-endian uint16. Every document is BOS and its ids, without an end mark; a document may
straddle two shards.

A dataset is made beside its place and moved there when it is complete and checked: whatever fails,
the one that was there stays as it was; see `Place`.
"""

import argparse
import errno
import fcntl
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import signal
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath

import brotli
import huggingface_hub
import numpy as np
import sentencepiece as spm
import zstandard
from tqdm import tqdm as tqdm_bar

# no bar where there is no terminal: a log would get a line for each of its steps
tqdm = functools.partial(tqdm_bar, disable=None)

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
BOS = 1
MAX_VOCAB_SIZE = 2**16  # ids of a shard are uint16
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts them in an int32
OFFICIAL_REPO, COMMUNITY_REPO = "willdepueoai/parameter-golf", "kevclark/parameter-golf"
TITLE, ALLCAPS, CAPNEXT, ESC = OPERATORS = "\ue001\ue002\ue003\ue004"
OPERATOR_IDS = [4, 5, 6, 7]  # after padding, BOS, EOS and unknown
COMPRESSOR_LIMIT = 8_000_000  # bytes of text; brotli-11 takes about two seconds per million
DEMO_TEXT = Path(__file__).resolve().with_name("demo.jsonl.zst")
DEMO_SHA256 = "8212c9a4487afcfe642828934b2acd5eb0fecf8c3eaa0da70cf90c0ef4788e0c"
DEMO_VOCAB_SIZE, DEMO_VAL_DOCUMENTS = 1024, 32
MAX_OVERLAP = 5  # % of the validation documents: FineWeb repeats pages, a leaked split holds most
OWN_FILES = r"fineweb_.*\.bin(\.tmp)?|(stats|source)\.json(\.tmp)?|\.download"
OTHER_FORMATS = {
    b"\xfd7zXZ": "an xz file",
    b"BZh": "a bzip2 file",
    b"PK\3\4": "a zip file",
    b"PAR1": "a parquet file",
    b"\x04\x22\x4d\x18": "an lz4 file",
    b"7z\xbc\xaf": "a 7z file",
}


# -----------------------------------------------------------------------------
# files and shards


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write beside `path`, then rename: a killed run leaves no half file under the final name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # that of a full disk does not name the file
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    with atomic(path) as temporary:
        temporary.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def verify_shard(path: Path) -> int:
    """Number of tokens in the shard; ValueError unless header and file size agree."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    magic, version, count = header[:3].tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise ValueError(
            f"{path}: found magic {magic}, version {version}; "
            f"expected {SHARD_MAGIC}, {SHARD_VERSION}"
        )
    size, expected = path.stat().st_size, HEADER_BYTES + 2 * count
    if size != expected:
        raise ValueError(
            f"{path}: found {size} bytes; expected {expected} for the {count} tokens of its header"
        )
    if count < 1:
        raise ValueError(f"{path}: found {count} tokens; expected at least 1")
    return count


def write_shards(
    folder: Path, split: str, documents: Iterable[list[int]], shard_tokens: int, vocab_size: int
) -> int:
    """Pack documents into numbered shards, all full but the last. Returns the number of shards."""
    shard, filled, index = np.empty(shard_tokens, dtype="<u2"), 0, 0

    def flush():
        nonlocal filled, index
        assert shard[:filled].max() < vocab_size, "token id outside the vocabulary"
        write_shard(folder / f"fineweb_{split}_{index:06d}.bin", shard[:filled])
        filled, index = 0, index + 1

    for document in documents:
        ids = np.array(document, dtype="<u2")
        while len(ids):
            part = ids[: shard_tokens - filled]
            shard[filled : filled + len(part)] = part
            filled, ids = filled + len(part), ids[len(part) :]
            if filled == shard_tokens:
                flush()
    if filled:
        flush()
    return index


def describe_shards(folder: Path) -> dict[str, dict]:
    """`files` of stats.json: tokens (of a sidecar: entries) and sha256 of each shard, by name."""
    return {
        path.name: {"tokens": verify_shard(path), "sha256": sha256_of(path)}
        for path in sorted(folder.glob("fineweb_*.bin"))
    }


def shards_of(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))


def map_shard(path: Path) -> np.ndarray:
    """Tokens of the shard, uint16 [n], mapped and not read; ValueError as in `verify_shard`."""
    verify_shard(path)
    return np.asarray(np.memmap(path, "<u2", "r", HEADER_BYTES))


# -----------------------------------------------------------------------------
# where a dataset is made


@dataclass
class Place:
    """Where the dataset <name> lies, and what lies beside it while it is made:

    datasets/<name>            at any moment the old dataset, none, or the new one
    datasets/.<name>.new       the new one, not complete; the next call removes it
    datasets/.<name>.ready     complete and checked; the next call moves it to its place
    datasets/.<name>.old       the old one, replaced; the next call removes it
    datasets/.<name>.download  what has arrived from the hub; the next call goes on with it
    datasets/.<name>.lock      locked by the call at work
    """

    root: Path
    name: str

    def __post_init__(self):
        # a link to another disk is followed: files are renamed there, beside the real folder
        self.folder = (self.root / "datasets" / self.name).resolve()

    def beside(self, what: str) -> Path:
        return self.folder.with_name(f".{self.folder.name}.{what}")

    def model(self, file: str) -> Path:
        return self.root / "tokenizers" / file

    @contextmanager
    def locked(self) -> Iterator["Place"]:
        """Finish what an earlier call left, then work; removes the new dataset if that fails.

        Raises: ValueError if nothing can be written there, or another call is at work.
        """
        check_writable(self.root, self.folder.parent, self.root / "tokenizers")
        if os.path.ismount(self.folder):
            raise ValueError(
                f"{self.folder} is a mount point, which cannot be replaced: mount the folder "
                "above it, or give another --output-root"
            )
        with open(self.beside("lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"{self.folder}: another prepare.py is at work on it; wait for its end"
                ) from error
            except OSError:  # some network file systems have no locks
                pass
            self.recover()
            try:
                yield self
            finally:
                shutil.rmtree(self.beside("new"), ignore_errors=True)

    def recover(self) -> None:
        if self.beside("ready").exists():
            print(f"{self.folder}: moving the dataset that an earlier call completed to its place")
            self.move_in()
        elif self.folder.exists():
            self.remove_old()
        shutil.rmtree(self.beside("new"), ignore_errors=True)

    def new_folder(self) -> Path:
        self.beside("new").mkdir()
        return self.beside("new")

    def replace(self) -> None:
        """The new dataset takes the place of the old one."""
        os.rename(self.beside("new"), self.beside("ready"))
        self.move_in()

    def move_in(self) -> None:
        """Can be cut short at any line and called again."""
        ready = self.beside("ready")
        copies = {path: self.model(f".{path.name}.tmp") for path in ready.glob("*.model")}
        for model, copy in copies.items():  # to what may be another disk, and full
            shutil.copyfile(model, copy)
        if self.folder.exists():
            os.rename(self.folder, self.beside("old"))
        for model, copy in copies.items():
            os.replace(copy, self.model(model.name))
            model.unlink()
        os.rename(ready, self.folder)
        self.remove_old()

    def remove_old(self) -> None:
        """Files that are not of the dataset stay in the folder."""
        old = self.beside("old")
        if not old.exists():
            return
        for path in old.iterdir():
            kept = self.folder / path.name
            if not re.fullmatch(OWN_FILES, path.name) and not kept.exists():
                os.rename(path, kept)
        shutil.rmtree(old)

    def check_model(self, file: str, sha256: str) -> None:
        """Raises: ValueError if the dataset would replace the tokenizer of another one."""
        model = self.model(file)
        if not model.exists() or (found := sha256_of(model)) == sha256:
            return
        for folder in sorted((self.root / "datasets").iterdir()):
            stats = read_stats(folder)
            same = Path(stats.get("tokenizer", "")).name == file
            if folder.name != self.name and same and stats.get("tokenizer_sha256", found) == found:
                raise ValueError(
                    f"{model}: the dataset {folder.name} was made with it, and {self.name} needs "
                    "another tokenizer of the same name: give another --name, or delete "
                    f"{folder}"
                )


def check_writable(root: Path, *folders: Path) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(
                f"--output-root {root}: cannot write in {folder}: {error.strerror}"
            ) from error


def check_space(folder: Path, needed: float, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder.parent}: {what} need about {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB "
            "are free: free some, or give another --output-root"
        )


def read_stats(folder: Path) -> dict:
    """stats.json of the folder, {} if it has none that can be read."""
    try:
        stats = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stats if isinstance(stats, dict) else {}


def check_origin(folder: Path, source: dict | None) -> None:
    """Raises: ValueError if the folder holds shards of another origin than `source`, the repository
    or None for own text: they would be mixed or lost."""
    if not any(folder.glob("fineweb_*.bin")):
        return
    stats, note = read_stats(folder), folder / "source.json"
    found = stats.get("source")
    if not found and note.exists():  # of an earlier version of this program
        found = json.loads(note.read_text(encoding="utf-8"))
    if source and found and found != source:
        raise ValueError(f"{folder} holds shards of {found}; delete it to download from {source}")
    if source and stats and not found:
        raise ValueError(f"{folder} holds shards of own text; delete it to download from {source}")
    if not source and (found or not stats):
        origin = f"of {found}" if found else "without a stats.json that says what they are"
        raise ValueError(f"{folder} holds shards {origin}: delete it, or give another --name")


# -----------------------------------------------------------------------------
# overlap of the splits


def whole_documents(tokens: np.ndarray, complete: bool) -> Iterator[bytes]:
    """Each document in `tokens`, uint16 [n], from its BOS to before the next one, as bytes; the
    last one only if the tokens end where it ends (`complete`)."""
    borders = np.flatnonzero(tokens == BOS).tolist() + [len(tokens)] * complete
    return (tokens[start:stop].tobytes() for start, stop in pairwise(borders))


def training_documents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name of its shard, document) of each training document that no shard border cuts."""
    paths = shards_of(folder, "train")
    progress = tqdm(paths, desc="overlap", unit=" shards")
    for path, following in zip(progress, [*paths[1:], None], strict=True):
        complete = following is None or BOS in map_shard(following)[:1]
        for document in whole_documents(map_shard(path), complete):
            yield path.name, document


def find_overlap(folder: Path) -> tuple[int, int, str | None]:
    """Returns how many validation documents are a training document too, token by token, how many
    validation documents there are, and the name of the first training shard with one of them."""
    validation = map(map_shard, shards_of(folder, "val"))
    known = Counter(whole_documents(np.concatenate(list(validation)), complete=True))
    found, total, first = 0, known.total(), None
    for shard, document in training_documents(folder):
        if document in known:
            found, first = found + known.pop(document), first or shard
    return found, total, first


def measure_overlap(folder: Path, remedy: str, place: Path | None = None) -> dict[str, int]:
    """The figures `overlap` of stats.json: `find_overlap` over all shards in the folder.

    Raises: ValueError, beginning with the place or else the folder and ending with the remedy, at
    more than MAX_OVERLAP % of the validation documents.
    """
    found, total, first = find_overlap(folder)
    if 100 * found > MAX_OVERLAP * total:
        raise ValueError(
            f"{place or folder}: {found:,} of {total:,} validation documents ({found / total:.1%}) "
            f"stand in the training shards, the first in {first}; "
            f"at most {MAX_OVERLAP} % may: {remedy}"
        )
    return {"validation_documents_in_training": found, "validation_documents": total}


# -----------------------------------------------------------------------------
# case operators


def encode_case(text: str) -> str:
    """The text with every maximal run of ASCII letters in lower case; operator characters tell
    its capitals:

    TITLE    before a run: its first letter is a capital        The -> TITLE the, A -> TITLE a
    ALLCAPS  before a run of two letters or more: all are       USA -> ALLCAPS usa
    CAPNEXT  in any other run, before each later capital        McDonald -> TITLE mc CAPNEXT donald
    ESC      before an operator character that the text itself holds

    All other characters stay. decode_case(encode_case(text)) == text for every string.
    """
    # only runs with a capital; not tried from the middle of a run: a long one would take
    # quadratic time
    return re.sub(f"(?<![A-Za-z])[a-z]*[A-Z][A-Za-z]*|[{OPERATORS}]", encode_run, text)


def encode_run(match: re.Match) -> str:
    run = match[0]
    if run in OPERATORS:
        return ESC + run
    if len(run) > 1 and run.isupper():
        return ALLCAPS + run.lower()
    first = TITLE + run[0].lower() if run[0].isupper() else run[0]
    return first + re.sub("[A-Z]", lambda capital: CAPNEXT + capital[0].lower(), run[1:])


def decode_case(text: str) -> str:
    """The text that `encode_case` was given. Defined for every string: an operator acts on the
    ASCII letters right after it, ESC on any character, and stands for nothing where there are none.
    """
    pattern = f"{ESC}(.?)|{ALLCAPS}([A-Za-z]*)|[{TITLE}{CAPNEXT}]([A-Za-z]?)"
    return re.sub(pattern, lambda found: found[1] or (found[2] or found[3] or "").upper(), text)


def normalised(sp: spm.SentencePieceProcessor, text: str) -> str:
    """The text as the model reads it (nmt_nfkc, spaces collapsed), with real spaces."""
    return sp.normalize(text).replace("\u2581", " ")


def piece_bytes(sp: spm.SentencePieceProcessor) -> np.ndarray:
    """UTF-8 bytes of the original text by token id, uint16 [vocab size]: byte pieces 1, control
    pieces and operators 0."""

    def size(i: int) -> int:
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) or i in OPERATOR_IDS:
            return 0
        return 1 if sp.is_byte(i) else len(sp.id_to_piece(i).replace("\u2581", " ").encode())

    return np.array([size(i) for i in range(sp.vocab_size())], dtype="<u2")


def case_bytes(table: np.ndarray, ids: list[int]) -> np.ndarray:
    """Bytes of the original text that each token of a document accounts for, uint16 [tokens];
    table: `piece_bytes`.

    The original is decode_case(sp.decode(ids)): the document after the model's normalisation and
    before the transform. BOS and operators are 0 bytes; an operator character of the text itself,
    which stands after ESC, is 3.
    """
    counts, literal = table[ids], None
    for at in np.flatnonzero(np.array(ids) == OPERATOR_IDS[OPERATORS.index(ESC)]):
        if at != literal:
            literal = at + 1
            if ids[literal : literal + 1] and ids[literal] in OPERATOR_IDS:
                counts[literal] = len(ESC.encode())
    return counts


# -----------------------------------------------------------------------------
# tokenizer


def load_tokenizer(path: Path, caseops: bool = False) -> spm.SentencePieceProcessor:
    sp, model = spm.SentencePieceProcessor(), path.read_bytes()
    try:
        loaded = model and sp.LoadFromSerializedProto(model)
    except RuntimeError:
        loaded = False
    if not loaded:
        raise ValueError(f"{path}: found {len(model):,} bytes; expected a SentencePiece model")
    if sp.bos_id() != BOS:
        raise ValueError(f"{path}: found BOS id {sp.bos_id()}; expected {BOS}")
    if not sp.is_control(BOS):  # its name would be counted as text at the start of each document
        raise ValueError(f"{path}: found BOS as a piece of text; expected a control piece")
    # without this piece a lone space becomes three byte tokens, and counting bytes by token
    # overstates the text
    if sp.piece_to_id("\u2581") == sp.unk_id():
        raise ValueError(f"{path}: has no piece for a lone space (U+2581)")
    if sp.vocab_size() > MAX_VOCAB_SIZE:
        raise ValueError(
            f"{path}: found {sp.vocab_size()} pieces; a shard holds ids below {MAX_VOCAB_SIZE}"
        )
    pieces = map(sp.id_to_piece, range(sp.vocab_size()))
    operators = [piece for piece in pieces if set(piece) & set(OPERATORS)]
    has_ids = sp.encode(OPERATORS) == OPERATOR_IDS
    if caseops and not (has_ids and operators == list(OPERATORS)):
        raise ValueError(
            f"{path}: --caseops needs U+E001 to U+E004 as user-defined pieces {OPERATOR_IDS}, "
            f"and in no other piece; found {ascii(operators)} "
            f"as {[sp.piece_to_id(piece) for piece in operators]}"
        )
    if has_ids and not caseops:
        raise ValueError(f"{path}: has pieces for case operators; use it with --caseops")
    return sp


def training_slices(texts: Iterable[str]) -> Iterator[str]:
    """Slices of 1,000 characters: SentencePiece drops sentences of more than 4,192 bytes."""
    for text in texts:
        text = text.replace("\0", " ").strip()
        yield from (text[start : start + 1000] for start in range(0, len(text), 1000))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, model_prefix: Path, caseops: bool = False
) -> Path:
    """BPE with the competition's settings; with `caseops` of the transformed texts, the operators
    being pieces 4 to 7.

    Returns the path of the model, <model_prefix>.model or <model_prefix>_caseops.model.
    Raises: ValueError if the texts do not give that many pieces, or need more.
    """
    model = io.BytesIO()
    if caseops:
        model_prefix = model_prefix.with_name(model_prefix.name + "_caseops")
        reader = spm.SentencePieceNormalizer(
            rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False
        )
        # as `encode_documents` does
        texts = (encode_case(reader.normalize(text)) for text in texts)
    with trainer_errors(vocab_size) as watched:
        spm.SentencePieceTrainer.train(
            sentence_iterator=watched(training_slices(texts)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            hard_vocab_limit=False,
            pad_id=0,
            bos_id=BOS,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
            user_defined_symbols=list(OPERATORS) if caseops else [],
        )
    check_vocab_size(model.getvalue(), vocab_size)
    path = model_prefix.with_name(model_prefix.name + ".model")
    with atomic(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return path


@contextmanager
def trainer_errors(vocab_size: int) -> Iterator[Callable[[Iterable[str]], Iterator[str]]]:
    """Yields a function to pass the texts through. SentencePiece makes a RuntimeError of whatever
    is raised while it reads them: here that error comes out again, and its own with our words."""
    raised = []

    def watched(texts):
        try:
            yield from texts
        except BaseException as error:
            raised.append(error)
            raise

    try:
        yield watched
    except RuntimeError as error:
        if raised:
            raise raised[0] from None
        if needed := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
            raise ValueError(
                f"--vocab-size {vocab_size}: bytes, control pieces and characters of the training "
                f"text need {needed[1]} pieces"
            ) from error
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--vocab-size {vocab_size}: no tokenizer of this text: {reason}"
        ) from error


def check_vocab_size(model: bytes, vocab_size: int) -> None:
    found = spm.SentencePieceProcessor(model_proto=model).vocab_size()
    if found != vocab_size:
        raise ValueError(
            f"--vocab-size {vocab_size}: the training text gives only {found} pieces: ask for no "
            "more, or give more text"
        )


def encode_documents(
    sp: spm.SentencePieceProcessor, texts: Iterable[str], caseops: bool
) -> Iterator[tuple[str, list[int]]]:
    """(what the model is given, BOS and its ids) of each text. The transform comes after
    normalisation, which joins letters with what follows them and makes ASCII letters of others: it
    could separate an operator from its letter."""
    texts = (encode_case(normalised(sp, text)) for text in texts) if caseops else iter(texts)
    while batch := list(islice(texts, 256)):  # by batches, so that SentencePiece uses all cores
        for text, ids in zip(batch, sp.encode(batch), strict=True):
            yield text, [BOS] + ids


def decode_checked(sp: spm.SentencePieceProcessor, given: str, ids: list[int]) -> str:
    """The text of the ids, BOS first.

    Raises: ValueError if that is not the given text as the model normalises it: a piece is missing,
    and no bytes stand in for it.
    """
    text, expected = sp.decode(ids[1:]), normalised(sp, given)
    # some models put a space before each text and take it away again
    if text not in (expected, expected.removeprefix(" ")):
        at = len(os.path.commonprefix([text, expected]))
        raise ValueError(
            f"the tokenizer does not give back its text: found {text[at : at + 20]!a} at "
            f"character {at}; expected {expected[at : at + 20]!a}"
        )
    return text


class ByteTable:
    """Bytes by token, as the competition counts them: a piece is its UTF-8 length, a space at its
    start counts unless a control piece is before it, spaces inside are U+2581 of three bytes."""

    def __init__(self, sp: spm.SentencePieceProcessor):
        ids, pieces = range(sp.vocab_size()), map(sp.id_to_piece, range(sp.vocab_size()))
        boundary = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids]
        self.boundary = np.array(boundary)
        plain = ~self.boundary & ~np.array([sp.is_byte(i) for i in ids])
        pieces = list(pieces)
        self.space = plain & np.array([piece.startswith("\u2581") for piece in pieces])
        sizes = [len(piece.removeprefix("\u2581").encode()) for piece in pieces]
        self.base = np.where(plain, sizes, ~self.boundary)

    def count(self, ids: list[int]) -> int:
        """Bytes of a document, BOS first."""
        ids = np.array(ids)
        spaces = self.space[ids[1:]] & ~self.boundary[ids[:-1]]
        return int(self.base[ids].sum() + spaces.sum())


# -----------------------------------------------------------------------------
# text to dataset


def read_documents(path: Path) -> Iterator[str]:
    """The `text` of every line of a .jsonl file, plain, .gz or .zst; empty texts are skipped.

    Raises: ValueError naming file and line.
    """
    for number, line in enumerate(read_lines(path), start=1):
        try:
            text = json.loads(line)["text"]
            # JSON can spell half a surrogate pair, UTF-8 cannot
            text = text.encode("utf-8", errors="replace").decode("utf-8")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with a string `text`; "
                f"found {line[:60]}"
            ) from error
        if text.strip():
            yield text


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file, plain or compressed, as its first bytes say.

    Raises: ValueError naming the file if it is cut, damaged or compressed in another way.
    """
    with open(path, "rb") as file:
        start = file.peek(8)[:8]
        for magic, name in OTHER_FORMATS.items():
            if start.startswith(magic):
                raise ValueError(f"{path}: found {name}; expected JSON lines, plain, .gz or .zst")
        try:
            if start[:2] == b"\x1f\x8b":
                yield from gzip.open(file)
            elif start[:4] == b"\x28\xb5\x2f\xfd" or start[1:4] == b"\x2a\x4d\x18":
                yield from split_lines(zstd_chunks(file))
            else:
                yield from file
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise ValueError(f"{path}: the compressed file is cut or damaged: {error}") from error


def zstd_chunks(file: io.BufferedReader) -> Iterator[bytes]:
    """Frame by frame: the library's own reader takes a file that is cut for one that ends."""
    # zstandard's default refuses windows over 128 MiB
    unpacker, frame = zstandard.ZstdDecompressor(max_window_size=2**31), None
    while data := file.read(2**16):
        while data:
            frame = frame or unpacker.decompressobj()
            yield frame.decompress(data)
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("it ends inside a frame")


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


@dataclass
class DocumentRange:
    """Documents start .. stop-1 of a file, read anew by every iteration, not held in memory."""

    path: Path
    start: int
    stop: int | None

    def __iter__(self) -> Iterator[str]:
        return islice(read_documents(self.path), self.start, self.stop)

    def __str__(self) -> str:
        return f"{self.path}" + f" after its first {self.start:,} documents" * bool(self.start)


def survey(train: Iterable[str], val: Iterable[str]) -> dict[str, int]:
    """UTF-8 bytes of the texts of each split.

    Raises: ValueError if a split has no text, or both have the same one.
    """
    sizes = {"train": 0, "val": 0}

    def digests(split, texts):
        for text in tqdm(texts, desc=f"reading {split}", unit=" documents"):
            sizes[split] += len(text.encode())
            yield hashlib.sha256(text.strip().encode()).digest()

    numbers = {digest: number for number, digest in enumerate(digests("val", val))}
    for number, digest in enumerate(digests("train", train)):
        if digest in numbers:
            raise ValueError(
                f"validation document {numbers[digest]} is also training document {number} (from 0)"
            )
    for split, texts in {"train": train, "val": val}.items():
        if not sizes[split]:
            raise ValueError(f"no text for the {split} split: found no document in {texts}")
    return sizes


def compressor_bpb(text: bytes) -> dict[str, float]:
    """What general compressors need for the text, in bits per byte: the bar that a language model
    has to clear."""
    packed = {
        "brotli-11": brotli.compress(text, quality=11, lgwin=24),
        "xz-9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: round(8 * len(data) / len(text), 4) for name, data in packed.items()}


def write_split(
    folder: Path,
    split: str,
    tokenizer: Path,
    texts: Iterable[str],
    shard_tokens: int,
    caseops: bool,
) -> tuple[dict, bytes]:
    """Shard the texts, with `caseops` a byte sidecar for validation. Returns the figures and, up to
    COMPRESSOR_LIMIT, the text that the tokens spell.

    Raises: ValueError if there is no text, if a document is not what its tokens spell, or if their
    bytes do not sum to it: of validation as the competition counts them, with `caseops` of the
    sidecar.
    """
    sp = load_tokenizer(tokenizer, caseops)
    figures = {"documents": 0, "tokens": 0, "bytes": 0}
    figures |= {"documents_with_lost_case": 0} if caseops else {}
    spelled, sidecar = bytearray(), []
    table, plain_table = piece_bytes(sp) if caseops else None, ByteTable(sp)

    def spell(given: str, ids: list[int]) -> str:
        text = decode_checked(sp, given, ids)  # what counts is what the tokens spell
        counted = expected = len(text.encode())
        if caseops:
            transformed, text = text, decode_case(text)
            # the model normalises the transformed text too: j and a caron are one character,
            # J and a caron not
            figures["documents_with_lost_case"] += encode_case(text) != transformed
            counts, expected = case_bytes(table, ids), len(text.encode())
            counted = counts.sum()
            if split == "val":
                sidecar.append(counts)
        elif split == "val":
            counted = plain_table.count(ids)
        if counted != expected:
            raise ValueError(
                f"its tokens account for {counted} bytes; expected the {expected} of its text"
            )
        return text

    def counted():
        for given, ids in tqdm(encode_documents(sp, texts, caseops), desc=split, unit=" documents"):
            try:
                text = spell(given, ids).encode()
            except ValueError as error:
                raise ValueError(
                    f"{tokenizer.name}: {split} document {figures['documents']} (from 0): {error}"
                ) from error
            figures["documents"] += 1
            figures["tokens"] += len(ids)
            figures["bytes"] += len(text)
            if figures["bytes"] <= COMPRESSOR_LIMIT:
                spelled.extend(text)
            yield ids

    figures["shards"] = write_shards(folder, split, counted(), shard_tokens, sp.vocab_size())
    if not figures["bytes"]:
        raise ValueError(f"no text for the {split} split: its documents have no bytes")
    figures["bytes_per_token"] = round(figures["bytes"] / figures["tokens"], 4)
    if sidecar:
        write_shards(folder, f"{split}_bytes", sidecar, shard_tokens, 2**16)
        figures["sidecar_bytes"] = sum(int(counts.sum()) for counts in sidecar)
    return figures, bytes(spelled)


@dataclass
class OwnText:
    """A dataset to be made of texts; `train` and `val` are iterated several times."""

    name: str
    train: DocumentRange
    val: DocumentRange
    shard_tokens: int
    caseops: bool
    tokenizer: Path | None  # without one, a model of vocab_size pieces is trained
    vocab_size: int | None
    model_prefix: str  # of its file

    def build(self, root: Path) -> dict:
        """Returns stats.json of the new dataset, which is in its place.

        Raises: ValueError if the texts or the tokenizer do not fit, or the splits share a text, or
        too many documents (see `measure_overlap`); then nothing has changed.
        """
        with Place(root, self.name).locked() as place:
            check_origin(place.folder, None)
            if self.tokenizer:
                load_tokenizer(self.tokenizer, self.caseops)
            sizes = survey(self.train, self.val)
            folder = place.new_folder()
            stats = self.write(place, folder, self.find_tokenizer(place, folder), sizes)
            write_json(folder / "stats.json", stats)
            place.replace()
        return stats

    def find_tokenizer(self, place: Place, folder: Path) -> Path:
        if self.tokenizer:
            return self.tokenizer
        prefix = folder / self.model_prefix
        model = train_tokenizer(self.train, self.vocab_size, prefix, self.caseops)
        place.check_model(model.name, sha256_of(model))
        return model

    def hash_texts(self) -> dict[str, str]:
        """sha256 of the file of each split, compressed as it is; one file may serve both."""
        known = {path: sha256_of(path) for path in {self.train.path, self.val.path}}
        return {"train": known[self.train.path], "val": known[self.val.path]}

    def write(self, place: Place, folder: Path, tokenizer: Path, sizes: dict[str, int]) -> dict:
        """Shards in the folder; returns the stats."""
        options = self.shard_tokens, self.caseops
        val, val_text = write_split(folder, "val", tokenizer, self.val, *options)
        needed = 2 * sizes["train"] / val["bytes_per_token"]
        check_space(folder, needed, "the training shards")
        train, _ = write_split(folder, "train", tokenizer, self.train, *options)
        stats = {
            "name": self.name,
            "tokenizer": str(self.tokenizer or place.model(tokenizer.name)),
            "tokenizer_sha256": sha256_of(tokenizer),
            "vocab_size": load_tokenizer(tokenizer, self.caseops).vocab_size(),
            "caseops": self.caseops,
            "text_sha256": self.hash_texts(),
            "train": train,
            "val": val,
        }
        remedy = "take them out of the training text, or hold out other documents (--val-docs)"
        stats["overlap"] = measure_overlap(folder, remedy, place.folder)
        if len(val_text) == val["bytes"]:
            stats["val_compressor_bpb"] = compressor_bpb(val_text)
        return stats | {"files": describe_shards(folder)}


# -----------------------------------------------------------------------------
# demo corpus


def check_demo_text() -> None:
    """Raises: ValueError if the text is not the one whose figures are published."""
    if not DEMO_TEXT.is_file():
        raise ValueError(f"{DEMO_TEXT}: not there; --demo needs it: restore it from the repository")
    if (found := sha256_of(DEMO_TEXT)) != DEMO_SHA256:
        raise ValueError(
            f"{DEMO_TEXT}: found sha256 {found}; expected {DEMO_SHA256}: restore it from the "
            "repository, or give --docs to use other text"
        )


def build_demo(root: Path, shard_tokens: int, caseops: bool = False) -> dict:
    """As `--docs demo.jsonl.zst --num-val-docs 32 --vocab-size 1024 --name demo` builds it."""
    check_demo_text()
    text = OwnText(
        name="demo_caseops" if caseops else "demo",
        train=DocumentRange(DEMO_TEXT, DEMO_VAL_DOCUMENTS, None),
        val=DocumentRange(DEMO_TEXT, 0, DEMO_VAL_DOCUMENTS),
        shard_tokens=shard_tokens,
        caseops=caseops,
        tokenizer=None,
        vocab_size=DEMO_VOCAB_SIZE,
        model_prefix=f"demo_{DEMO_VOCAB_SIZE}_bpe",
    )
    return text.build(root)


# -----------------------------------------------------------------------------
# download


GATED = (
    "the repository is not there, private or gated: check MATCHED_FINEWEB_REPO_ID, or accept its "
    "terms on the hub and set HF_TOKEN"
)
HTTP_REMEDIES = {
    401: GATED,
    403: GATED,
    404: "check MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX",
    429: "wait some minutes and call again; what has arrived is kept",
    500: "call again later; what has arrived is kept",
}
NETWORK_REMEDY = "check network, proxy and HF_ENDPOINT and call again; what has arrived is kept"
DISK_REMEDY = "free some space and call again; what has arrived is kept"


class HubError(OSError):
    """What the hub or the network said, with its reason and what to do."""


def hub_reason(error: Exception) -> str:
    """HTTP status, or the innermost of the library's chain of errors, and what to do about it."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    responses = [getattr(cause, "response", None) for cause in causes]
    response = next((found for found in responses if found is not None), None)
    if response is not None:
        status = response.status_code
        remedy = HTTP_REMEDIES.get(status, HTTP_REMEDIES[500])
        return f"HTTP {status} {response.reason_phrase}: {remedy}"
    reason = " ".join(str(causes[-1]).split()) or type(causes[-1]).__name__
    full = any(getattr(cause, "errno", None) == errno.ENOSPC for cause in causes)
    return f"{reason}: {DISK_REMEDY if full else NETWORK_REMEDY}"


@dataclass
class Hub:
    """The repository, and the folder where its files arrive to be verified."""

    repo_id: str
    remote_root: str
    arriving: Path

    @contextmanager
    def asked_for(self, remote: str) -> Iterator[str]:
        """Yields the path in the repository. The library raises errors of its own, of its HTTP
        client and of its Rust part: all of them become HubError."""
        try:
            yield str(PurePosixPath(self.remote_root, remote))
        except Exception as error:
            raise HubError(f"{self.repo_id}, {remote}: {hub_reason(error)}") from error

    def describe(self, remote: str) -> huggingface_hub.HfFileMetadata:
        """Size and checksum of the file; asks again a few times where the hub is busy or away."""
        with self.asked_for(remote) as filename:
            url = huggingface_hub.hf_hub_url(self.repo_id, filename, repo_type="dataset")
            return huggingface_hub.get_hf_file_metadata(url, retry_on_errors=True)

    def fetch(self, remote: str, told: huggingface_hub.HfFileMetadata) -> tuple[Path, str, bool]:
        """Returns the file, its sha256, and whether the hub told a checksum, which then is the
        file's. Raises: HubError; ValueError if size or checksum differ."""
        with self.asked_for(remote) as filename:
            # not through the user's cache, which would keep a second copy of 16 GB
            arrived = huggingface_hub.hf_hub_download(
                repo_id=self.repo_id,
                repo_type="dataset",
                filename=filename,
                local_dir=self.arriving,
                cache_dir=self.arriving / "cache",
            )
        try:
            return Path(arrived), *compare(Path(arrived), told)
        except ValueError as error:
            raise ValueError(f"{self.repo_id} sent a bad {remote}: {error}; call again") from error


def compare(path: Path, told: huggingface_hub.HfFileMetadata) -> tuple[str, bool]:
    """sha256 of the file, and whether the hub told a checksum: sha256 of a large file, git's blob
    hash of a small one. Raises: ValueError if size or checksum differ."""
    size, etag = path.stat().st_size, told.etag or ""
    if told.size not in (None, size):
        raise ValueError(f"found {size} bytes; expected {told.size}, says the hub")
    found = own = sha256_of(path)
    if re.fullmatch("[0-9a-f]{40}", etag):
        blob = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % size + blob).hexdigest()
    elif not re.fullmatch("[0-9a-f]{64}", etag):
        return own, False
    if found != etag:
        raise ValueError(f"found checksum {found}; expected {etag}, says the hub")
    return own, True


def read_manifest(path: Path, repo_id: str) -> dict:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        found = path.read_bytes()[:60]
        raise ValueError(f"{repo_id}: manifest.json is no JSON object; found {found}")
    return manifest


def manifest_entry(manifest: dict, name: str, vocab_size: int, repo_id: str) -> tuple[dict, str]:
    """(shard statistics, remote path of the tokenizer) of a dataset that the manifest must name."""
    try:
        datasets = {dataset["name"]: dataset for dataset in manifest.get("datasets", [])}
        if name not in datasets:
            raise ValueError(
                f"the manifest of {repo_id} has no dataset {name}; it has {sorted(datasets)}"
            )
        wanted, stats = datasets[name]["tokenizer_name"], datasets[name]["stats"]
        stats = {key: int(stats[key]) for key in ("files_train", "files_val", "tokens_val")}
        if min(stats.values()) < 1:
            raise ValueError(f"the manifest of {repo_id} says {stats} for {name}")
        for tokenizer in manifest.get("tokenizers", []):
            if (tokenizer["name"], tokenizer["vocab_size"]) == (wanted, vocab_size):
                return stats, tokenizer["model_path"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the manifest of {repo_id} has no readable entry {error}") from error
    raise ValueError(f"the manifest of {repo_id} has no tokenizer {wanted} of {vocab_size} pieces")


def shard_names(split: str, count: int) -> list[str]:
    return [f"fineweb_{split}_{index:06d}.bin" for index in range(count)]


def link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no such links."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


@dataclass
class Download:
    """An official variant on its way from the hub to datasets/<name>."""

    place: Place
    source: dict  # repo_id, remote_root
    vocab_size: int

    def __post_init__(self):
        self.stock = self.place.beside("download")  # what has arrived and was verified
        # what lies there from an earlier call did not arrive whole, or failed verification
        shutil.rmtree(self.stock / "arriving", ignore_errors=True)
        self.hub = Hub(**self.source, arriving=self.stock / "arriving")
        self.verified = True

    def run(self, train_shards: int) -> dict:
        """All validation shards, the first `train_shards` training shards and the tokenizer: the
        stats of the new dataset, which is in its place.

        Raises: ValueError if the repository does not have them, sends bad ones, or its splits share
        too many documents (see `measure_overlap`); HubError. What has arrived is kept.
        """
        path, *_ = self.hub.fetch("manifest.json", self.hub.describe("manifest.json"))
        manifest = read_manifest(path, self.hub.repo_id)
        name, repo_id = self.place.name, self.hub.repo_id
        expected, model_path = manifest_entry(manifest, name, self.vocab_size, repo_id)
        if not 0 < train_shards <= expected["files_train"]:
            raise ValueError(
                f"--train-shards {train_shards}: {repo_id} has {expected['files_train']}"
                f" for {name.removeprefix('fineweb10B_')}"
            )
        self.claim()
        names = shard_names("val", expected["files_val"])
        names += self.wanted_training(train_shards, expected["files_train"])
        self.check_known(names)
        stats = self.collect(names, model_path, expected)
        self.place.replace()
        shutil.rmtree(self.stock)
        write_json(self.place.root / "manifest.json", manifest | {"downloaded_from": self.source})
        print(f"{self.place.root / 'manifest.json'} is now the one of {repo_id}")
        return stats

    def claim(self) -> None:
        """Shards of two repositories have the same names and must not mix."""
        check_origin(self.place.folder, self.source)
        check_origin(self.stock, self.source)
        write_json(self.stock / "source.json", self.source)

    def wanted_training(self, train_shards: int, available: int) -> list[str]:
        """As many as are asked for, and at least those that the folder holds."""
        names = shard_names("train", available)
        held = [i for i, name in enumerate(names) if (self.place.folder / name).exists()]
        kept = max(held, default=-1) + 1
        if kept > train_shards:
            print(
                f"{self.place.folder} holds training shards up to {names[kept - 1]}: all are kept"
            )
        return names[: max(kept, train_shards)]

    def check_known(self, names: list[str]) -> None:
        found = {path.name for path in self.place.folder.glob("fineweb_*.bin")}
        if unknown := sorted(found - set(names)):
            raise ValueError(
                f"{self.place.folder}: {self.hub.repo_id} has no {unknown[0]}: move it away"
            )

    def collect(self, names: list[str], model_path: str, expected: dict) -> dict:
        """The new folder, complete and verified; returns its stats."""
        folder, repo_id = self.place.new_folder(), self.hub.repo_id
        model_sha256 = self.fetch_tokenizer(model_path, folder)
        files = self.find_shards(self.describe(names), folder)
        stats = {
            "name": self.place.name,
            "source": self.source,
            "tokenizer": str(self.place.model(self.model_name)),
            "tokenizer_sha256": model_sha256,
            "vocab_size": self.vocab_size,
        }
        for split in ("val", "train"):
            tokens = [files[path.name]["tokens"] for path in shards_of(folder, split)]
            stats[split] = {"tokens": sum(tokens), "shards": len(tokens)}
        if stats["val"]["tokens"] != expected["tokens_val"]:
            raise ValueError(
                f"{self.place.folder}: found {stats['val']['tokens']:,} validation tokens; "
                f"expected {expected['tokens_val']:,}, says the manifest of {repo_id}"
            )
        remedy = "set MATCHED_FINEWEB_REPO_ID to a repository without them"
        if self.place.folder.exists():
            remedy = "delete the folder and " + remedy
        stats["overlap"] = measure_overlap(folder, remedy, self.place.folder)
        stats |= {"verified": self.verified, "files": files}
        write_json(folder / "stats.json", stats)
        return stats

    @property
    def model_name(self) -> str:
        return f"fineweb_{self.vocab_size}_bpe.model"

    def describe(self, names: list[str]) -> dict[str, huggingface_hub.HfFileMetadata]:
        """Of all shards before the first arrives: one state of the repository, and the space."""
        remotes = [f"datasets/{self.place.name}/{name}" for name in names]
        with ThreadPoolExecutor(8) as pool:
            return dict(zip(names, pool.map(self.hub.describe, remotes), strict=True))

    def fetch_tokenizer(self, remote: str, folder: Path) -> str:
        """Its sha256."""
        arrived, sha256, verified = self.hub.fetch(remote, self.hub.describe(remote))
        self.verified &= verified
        found = load_tokenizer(arrived).vocab_size()
        if found != self.vocab_size:
            raise ValueError(
                f"{self.hub.repo_id} sent a bad {remote}: found {found} pieces; "
                f"expected {self.vocab_size}"
            )
        self.place.check_model(self.model_name, sha256)
        os.replace(arrived, folder / self.model_name)
        return sha256

    def find_shards(self, told: dict[str, huggingface_hub.HfFileMetadata], folder: Path) -> dict:
        """`files` of stats.json; the shards stand in the folder."""
        files = {}
        for name in tqdm(told, desc="on disk", unit=" files"):
            for path in (self.place.folder / name, self.stock / name):
                if name not in files and path.exists() and (entry := self.accept(path, told[name])):
                    link(path, folder / name)
                    files[name] = entry
        missing = [name for name in told if name not in files]
        check_space(folder, sum(told[name].size or 0 for name in missing), "the missing shards")
        for name in tqdm(missing, desc=self.place.name, unit=" files"):
            files[name] = self.fetch_shard(name, told[name])
            link(self.stock / name, folder / name)
        return dict(sorted(files.items()))

    def accept(self, path: Path, told: huggingface_hub.HfFileMetadata) -> dict | None:
        """The entry of a shard that is on disk, None if it is not the hub's."""
        try:
            count, (sha256, verified) = verify_shard(path), compare(path, told)
            known = read_stats(path.parent).get("files", {}).get(path.name, {}).get("sha256")
            if not verified and known not in (None, sha256):
                raise ValueError(f"found checksum {sha256}; expected {known}, says stats.json")
        except ValueError as error:
            print(f"downloading again: {path}: {str(error).removeprefix(f'{path}: ')}")
            return None
        self.verified &= verified
        return {"tokens": count, "sha256": sha256}

    def fetch_shard(self, name: str, told: huggingface_hub.HfFileMetadata) -> dict:
        """The entry of a shard that has arrived in the stock."""
        remote = f"datasets/{self.place.name}/{name}"
        arrived, sha256, verified = self.hub.fetch(remote, told)
        try:
            count = verify_shard(arrived)
        except ValueError as error:
            raise ValueError(f"{self.hub.repo_id} sent a bad {remote}: {error}") from error
        os.replace(arrived, self.stock / name)
        self.verified &= verified
        return {"tokens": count, "sha256": sha256}


def download(variant: str, train_shards: int, root: Path) -> dict:
    """See `Download.run`."""
    default_repo = OFFICIAL_REPO if variant == "sp1024" else COMMUNITY_REPO
    source = {
        "repo_id": os.environ.get("MATCHED_FINEWEB_REPO_ID", default_repo),
        "remote_root": os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets"),
    }
    with Place(root, f"fineweb10B_{variant}").locked() as place:
        return Download(place, source, int(variant.removeprefix("sp"))).run(train_shards)


# -----------------------------------------------------------------------------
# command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")  # without the usage: one line


def whole_number(low: int, high: int = 10**12) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"found {text!r}; expected a whole number from {low} to {high:,}"
            )
        return int(text)

    return parse


def existing_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file" if not path.exists() else "a pipe"
        raise argparse.ArgumentTypeError(
            f"found {kind} at {text}; expected a file, which is read several times"
        )
    return path


BELONGS = {  # to which source an option belongs, and what it is if not given
    "train_shards": (("--variant",), 80),
    "shard_tokens": (("--docs", "--demo"), 100_000_000),
    "caseops": (("--docs", "--demo"), False),
    **dict.fromkeys(
        ("name", "tokenizer", "vocab_size", "val_docs", "num_val_docs")
        + ("max_train_docs", "max_val_docs"),
        (("--docs",), None),
    ),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="prepare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--variant", metavar="sp<V>", help="download official shards: sp1024, sp4096, sp8192"
    )
    source.add_argument(
        "--docs",
        type=existing_file,
        metavar="FILE",
        help="own text: .jsonl, .jsonl.gz or .jsonl.zst with the key `text`",
    )
    source.add_argument("--demo", action="store_true", help="the text that comes with this file")
    parser.add_argument("--output-root", type=Path, default=Path(__file__).resolve().parent)
    count = whole_number(1)
    parser.add_argument(
        "--train-shards",
        type=count,
        help="with --variant: at least these; those in the folder are kept (default: 80)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=whole_number(1, MAX_SHARD_TOKENS),
        help="with --docs or --demo (default: 100,000,000)",
    )
    parser.add_argument(
        "--caseops",
        action="store_true",
        default=None,
        help="with --docs or --demo: case as operator characters",
    )
    own = parser.add_argument_group("with --docs")
    own.add_argument("--name", help="folder under datasets/")
    own.add_argument(
        "--tokenizer", type=existing_file, metavar="MODEL", help="SentencePiece model to use"
    )
    own.add_argument(
        "--vocab-size",
        type=whole_number(1, MAX_VOCAB_SIZE),
        help="or: train one on the training documents",
    )
    own.add_argument("--val-docs", type=existing_file, metavar="FILE", help="validation documents")
    own.add_argument("--num-val-docs", type=count, help="or: hold out the first N of --docs")
    own.add_argument("--max-train-docs", type=count)
    own.add_argument("--max-val-docs", type=count)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: Parser, args: argparse.Namespace) -> None:
    given = "--variant" if args.variant else "--docs" if args.docs else "--demo"
    for option, (sources, default) in BELONGS.items():
        if getattr(args, option) is None:
            setattr(args, option, default)
        elif given not in sources:
            name = option.replace("_", "-")
            parser.error(f"--{name} needs {' or '.join(sources)}; found with {given}")
    if args.variant and not re.fullmatch(r"sp[1-9]\d*", args.variant):
        parser.error(f"--variant {args.variant}: expected sp and a vocabulary size, as in sp1024")
    if not args.docs:
        return
    if not re.fullmatch(r"\w[\w.-]{,99}", args.name or ""):
        parser.error("--docs needs a --name of at most 100 letters, digits, dots and dashes")
    if (args.tokenizer is None) == (args.vocab_size is None):
        parser.error("--docs needs either --tokenizer or --vocab-size")
    if (args.val_docs is None) == (args.num_val_docs is None):
        parser.error("--docs needs either --val-docs or --num-val-docs")


def build_docs(args: argparse.Namespace) -> dict:
    held_out = args.num_val_docs or 0
    train_stop = None if args.max_train_docs is None else held_out + args.max_train_docs
    val_stop = min(
        (n for n in (args.num_val_docs, args.max_val_docs) if n is not None), default=None
    )
    text = OwnText(
        name=args.name,
        train=DocumentRange(args.docs, held_out, train_stop),
        val=DocumentRange(args.val_docs or args.docs, 0, val_stop),
        shard_tokens=args.shard_tokens,
        caseops=args.caseops,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        model_prefix=f"{args.name}_{args.vocab_size}_bpe",
    )
    return text.build(args.output_root)


def in_words(figures: dict) -> str:
    """Of a split: `1 document, 9 tokens, 30 bytes (3.3333 a token), 2 shards`."""
    words = {}
    for name, value in figures.items():
        unit = name.replace("_", " ")
        words[name] = f"{value:,} {unit.removesuffix('s') if value == 1 else unit}"
    if words.pop("bytes_per_token", None):
        words["bytes"] += f" ({figures['bytes_per_token']} a token)"
    return ", ".join(words.values())


def print_stats(stats: dict) -> None:
    print(f"{stats['name']}: {stats['tokenizer']}, {stats['vocab_size']} pieces")
    for split in ("train", "val"):
        print(f"{split}: {in_words(stats[split])}")
    found, total = stats["overlap"].values()
    print(f"overlap: {found:,} of {total:,} validation documents stand in the training shards")
    if not stats.get("verified", True):
        print("verified: not all files, the repository does not tell the checksums of some")
    compressed = stats.get("val_compressor_bpb", {}).items()
    skipped = f"not computed (shards were downloaded, or text over {COMPRESSOR_LIMIT:,} bytes)"
    told = ", ".join(f"{name} {bpb}" for name, bpb in compressed) or skipped
    print(f"val text, bits per byte of compressors: {told}")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    root = args.output_root
    check_writable(root, root / "datasets", root / "tokenizers")  # before any work
    if args.variant:
        stats = download(args.variant, args.train_shards, root)
    elif args.docs:
        stats = build_docs(args)
    else:
        stats = build_demo(root, args.shard_tokens, args.caseops)
    print_stats(stats)


def stop(number: int, frame) -> None:
    """What is on disk is safe at any moment, see `Place`; the next call clears up."""
    name = signal.Signals(number).name
    line = f"prepare.py: {name}: stopped. A dataset that was there stays; call again to go on"
    sys.stderr.write("\n" * sys.stderr.isatty() + line + "\n")
    sys.stderr.flush()
    os._exit(128 + number)


def report(argv: list[str] | None = None) -> None:
    """`main`; what it raises for something in files or settings becomes one line and exit status 1.

    In a thread: signals are answered while the tokenizer is trained, which is one call in C++.
    """
    try:
        ThreadPoolExecutor(1).submit(main, argv).result()
    except (OSError, ValueError, MemoryError) as error:
        sys.exit(f"prepare.py: {' '.join(str(error).split()) or type(error).__name__}")


def command() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup or in the background
            signal.signal(number, stop)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    report()


if __name__ == "__main__":
    command()
