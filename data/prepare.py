"""Write the token shards and the tokenizer that train_gpt.py reads, from one of three sources:

    python data/prepare.py --variant sp8192 --train-shards 80
        FineWeb shards, from the Hugging Face hub
    python data/prepare.py --docs text.jsonl.zst --num-val-docs 500 --vocab-size 1024 --name mytext
        own text
    python data/prepare.py --demo
        offline, seconds: the documentation of the running Python installation
    ... --docs or --demo with --caseops
        case as operator characters, see `encode_case`; a lossless transform

Layout under --output-root (default: the folder of this file); <name> is fineweb10B_<variant>,
--name, demo or demo_caseops:

    datasets/<name>/fineweb_{train,val}_%06d.bin
    datasets/<name>/fineweb_val_bytes_%06d.bin
        with --caseops: bytes of each validation token, see `case_bytes`
    datasets/<name>/stats.json
        written last: a folder without it is not complete; see `measure_overlap` for `overlap`
    tokenizers/*_<vocab size>_bpe.model
        with --caseops: ..._bpe_caseops.model
    manifest.json
        of the last download

Shard: 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens as
little-endian uint16. Every document is BOS and its ids, without an end mark; a document may
straddle two shards.
"""

import argparse
import ast
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath

import brotli
import huggingface_hub
import numpy as np
import sentencepiece as spm
import zstandard
from tqdm import tqdm

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
BOS = 1
OFFICIAL_REPO, COMMUNITY_REPO = "willdepueoai/parameter-golf", "kevclark/parameter-golf"
TITLE, ALLCAPS, CAPNEXT, ESC = OPERATORS = "\ue001\ue002\ue003\ue004"
OPERATOR_IDS = [4, 5, 6, 7]  # after padding, BOS, EOS and unknown
COMPRESSOR_LIMIT = 8_000_000  # bytes of text; brotli-11 takes about two seconds per million
DEMO_VOCAB_SIZE = 1024
DEMO_MIN_BYTES, DEMO_VAL_BYTES, DEMO_MIN_DOCUMENT_BYTES = 500_000, 200_000, 200
MAX_OVERLAP = 5  # % of the validation documents: FineWeb repeats pages, a leaked split holds most
NOT_DEMO = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


# -----------------------------------------------------------------------------
# files and shards


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write beside `path`, then rename: a killed run leaves no half file under the final name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)


def write_json(path: Path, content: dict) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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


def shards_of(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))


def map_shard(path: Path) -> np.ndarray:
    """Tokens of the shard, uint16 [n], mapped and not read; ValueError as in `verify_shard`."""
    verify_shard(path)
    return np.asarray(np.memmap(path, "<u2", "r", HEADER_BYTES))


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


