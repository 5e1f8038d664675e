"""What a run reads: shards, tokenizer, and what stats.json says of them. For verify.py, without
train_gpt.py or data/prepare.py.

    python tools/dataset.py DATA TOKENIZER    # where nothing describes the shards: is it theirs?

Checks get the verifier's job: data, training, text and stats are read; they leave in it seen, the
tokens and sha256 of each shard, and found, the validation documents that stand in the training
shards.
"""

import contextlib
import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import sentencepiece as spm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH
from rules import OFFICIAL_BYTES, OFFICIAL_DOCUMENTS  # noqa: E402  (the path comes first)

BOS, HEADER_BYTES, MAGIC, VERSION = 1, 1024, 20240520, 1
SAMPLE_TOKENS = 16_384
MAX_OVERLAP = 0.05  # of the validation documents; FineWeb repeats pages
# Documents that are other tokens when they are decoded and encoded again. Measured on 2,088 of
# English text and 498 of FineWeb: none with their own tokenizer (1,024, 4,096, 8,192 pieces and
# CaseOps); 99.8 % and more with another one of the same size, even if half of what it was trained
# on is the same.
MAX_REENCODED = 0.05


# --------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def using(path: Path, kind: str) -> Iterator[None]:
    """Raises: FileNotFoundError or ValueError, a line that names the file, for what goes wrong."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, expected {kind}") from None
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path}: cannot be read: {reason}, expected {kind}") from None
    except Exception as error:  # each reader has its own
        raise ValueError(f"{path}: not {kind}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def read_file(path: Path, kind: str) -> bytes:
    with using(path, kind):
        return path.read_bytes()


def ids_in(path: Path, raw: bytes) -> np.ndarray:
    """Of a shard's bytes, its token ids, uint16 [n]."""
    with using(path, "a shard"):
        magic, version, n = np.frombuffer(raw[:12].ljust(12, b"\0"), "<i4").tolist()
        if (magic, version) != (MAGIC, VERSION) or n < 1 or len(raw) != HEADER_BYTES + 2 * n:
            raise ValueError(f"magic {magic}, version {version}, {n} tokens, {len(raw)} bytes")
        return np.frombuffer(raw, "<u2", offset=HEADER_BYTES)


def read_shard(path: Path) -> np.ndarray:
    """Token ids, uint16 [n]."""
    return ids_in(path, read_file(path, "a shard"))


def beyond(path: Path, ids: np.ndarray, V: int) -> str:
    """The first id that is no piece of a tokenizer of V, in words, or "" if there is none."""
    if ids.max() < V:
        return ""
    at = int(np.argmax(ids >= V))
    return f"{path}: token {ids[at]} at {at} of {len(ids)}, the tokenizer has {V} pieces"


def write_shard(path: Path, ids: np.ndarray) -> None:
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, VERSION, len(ids)
    path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())


def read_json(path: Path) -> dict:
    with using(path, "a JSON object"):
        content = json.loads(path.read_text("utf-8"))
        return {**content}


def read_stats(path: Path) -> dict:
    stats = read_json(path)
    with using(path, "what data/prepare.py writes"):
        for name, told in {**stats.get("files", {})}.items():
            if not isinstance(told, dict):
                raise ValueError(f"files: {name} is {told!r}")
    return stats


def load_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    with using(path, "a SentencePiece model for these shards"):
        sp = spm.SentencePieceProcessor(model_proto=path.read_bytes())
        if not sp.vocab_size():
            raise ValueError("it has no pieces")
        if sp.bos_id() != BOS:
            raise ValueError(f"BOS is {sp.bos_id()}, expected {BOS}")
        if sp.piece_to_id("\u2581") == sp.unk_id():
            raise ValueError("no piece for U+2581 alone: a space would be three bytes")
        return sp


