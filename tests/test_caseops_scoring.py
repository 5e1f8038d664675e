"""Systems that read the shards of data/prepare.py --caseops score the bytes of the original."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import parts
import pytest
from conftest import TINY
from corpus import DOCUMENTS, prose, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
import prepare  # noqa: E402

OPERATORS = "\ue001\ue002\ue003\ue004"
TRAIN = [f"Document {i}: McDonald's USA, {i} iPhones. {prose()[i]}" for i in range(60)]
VAL = [f"NASA {text[::-1]} \U0001f600 É ＡＢＣ" for text in TRAIN[:20]]
VAL += [f"A{OPERATORS[0]}b {OPERATORS[3]}", *DOCUMENTS.values()]
SIDECARS = "fineweb_val_bytes_*.bin"


def build(root: Path, name: str, *options: str) -> tuple[Path, Path]:
    """The dataset of TRAIN and VAL, with several shards of each; its folder and its tokenizer."""
    for split, texts in ("train", TRAIN), ("val", VAL):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / f"{split}.jsonl").write_text(lines)
    files = ["--docs", str(root / "train.jsonl"), "--val-docs", str(root / "val.jsonl")]
    size = ["--vocab-size", "500", "--shard-tokens", "3000"]
    prepare.main([*files, *size, "--name", name, "--output-root", str(root), *options])
    (tokenizer,) = (root / "tokenizers").glob(f"{name}_500_bpe*.model")
    return root / "datasets" / name, tokenizer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return build(tmp_path_factory.mktemp("dataset"), "cased", "--caseops")


@pytest.fixture
def cased(dataset, tmp_path, tiny):
    """Hyperparameters of a tiny run on a copy of it."""
    folder = shutil.copytree(dataset[0], tmp_path / "cased")
    return tiny(data_path=str(folder), tokenizer_path=str(dataset[1]), vocab_size=500)


def read(folder, pattern: str) -> np.ndarray:
    paths = sorted(Path(folder).glob(pattern))
    assert len(paths) > 1
    return np.concatenate([np.fromfile(path, dtype="<u2", offset=1024) for path in paths])


def original_texts(hp) -> list[bytes]:
    """Of the documents, from their description: what SentencePiece normalises, decoded once."""
    sp = prepare.load_tokenizer(Path(hp.tokenizer_path), caseops=True)
    return [prepare.normalised(sp, text).encode() for text in VAL if text.strip()]


def checked(hp) -> dict:
    """The check of the bytes, as a run makes it."""
    audit, validation = train_gpt.Audit(), parts.CaseOpsValidation(hp)
    train_gpt.check_bytes(audit, hp, validation)
    return audit.checks["bytes"]


def test_tokens_are_read_and_not_their_bytes(cased):
    for split in ("train", "val"):
        stream = train_gpt.TokenStream(cased.data_path, split, 500)
        paths = sorted(Path(cased.data_path).glob(f"fineweb_{split}_[0-9]*.bin"))
        assert stream.paths == paths
        tokens = read(cased.data_path, f"fineweb_{split}_[0-9]*.bin")
        assert stream.read(0, len(stream)).tolist() == tokens.tolist()
    validation = parts.CaseOpsValidation(cased)
    assert validation.tokens.tolist() == tokens.tolist()
    assert validation.starts.tolist() == np.flatnonzero(tokens == train_gpt.BOS_ID).tolist()
    counts = train_gpt.load_data_shard(Path(cased.data_path) / "fineweb_val_bytes_000000.bin")
    sidecar = read(cased.data_path, SIDECARS)
    assert counts.tolist() == sidecar[: len(counts)].tolist()


def test_bytes_are_those_of_the_original(cased):
    sizes = [*map(len, original_texts(cased))]
    validation, check = parts.CaseOpsValidation(cased), checked(cased)
    assert validation.text_bytes.tolist() == sizes and validation.bytes == sum(sizes)
    assert validation.target_bytes.tolist() == read(cased.data_path, SIDECARS)[1:].tolist()
    assert check["passed"] and check["decoded"] == check["table"] == sum(sizes)


def test_a_run_is_scored_by_the_original_and_passes_its_audit(cased, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = dict(data_path=cased.data_path, tokenizer_path=cased.tokenizer_path, vocab_size=500)
    changes = paths | dict(run_id="run", scores="scores.npz", eval_stride=64)
    for name, value in (TINY | changes).items():
        monkeypatch.setenv(name.upper(), str(value))
    train_gpt.main(validation_class=parts.CaseOpsValidation)
    train_gpt.log.handlers.clear()
    line = Path("logs/run.txt").read_text().splitlines()[-1]
    figures, scores = json.loads(line.removeprefix("figures: ")), np.load("scores.npz")
    size = len(b"".join(original_texts(cased)))
    assert figures["bytes"] == scores["bytes"].sum() == size
    stats = json.loads((Path(cased.data_path) / "stats.json").read_text())
    assert stats["caseops"] is True and stats["val"]["bytes"] == size
    bpb = scores["nats"].sum() / math.log(2) / size
    assert figures["val_bpb"] == pytest.approx(bpb, rel=1e-12)


def test_a_byte_moved_to_another_document_fails_the_audit(cased):
    path = Path(cased.data_path) / "fineweb_val_bytes_000000.bin"
    entries = np.fromfile(path, dtype="<u2")
    entries[512 + np.flatnonzero(entries[512:])[0]] -= 1
    entries[-1] += 1
    path.write_bytes(entries.tobytes())
    check = checked(cased)
    assert not check["passed"] and check["table"] == check["decoded"]


def without_sidecar(folder):
    for path in folder.glob(SIDECARS):
        path.unlink()


def one_entry_less(folder):
    path = sorted(folder.glob(SIDECARS))[-1]
    entries = np.fromfile(path, dtype="<u2")
    count = len(entries) - 512 - 1
    entries[4:6] = count & 0xFFFF, count >> 16
    path.write_bytes(entries[:-1].tobytes())


@pytest.mark.parametrize(
    "change, message",
    [
        (without_sidecar, "0 files fineweb_val_bytes"),
        (one_entry_less, r"fineweb_val_bytes_000000.bin: \d+ entries, \d+ tokens"),
    ],
    ids=["no sidecar", "one entry less"],
)
def test_a_sidecar_that_does_not_fit_is_refused(cased, change, message):
    change(Path(cased.data_path))
    with pytest.raises(ValueError, match=message):
        parts.CaseOpsValidation(cased)


@pytest.fixture
def plain(tmp_path, tiny):
    """Hyperparameters for text that is not transformed."""
    folder, tokenizer = build(tmp_path, "plain")
    return tiny(data_path=str(folder), vocab_size=500, tokenizer_path=str(tokenizer))


def test_plain_text_is_counted_as_by_the_record(plain):
    with_cases, record = parts.CaseOpsValidation(plain), train_gpt.Validation(plain)
    assert with_cases.tokens.tolist() == record.tokens.tolist()
    assert with_cases.target_bytes.tolist() == record.target_bytes.tolist()
    assert with_cases.text_bytes.tolist() == record.text_bytes.tolist()


@pytest.mark.parametrize("validation", [parts.CaseOpsValidation, train_gpt.Validation])
def test_a_sidecar_beside_plain_text_is_refused(plain, validation):
    tokens = read(plain.data_path, "fineweb_val_[0-9]*.bin")
    sidecar = Path(plain.data_path) / "fineweb_val_bytes_000000.bin"
    write_shard(sidecar, np.zeros(len(tokens)))
    with pytest.raises(ValueError, match=f"DATA_PATH={plain.data_path}: .*"):
        validation(plain)


def test_the_record_refuses_transformed_text(cased):
    """Its byte table would count the operators, three bytes each."""
    with pytest.raises(ValueError, match=f"DATA_PATH={cased.data_path}: CaseOps, only read by"):
        train_gpt.Validation(cased)
    without_sidecar(Path(cased.data_path))
    with pytest.raises(ValueError, match=f"DATA_PATH={cased.data_path}: CaseOps, only read by"):
        train_gpt.Validation(cased)


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=5)
ODD_TEXT = st.text(st.sampled_from(f"abyzABYZ{OPERATORS} \n\0'1éÉ\u0301机🙂\u2581@[`{{\ud83d"))


@given(st.lists(ANY_TEXT | ODD_TEXT).map("".join))
@settings(deadline=None)
def test_both_decoders_are_one(text):
    assert parts.decode_case(text) == prepare.decode_case(text)
    assert parts.decode_case(prepare.encode_case(text)) == text