def measure_overlap(folder: Path, remedy: str) -> dict[str, int]:
    """The figures `overlap` of stats.json: `find_overlap` over all shards in the folder.

    Raises: ValueError, ending with the remedy, at more than MAX_OVERLAP % of the validation
    documents.
    """
    found, total, first = find_overlap(folder)
    if 100 * found > MAX_OVERLAP * total:
        raise ValueError(
            f"{folder}: {found:,} of {total:,} validation documents ({found / total:.1%}) stand in "
            f"the training shards, the first in {first}; at most {MAX_OVERLAP} % may: {remedy}"
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
    sp = spm.SentencePieceProcessor(model_file=str(path))
    if sp.bos_id() != BOS:
        raise ValueError(f"{path}: found BOS id {sp.bos_id()}; expected {BOS}")
    # without this piece a lone space becomes three byte tokens, and counting bytes by token
    # overstates the text
    if sp.piece_to_id("\u2581") == sp.unk_id():
        raise ValueError(f"{path}: has no piece for a lone space (U+2581)")
    if sp.vocab_size() > 2**16:
        raise ValueError(f"{path}: found {sp.vocab_size()} pieces; a shard holds ids below {2**16}")
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
    """
    model = io.BytesIO()
    if caseops:
        model_prefix = model_prefix.with_name(model_prefix.name + "_caseops")
        reader = spm.SentencePieceNormalizer(
            rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False
        )
        # as `encode_documents` does
        texts = (encode_case(reader.normalize(text)) for text in texts)
    spm.SentencePieceTrainer.train(
        sentence_iterator=training_slices(texts),
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
    path = model_prefix.with_name(model_prefix.name + ".model")
    with atomic(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return path


def encode_documents(
    sp: spm.SentencePieceProcessor, texts: Iterable[str], caseops: bool
) -> Iterator[list[int]]:
    """BOS and the ids of each text. The transform comes after normalisation, which joins letters
    with what follows them and makes ASCII letters of others: it could separate an operator from
    its letter."""
    texts = (encode_case(normalised(sp, text)) for text in texts) if caseops else iter(texts)
    while batch := list(islice(texts, 256)):  # by batches, so that SentencePiece uses all cores
        for ids in sp.encode(batch):
            yield [BOS] + ids


# -----------------------------------------------------------------------------
# text to dataset


def read_documents(path: Path) -> Iterator[str]:
    """The `text` of every line of a .jsonl or .jsonl.zst file; empty texts are skipped."""
    with open(path, "rb") as file:
        if path.suffix == ".zst":  # zstandard's default refuses windows over 128 MiB
            unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
            file = io.BufferedReader(unpacker.stream_reader(file, read_across_frames=True))
        for number, line in enumerate(file, start=1):
            try:
                text = json.loads(line)["text"]
                # JSON can spell half a surrogate pair, UTF-8 cannot
                text = text.encode("utf-8", errors="replace").decode("utf-8")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with a string `text`"
                ) from error
            if text.strip():
                yield text


@dataclass
class DocumentRange:
    """Documents start .. stop-1 of a file, read anew by every iteration, not held in memory."""

    path: Path
    start: int
    stop: int | None

    def __iter__(self) -> Iterator[str]:
        return islice(read_documents(self.path), self.start, self.stop)


def check_disjoint(train: Iterable[str], val: Iterable[str]) -> None:
    def digests(texts):
        return (hashlib.sha256(text.strip().encode()).digest() for text in texts)

    numbers = {digest: number for number, digest in enumerate(digests(val))}
    for number, digest in enumerate(digests(train)):
        if digest in numbers:
            raise ValueError(
                f"validation document {numbers[digest]} is also training document {number} (from 0)"
            )


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
    sp: spm.SentencePieceProcessor,
    texts: Iterable[str],
    shard_tokens: int,
    caseops: bool,
) -> tuple[dict, bytes]:
    """Shard the texts, with `caseops` a byte sidecar for validation. Returns the figures and, up to
    COMPRESSOR_LIMIT, the text that the tokens spell.

    Raises: ValueError if there is no text, or if the sidecar does not sum to it.
    """
    figures = {"documents": 0, "tokens": 0, "bytes": 0}
    figures |= {"documents_with_lost_case": 0} if caseops else {}
    spelled, sidecar, table = bytearray(), [], piece_bytes(sp) if caseops else None

    def counted():
        for ids in tqdm(encode_documents(sp, texts, caseops), desc=split, unit=" documents"):
            text = sp.decode(ids[1:])  # nmt_nfkc changes text: what counts is what the tokens spell
            if caseops:
                transformed, text = text, decode_case(text)
                # the model normalises the transformed text too: j and a caron are one character,
                # J and a caron not
                figures["documents_with_lost_case"] += encode_case(text) != transformed
                counts = case_bytes(table, ids)
                if counts.sum() != len(text.encode()):
                    raise ValueError(
                        f"{split} document {figures['documents']} (from 0): its tokens account for "
                        f"{counts.sum()} bytes; expected the {len(text.encode())} of its text"
                    )
                if split == "val":
                    sidecar.append(counts)
            text = text.encode()
            figures["documents"] += 1
            figures["tokens"] += len(ids)
            figures["bytes"] += len(text)
            if figures["bytes"] <= COMPRESSOR_LIMIT:
                spelled.extend(text)
            yield ids

    figures["shards"] = write_shards(folder, split, counted(), shard_tokens, sp.vocab_size())
    if not figures["bytes"]:
        raise ValueError(f"no text for the {split} split of {folder}")
    figures["bytes_per_token"] = round(figures["bytes"] / figures["tokens"], 4)
    if sidecar:
        write_shards(folder, f"{split}_bytes", sidecar, shard_tokens, 2**16)
        figures["sidecar_bytes"] = sum(int(counts.sum()) for counts in sidecar)
    return figures, bytes(spelled)


def build_dataset(
    root: Path,
    name: str,
    tokenizer: Path,
    train: Iterable[str],
    val: Iterable[str],
    shard_tokens: int,
    caseops: bool = False,
) -> dict:
    """Shard both splits into datasets/<name>; `train` and `val` are iterated twice.

    Raises: ValueError if the splits share a text, or too many documents (see `measure_overlap`).
    """
    sp = load_tokenizer(tokenizer, caseops)
    check_disjoint(train, val)
    folder = root / "datasets" / name
    (folder / "stats.json").unlink(missing_ok=True)
    for shard in folder.glob("fineweb_*.bin"):  # of an earlier, longer run, and its sidecars
        shard.unlink()
    val_figures, val_text = write_split(folder, "val", sp, val, shard_tokens, caseops)
    train_figures, _ = write_split(folder, "train", sp, train, shard_tokens, caseops)
    stats = {
        "name": name,
        "tokenizer": str(tokenizer),
        "vocab_size": sp.vocab_size(),
        "caseops": caseops,
    }
    stats |= {"train": train_figures, "val": val_figures}
    stats["overlap"] = measure_overlap(
        folder, "take them out of the training text, or hold out other documents (--val-docs)"
    )
    if len(val_text) == val_figures["bytes"]:
        stats["val_compressor_bpb"] = compressor_bpb(val_text)
    write_json(folder / "stats.json", stats)
    return stats


# -----------------------------------------------------------------------------
# demo corpus


def docstrings(source: bytes) -> str:
    """All docstrings of a module in reading order, a blank line between them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own escapes are not ours to report
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except (SyntaxError, ValueError):  # some files of some installations are not Python 3
            return ""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in nodes if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def installed_prose() -> dict[str, str]:
    """Documentation of the running installation by name: docstrings of each module, topics of
    help()."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in NOT_DEMO]
        for path in (Path(folder, file) for file in files if file.endswith(".py")):
            texts[path.relative_to(library).as_posix()] = docstrings(path.read_bytes())
    try:
        from pydoc_data.topics import topics  # some distributions leave it out
    except ImportError:
        topics = {}
    return texts | {f"topics/{name}": text for name, text in topics.items()}


def demo_documents() -> list[tuple[str, str]]:
    """(name, text) of every document, in an order that depends on the names alone."""
    texts, seen, documents = installed_prose(), set(), []
    # Each paragraph is kept once: many topics are sections of longer ones, many methods repeat the
    # words of those they override, and validation text must not stand in the training text.
    # Longest document first.
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        kept = []
        for paragraph in re.split(r"\n\s*\n", texts[name].strip()):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text.encode()) >= DEMO_MIN_DOCUMENT_BYTES:
            documents.append((name, text))
    total = sum(len(text.encode()) for _, text in documents)
    if total < DEMO_MIN_BYTES:
        raise ValueError(
            f"found {total:,} bytes of documentation in this Python installation; the demo needs "
            f"{DEMO_MIN_BYTES:,}. Use a full installation, or --docs with any text"
        )
    return sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest())


def split_demo(documents: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """(train, val): the first documents are held out whole, as in the official split."""
    texts = [text for _, text in documents]
    count = held_out = 0
    while held_out < DEMO_VAL_BYTES:
        held_out += len(texts[count].encode())
        count += 1
    return texts[count:], texts[:count]


def build_demo(root: Path, shard_tokens: int, caseops: bool = False) -> dict:
    train, val = split_demo(demo_documents())
    name, prefix = "demo_caseops" if caseops else "demo", f"demo_{DEMO_VOCAB_SIZE}_bpe"
    tokenizer = train_tokenizer(train, DEMO_VOCAB_SIZE, root / "tokenizers" / prefix, caseops)
    return build_dataset(root, name, tokenizer, train, val, shard_tokens, caseops)


# -----------------------------------------------------------------------------
# download


@dataclass
class Hub:
    """The repository, and the folder where its files arrive to be verified."""

    repo_id: str
    remote_root: str
    staging: Path

    def fetch(self, remote: str) -> Path:
        # Not through the hub's cache, which would keep a second copy of 16 GB; always anew, because
        # whatever lies in the staging folder is a manifest of another day or a file that failed
        # verification.
        arrived = huggingface_hub.hf_hub_download(
            repo_id=self.repo_id,
            repo_type="dataset",
            filename=str(PurePosixPath(self.remote_root, remote)),
            local_dir=self.staging,
            force_download=True,
        )
        return Path(arrived)


def manifest_entry(manifest: dict, name: str, vocab_size: int, repo_id: str) -> tuple[dict, str]:
    """(shard statistics, remote path of the tokenizer) of a dataset that the manifest must name."""
    datasets = {dataset["name"]: dataset for dataset in manifest.get("datasets", [])}
    if name not in datasets:
        raise ValueError(
            f"the manifest of {repo_id} has no dataset {name}; it has {sorted(datasets)}"
        )
    wanted = datasets[name]["tokenizer_name"]
    for tokenizer in manifest.get("tokenizers", []):
        if (tokenizer["name"], tokenizer["vocab_size"]) == (wanted, vocab_size):
            return datasets[name]["stats"], tokenizer["model_path"]
    raise ValueError(f"the manifest of {repo_id} has no tokenizer {wanted} of {vocab_size} pieces")


def claim_folder(folder: Path, source: dict) -> None:
    """Note where the shards come from; shards of two repositories have the same names and must not
    mix."""
    note = folder / "source.json"
    if note.exists() and (found := json.loads(note.read_text(encoding="utf-8"))) != source:
        raise ValueError(f"{folder} holds shards of {found}; delete it to download from {source}")
    (folder / "stats.json").unlink(missing_ok=True)
    write_json(note, source)


def fetch_shard(hub: Hub, remote: str, path: Path) -> int:
    """Number of tokens of the shard, downloaded unless a good one is in place."""
    if path.exists():
        try:
            return verify_shard(path)
        except ValueError as error:
            tqdm.write(f"downloading again: {error}")
    arrived = hub.fetch(remote)
    try:
        count = verify_shard(arrived)
    except ValueError as error:
        raise ValueError(f"{hub.repo_id} sent a bad {remote}: {error}") from error
    os.replace(arrived, path)
    return count


def fetch_tokenizer(hub: Hub, remote: str, path: Path, vocab_size: int) -> None:
    arrived = hub.fetch(remote)
    found = load_tokenizer(arrived).vocab_size()
    if found != vocab_size:
        raise ValueError(
            f"{hub.repo_id} sent a bad {remote}: found {found} pieces; expected {vocab_size}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(arrived, path)


def download(variant: str, train_shards: int, root: Path) -> dict:
    """All validation shards, the first `train_shards` training shards and the tokenizer of an
    official variant.

    Raises: ValueError if the repository does not have them, sends bad ones, or its splits share too
    many documents (see `measure_overlap`).
    """
    name, vocab_size = f"fineweb10B_{variant}", int(variant.removeprefix("sp"))
    folder = root / "datasets" / name
    model = root / "tokenizers" / f"fineweb_{vocab_size}_bpe.model"
    default_repo = OFFICIAL_REPO if variant == "sp1024" else COMMUNITY_REPO
    source = {
        "repo_id": os.environ.get("MATCHED_FINEWEB_REPO_ID", default_repo),
        "remote_root": os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets"),
    }
    hub = Hub(**source, staging=folder / ".download")

    # the manifest on disk may be of another repository or another day: it is replaced, never read
    manifest = json.loads(hub.fetch("manifest.json").read_text(encoding="utf-8"))
    expected, model_path = manifest_entry(manifest, name, vocab_size, hub.repo_id)
    if not 0 < train_shards <= expected["files_train"]:
        raise ValueError(
            f"--train-shards {train_shards}: "
            f"{hub.repo_id} has {expected['files_train']} for {variant}"
        )
    claim_folder(folder, source)
    write_json(root / "manifest.json", manifest | {"downloaded_from": source})
    print(f"{root / 'manifest.json'} is now the one of {hub.repo_id}")

    fetch_tokenizer(hub, model_path, model, vocab_size)
    wanted = {"val": expected["files_val"], "train": train_shards}
    stats = {"name": name, "source": source, "tokenizer": str(model), "vocab_size": vocab_size}
    stats |= {split: {"tokens": 0, "shards": count} for split, count in wanted.items()}
    files = [
        (split, f"fineweb_{split}_{index:06d}.bin")
        for split in wanted
        for index in range(wanted[split])
    ]
    for split, file in tqdm(files, desc=name, unit=" files"):
        stats[split]["tokens"] += fetch_shard(hub, f"datasets/{name}/{file}", folder / file)
    if stats["val"]["tokens"] != expected["tokens_val"]:
        raise ValueError(
            f"{folder}: found {stats['val']['tokens']:,} validation tokens; "
            f"expected {expected['tokens_val']:,}, says the manifest of {hub.repo_id}"
        )
    shutil.rmtree(hub.staging)
    stats["overlap"] = measure_overlap(
        folder, "delete the folder and set MATCHED_FINEWEB_REPO_ID to a repository without them"
    )
    write_json(folder / "stats.json", stats)
    return stats


# -----------------------------------------------------------------------------
# command line


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--variant", metavar="sp<V>", help="download official shards: sp1024, sp4096, sp8192"
    )
    source.add_argument(
        "--docs",
        type=Path,
        metavar="FILE",
        help="own text: .jsonl or .jsonl.zst with the key `text`",
    )
    source.add_argument("--demo", action="store_true", help="offline demo corpus")
    parser.add_argument("--output-root", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument(
        "--train-shards", type=int, default=80, help="with --variant (default: %(default)s)"
    )
    parser.add_argument(
        "--shard-tokens", type=int, default=100_000_000, help="with --docs or --demo"
    )
    parser.add_argument(
        "--caseops", action="store_true", help="with --docs or --demo: case as operator characters"
    )
    own = parser.add_argument_group("with --docs")
    own.add_argument("--name", help="folder under datasets/")
    own.add_argument("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model to use")
    own.add_argument("--vocab-size", type=int, help="or: train one on the training documents")
    own.add_argument("--val-docs", type=Path, metavar="FILE", help="validation documents")
    own.add_argument("--num-val-docs", type=int, help="or: hold out the first N of --docs")
    own.add_argument("--max-train-docs", type=int)
    own.add_argument("--max-val-docs", type=int)
    args = parser.parse_args(argv)
    if args.variant and not re.fullmatch(r"sp[1-9]\d*", args.variant):
        parser.error(f"--variant {args.variant}: expected sp and a vocabulary size, as in sp1024")
    if args.variant and args.caseops:
        parser.error("--caseops needs --docs or --demo: --variant downloads shards as they are")
    if args.docs and not re.fullmatch(r"\w[\w.-]*", args.name or ""):
        parser.error("--docs needs a --name of letters, digits, dots and dashes")
    if args.docs and (args.tokenizer is None) == (args.vocab_size is None):
        parser.error("--docs needs either --tokenizer or --vocab-size")
    if args.docs and (args.val_docs is None) == (args.num_val_docs is None):
        parser.error("--docs needs either --val-docs or --num-val-docs")
    return args


def build_docs(args: argparse.Namespace) -> dict:
    held_out = args.num_val_docs or 0
    train_stop = None if args.max_train_docs is None else held_out + args.max_train_docs
    val_stop = min(
        (n for n in (args.num_val_docs, args.max_val_docs) if n is not None), default=None
    )
    train = DocumentRange(args.docs, held_out, train_stop)
    val = DocumentRange(args.val_docs or args.docs, 0, val_stop)
    prefix = args.output_root / "tokenizers" / f"{args.name}_{args.vocab_size}_bpe"
    tokenizer = args.tokenizer or train_tokenizer(train, args.vocab_size, prefix, args.caseops)
    return build_dataset(
        args.output_root, args.name, tokenizer, train, val, args.shard_tokens, args.caseops
    )


def print_stats(stats: dict) -> None:
    print(f"{stats['name']}: {stats['tokenizer']}, {stats['vocab_size']} pieces")
    for split in ("train", "val"):
        print(f"{split}: " + ", ".join(f"{value:,} {key}" for key, value in stats[split].items()))
    found, total = stats["overlap"].values()
    print(f"overlap: {found:,} of {total:,} validation documents stand in the training shards")
    skipped = f"not computed (shards were downloaded, or text over {COMPRESSOR_LIMIT:,} bytes)"
    print(f"val text, bits per byte of compressors: {stats.get('val_compressor_bpb', skipped)}")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.variant:
        stats = download(args.variant, args.train_shards, args.output_root)
    elif args.docs:
        stats = build_docs(args)
    else:
        stats = build_demo(args.output_root, args.shard_tokens, args.caseops)
    print_stats(stats)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"prepare.py: {error}")