class Text:
    """The validation split and its tokenizer.

    Raises: FileNotFoundError, or ValueError naming the file that does not fit.
    """

    def __init__(self, data: Path, tokenizer: Path):
        self.shards = sorted(data.glob("fineweb_val_[0-9]*.bin"))
        self.sidecar = sorted(data.glob("fineweb_val_bytes_*.bin"))  # CaseOps: original bytes
        if not data.is_dir():
            raise FileNotFoundError(f"{data}: no such folder, expected one of shards")
        if not self.shards:
            raise FileNotFoundError(f"{data}: no file fineweb_val_*.bin in it")
        self.sp, arrays = load_tokenizer(tokenizer), [read_shard(path) for path in self.shards]
        for path, ids in zip(self.shards, arrays, strict=True):
            if wrong := beyond(path, ids, self.sp.vocab_size()):
                raise ValueError(f"{wrong} ({tokenizer})")
        self.ids = np.concatenate(arrays)  # uint16 [N]
        if len(self.ids) < 2 or self.ids[0] != BOS:
            raise ValueError(f"{self.shards[0]}: expected BOS={BOS}, and a token or more behind it")
        self.starts = np.flatnonzero(self.ids == BOS)  # of documents
        self.end = self.first_documents(SAMPLE_TOKENS)  # of the sample

    def first_documents(self, most: int) -> int:
        """Tokens of the first whole documents of at most so many, or of the first document."""
        ends = [*self.starts[1:].tolist(), len(self.ids)]
        return max([end for end in ends if end <= most], default=ends[0])

    def documents(self, end: int) -> Iterator[tuple[list[list[int]], list[str]]]:
        """Tokens and texts of those before token `end`, a thousand at once."""
        starts = self.starts[self.starts < end]
        for first in range(0, len(starts), 1000):
            borders = [*starts[first : first + 1001].tolist(), end][:1001]
            documents = [self.ids[a:b].tolist() for a, b in pairwise(borders)]
            yield documents, self.sp.decode(documents)

    def decoded(self, end: int) -> np.ndarray:
        """UTF-8 bytes of the text of each document before token `end`, int [documents]."""
        sizes = []
        for _, texts in self.documents(end):
            if self.sidecar:  # an operator is no byte of the original, U+E004 quotes what follows
                texts = [re.sub("\ue004(.?)|[\ue001-\ue003]", r"\1", text) for text in texts]
            sizes += [len(text.encode()) for text in texts]
        return np.array(sizes)

    def half_characters(self, document: list[int]) -> list[int]:
        """The places of byte pieces that are no whole character together with their neighbours."""
        places, run = [], []
        for place, token in enumerate([*document, BOS]):
            if self.sp.is_byte(token):
                run.append(int(self.sp.id_to_piece(token)[3:5], 16))  # <0xE6>
                continue
            at = place - len(run)
            for character in bytes(run).decode("utf-8", "surrogateescape"):
                is_half = "\udc80" <= character <= "\udcff"
                places += [at] * is_half
                at += 1 if is_half else len(character.encode())
            run = []
        return places

    @cached_property
    def reencoded(self) -> list[int]:
        """Numbers of the documents that are other tokens when their text is encoded again; from 0.
        The text may be cut: the last word of the last document does not count."""
        different, number = [], 0
        for documents, texts in self.documents(len(self.ids)):
            for (_, *ids), again in zip(documents, self.sp.encode(texts), strict=True):
                number += 1
                if number == len(self.starts):
                    spaces = [i for i, x in enumerate(ids) if self.sp.id_to_piece(x)[0] == "\u2581"]
                    ids, again = (x[: max(spaces, default=0)] for x in (ids, again))
                different += [number - 1] * (ids != again)
        return different

    def by_another_tokenizer(self) -> str:
        """In words, or "" if the shards are of this one."""
        if len(self.reencoded) <= MAX_REENCODED * len(self.starts):
            return ""
        found = f"{len(self.reencoded)} of {len(self.starts)} documents are other tokens"
        how = "when decoded and encoded again: made by another tokenizer"
        return f"{found} {how}; {self.told(self.reencoded[0])}"

    def told(self, number: int) -> str:
        """A document in words, by its number from 0; ASCII, for any terminal."""
        start, end = [*self.starts.tolist(), len(self.ids)][number : number + 2]
        document = self.ids[start:end].tolist()
        text = f"document {number + 1} of {len(self.starts)}, at token {start}"
        text += f", {ascii(self.sp.decode(document)[:40])}"
        if halves := self.half_characters(document):
            places = ", ".join(str(start + place) for place in halves[:4])
            text += f", half a character of byte pieces at token {places}"
        return text

    @cached_property
    def sizes(self) -> np.ndarray:
        return self.decoded(len(self.ids))

    @cached_property
    def official(self) -> bool:
        return len(self.starts) == OFFICIAL_DOCUMENTS and int(self.sizes.sum()) in OFFICIAL_BYTES


# --------------------------------------------------------------------------------------------------
# Checks

SHARDS = {  # what a name starts with, by split: numbers follow it
    "train": "fineweb_train_",
    "val": "fineweb_val_",
    "bytes": "fineweb_val_bytes_",
}


def out_of_order(paths: list[Path], start: str) -> list[str]:
    expected = [f"{start}{i:06d}.bin" for i in range(len(paths))]
    pairs = zip(paths, expected, strict=True)
    return [f"{path}: found where {name} was expected" for path, name in pairs if path.name != name]


def read_training(job) -> Iterator[str]:
    """Reads each training shard once: 16 GB may be there. Leaves `seen` of each, and `found`, how
    many validation documents stand in them. Yields what is wrong with them, in words."""
    text, V = job.text, job.text.sp.vocab_size()
    known = Counter(ids.tobytes() for ids in np.split(text.ids, text.starts[1:]))
    job.found = 0
    for path, following in pairwise([*job.training, None]):
        try:
            raw = read_file(path, "a shard")
            ids = ids_in(path, raw)
            job.seen[path.name] = len(ids), sha256(raw)
            whole = whole_documents(ids, following)
        except (OSError, ValueError) as error:
            yield str(error)
            continue
        job.found += sum(known.pop(document, 0) for document in whole)
        if path is job.training[0] and ids[0] != BOS:
            yield f"{path}: starts with token {ids[0]}, expected BOS={BOS}"
        yield from filter(None, [beyond(path, ids, V)])


def whole_documents(ids: np.ndarray, following: Path | None) -> Iterator[bytes]:
    """Each document of a training shard that no end of the shard cuts."""
    after = [BOS]
    if following:
        with using(following, "a shard"):
            after = np.fromfile(following, "<u2", 1, offset=HEADER_BYTES)
    borders = [*np.flatnonzero(ids == BOS).tolist(), *[len(ids)] * (BOS in after)]
    return (ids[start:end].tobytes() for start, end in pairwise(borders))


def undescribed(job) -> Iterator[str]:
    """In what shards and tokenizer are not those that stats.json describes, in words."""
    told, name = job.stats["files"], job.data / "stats.json"
    there = {path.name for path in job.data.glob("fineweb_*.bin")}
    missing = told.keys() - there
    if not job.training:  # may be left out
        missing = {file for file in missing if not file.startswith(SHARDS["train"])}
    yield from (f"{job.data}: no file {file}, which {name} describes" for file in sorted(missing))
    yield from (f"{job.data / file}: not in {name}" for file in sorted(there - told.keys()))
    for file in sorted(told.keys() & job.seen.keys()):
        expected = told[file].get("tokens"), told[file].get("sha256")
        if job.seen[file] != expected:
            found, said = (
                f"{n} tokens, sha256 {digest}" for n, digest in (job.seen[file], expected)
            )
            yield f"{job.data / file}: {found}; {name} says {said}"
    found, said = sha256(read_file(job.tokenizer, "a tokenizer")), job.stats.get("tokenizer_sha256")
    if found != said:
        yield f"{job.tokenizer}: sha256 {found}; {name} says {said}: another tokenizer"


def wrong_data(job) -> Iterator[str]:
    """All that is wrong with shards and tokenizer, in words."""
    text, sidecar = job.text, job.text.sidecar
    kinds = dict(train=job.training, val=text.shards, bytes=sidecar)
    for kind, paths in kinds.items():
        yield from out_of_order(paths, SHARDS[kind])
    for path in text.shards + sidecar:
        raw = read_file(path, "a shard")
        job.seen[path.name] = len(ids_in(path, raw)), sha256(raw)
    if sidecar and len(text.ids) != (n := sum(job.seen[path.name][0] for path in sidecar)):
        yield f"{sidecar[0]} and further: bytes of {n} tokens, there are {len(text.ids)}"
    if wrong := text.by_another_tokenizer():
        yield wrong
    size = int(text.sizes.sum())
    if "fineweb" in str(job.data) and len(text.starts) == OFFICIAL_DOCUMENTS and not text.official:
        found = f"{OFFICIAL_DOCUMENTS} documents, {size} bytes"
        yield f"{found}, not {OFFICIAL_BYTES.start} to {OFFICIAL_BYTES.stop - 1}"
    yield from read_training(job)
    if "files" in job.stats:
        yield from undescribed(job)


def check_data(job) -> tuple[bool, str]:
    """Shards and tokenizer are what stats.json says. Whether it says anything or not, they belong
    together, and the training shards can be read to their end."""
    start = time.perf_counter()
    wrong = list(wrong_data(job))
    read = sum(HEADER_BYTES + 2 * n for n, _ in job.seen.values()) / 1e9
    text = f"{len(job.seen)} shards, {read:.3f} GB, read in {time.perf_counter() - start:.0f} s"
    described = "as stats.json describes them" if "files" in job.stats else "nothing describes them"
    n = f"{len(job.text.reencoded)} of {len(job.text.starts)} documents are other tokens"
    text += f"; {described}; {n} when decoded and encoded again"
    return not wrong, "; ".join(wrong) or text


def check_overlap(job) -> tuple[bool, str]:
    """Validation documents that stand, token by token, in the training shards, as `data` counted
    them."""
    found, total, told = job.found, len(job.text.starts), job.stats.get("overlap")
    own = {"validation_documents_in_training": found, "validation_documents": total}
    figures = f"{found} of {total} documents in {len(job.training)} shards, stats.json: {told}"
    return found <= MAX_OVERLAP * total and told in (None, own), figures


def another_tokenizer(data: Path, tokenizer: Path) -> str:
    """Where nothing describes the shards: a line that says that they are of another tokenizer, or
    "". Raises: OSError, ValueError naming the file."""
    stats = data / "stats.json"
    if stats.is_file() and "files" in read_stats(stats):
        return ""  # there a run compares sha256
    wrong = Text(data, tokenizer).by_another_tokenizer()
    return wrong and f"TOKENIZER_PATH={tokenizer}: {data}: {wrong}"


def main(argv: list[str]) -> str:
    try:
        wrong = another_tokenizer(*map(Path, argv))
    except (OSError, ValueError) as error:
        wrong = str(error)
    return wrong and f"run.sh: {wrong}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) or 0)
