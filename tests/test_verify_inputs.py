"""tools/verify.py: what a user can give it that is not what it should be. Each is one line that
names the file and says what was found; nothing is run on data that do not belong together."""

import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from corpus import (
    BOS,
    NORMAL,
    described,
    document_ids,
    edit_pieces,
    load,
    prose,
    sha256,
    tokenizer_model,
    write_shard,
)
from test_verify import (  # noqa: F401  (fixtures)
    at_rest,
    check,
    files_of,
    runs,
    script_of,
    verify,
)

# the caller's fixtures have the names of their parameters
# ruff: noqa: F811


@pytest.fixture
def folder(runs, tmp_path) -> Path:
    """A copy of a finished run, to change something in."""
    return Path(shutil.copytree(runs(), tmp_path / "copy of a run"))


# --------------------------------------------------------------------------------------------------
# Data


def test_data_are_what_stats_json_describes(folder, check, at_rest):
    result = check(folder, data=described(folder / "data"))
    assert result.failed == {"run"} and "data" in result.passed
    line = re.search(r"^verify: data passed (.*)$", result.text, re.M)[1]
    read = sum(path.stat().st_size for path in (folder / "data").glob("*.bin")) / 1e9
    assert line.startswith(f"3 shards, {read:.3f} GB, read in ")
    assert line.endswith(
        "as stats.json describes them; 0 of 4 documents are other tokens when decoded and "
        "encoded again"
    )


def another_val(data: Path):
    """As many tokens, each within the tokenizer."""
    ids = verify.read_shard(data / "fineweb_val_000000.bin").copy()
    ids[-1] = ids[-2]
    write_shard(data / "fineweb_val_000000.bin", ids)


def another_train(data: Path):
    ids = verify.read_shard(data / "fineweb_train_000001.bin").copy()
    ids[-1] = ids[-2]
    write_shard(data / "fineweb_train_000001.bin", ids)


def shorter_train(data: Path):
    write_shard(
        data / "fineweb_train_000001.bin", verify.read_shard(data / "fineweb_train_000001.bin")[:-9]
    )


def one_missing(data: Path):
    (data / "fineweb_train_000001.bin").unlink()


def one_more(data: Path):
    shutil.copy(data / "fineweb_train_000000.bin", data / "fineweb_train_000002.bin")


def sidecar(data: Path):
    ids = verify.read_shard(data / "fineweb_val_000000.bin")
    write_shard(data / "fineweb_val_bytes_000000.bin", np.ones_like(ids))


def another_tokenizer(data: Path):
    (data / "tokenizer.model").write_bytes(
        tokenizer_model() + b"\x1a\x00"  # an empty trainer_spec: the same pieces
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (another_val, "fineweb_val_000000.bin: 1500 tokens, sha256 "),
        (another_train, "fineweb_train_000001.bin: 8000 tokens, sha256 "),
        (shorter_train, "fineweb_train_000001.bin: 7991 tokens, sha256 "),
        (one_missing, "no file fineweb_train_000001.bin, which "),
        (one_more, "fineweb_train_000002.bin: not in "),
        (sidecar, "fineweb_val_bytes_000000.bin: not in "),
        (another_tokenizer, "stats.json says .*: another tokenizer"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_stats_json_does_not_describe_is_refused(
    folder,
    check,
    at_rest,
    change,
    message,
):
    change(described(folder / "data"))
    result = check(folder)
    assert result.status == 1 and "data" in result.failed and "run" not in result.failed
    assert re.search(rf"^verify: data FAILED .*{message}", result.text, re.M), result.text
    assert "verify: the program is not run" in result.text


def test_training_shards_may_be_left_out(folder, check, at_rest):
    data = described(folder / "data")
    for path in data.glob("fineweb_train_*"):
        path.unlink()
    assert "data" in check(folder).passed


def cut_file(data: Path):
    path = data / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-1])


def empty_file(data: Path):
    (data / "fineweb_train_000000.bin").write_bytes(b"")


def no_tokens(data: Path):
    write_shard(data / "fineweb_train_000000.bin", [])


def bad_id_late(data: Path):
    ids = verify.read_shard(data / "fineweb_train_000001.bin").copy()
    ids[-2] = 60_000
    write_shard(data / "fineweb_train_000001.bin", ids)


def starts_late(data: Path):
    write_shard(data / "fineweb_train_000000.bin", [5, 6, BOS, 7])


def a_gap(data: Path):
    (data / "fineweb_train_000001.bin").rename(data / "fineweb_train_000002.bin")


def a_folder(data: Path):
    (data / "fineweb_train_000002.bin").mkdir()


def short_sidecar(data: Path):
    write_shard(data / "fineweb_val_bytes_000000.bin", [1, 2])


@pytest.mark.parametrize(
    "change, message",
    [
        (cut_file, r"fineweb_train_000001.bin: not a shard: magic 20240520, .* 17023 bytes"),
        (empty_file, "fineweb_train_000000.bin: not a shard: magic 0, .* 0 bytes"),
        (no_tokens, "fineweb_train_000000.bin: not a shard: .* 0 tokens"),
        (bad_id_late, "fineweb_train_000001.bin: token 60000 at 7998 of 8000, the tokenizer has"),
        (starts_late, "fineweb_train_000000.bin: starts with token 5, expected BOS=1"),
        (a_gap, "fineweb_train_000002.bin: found where fineweb_train_000001.bin was expected"),
        (a_folder, "fineweb_train_000002.bin: cannot be read: Is a directory, expected a shard"),
        (short_sidecar, "fineweb_val_bytes_000000.bin and further: bytes of 2 tokens, there are"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_is_wrong_without_a_description_is_refused(
    folder,
    check,
    at_rest,
    change,
    message,
):
    change(folder / "data")
    result = check(folder)
    assert result.status == 1 and "data" in result.failed and "run" not in result.failed
    assert re.search(rf"^verify: data FAILED .*{message}", result.text, re.M), result.text


def test_another_tokenizer_of_the_same_size_is_seen_without_a_description(
    folder,
    check,
    at_rest,
):
    """Of the same text, but its pieces are shorter."""
    other = tokenizer_model(max_sentencepiece_length=2)
    assert load(other).vocab_size() == load(tokenizer_model()).vocab_size()
    (folder / "other.model").write_bytes(other)
    result = check(folder, tokenizer=folder / "other.model")
    message = "4 of 4 documents are other tokens when decoded and encoded again: made by another"
    assert re.search(rf"^verify: data FAILED {message}", result.text, re.M), result.text
    assert "document 1 of 4, at token 0, '" in result.text


CHARACTERS = {"two bytes": "\u0416", "three": "\u6a5f", "four": "\U0001f680"}
CUTS = [(kind, n) for kind, x in CHARACTERS.items() for n in range(1, len(x.encode()))]


def text_of(folder: Path, ids: list[int]) -> verify.Text:
    folder.mkdir(exist_ok=True)
    write_shard(folder / "fineweb_val_000000.bin", ids)
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    return verify.Text(folder, folder / "tokenizer.model")


def counted(text: verify.Text) -> SimpleNamespace:
    """A score file that counts by the competition's rule: a byte piece is one byte."""
    sp, ids = text.sp, text.ids.tolist()[1:]
    texts = [sp.id_to_piece(i).replace("\u2581", " ") for i in ids]
    sizes = [1 if sp.is_byte(i) else len(x.encode()) for i, x in zip(ids, texts, strict=True)]
    return SimpleNamespace(bytes=np.where(np.array(ids) == BOS, 0, sizes))


@pytest.mark.parametrize("kind, kept", CUTS, ids=lambda x: str(x))
def test_a_text_that_is_cut_inside_a_character_is_named(tmp_path, kind, kept):
    """Also behind a whole character of byte pieces. Each half is three bytes when decoded, one by
    the table; a run refuses such a text, too."""
    sp, character = load(tokenizer_model()), CHARACTERS[kind]
    documents = "tin hat", f"and some {character}{character}"
    ids = document_ids(sp, *documents)
    missing = len(character.encode()) - kept
    text = text_of(tmp_path, ids[: len(ids) - missing])
    assert text.sizes.tolist() == [7, len(documents[1].encode()) - missing + 2 * kept]
    passed, figures = verify.check_bytes(SimpleNamespace(text=text), counted(text), len(text.ids))
    places = ", ".join(str(len(text.ids) - kept + i) for i in range(kept))
    assert not passed and f"half a character of byte pieces at token {places}" in figures
    assert not text.reencoded


def test_half_a_character_in_the_middle_of_the_text_is_named(tmp_path):
    sp = load(tokenizer_model())
    first = document_ids(sp, "tin hat", "and \u6a5f")
    text = text_of(tmp_path, [*first[:-1], *document_ids(sp, "the end")])
    passed, figures = verify.check_bytes(SimpleNamespace(text=text), counted(text), len(text.ids))
    start, at = len(document_ids(sp, "tin hat")), len(first) - 3
    assert not passed
    assert figures.endswith(
        f"1 of 3 documents differ; document 2 of 3, at token {start}, 'and \\ufffd\\ufffd', half a "
        f"character of byte pieces at token {at}, {at + 1}: counted 6, decoded 10"
    )


def test_a_text_may_be_cut_anywhere(tmp_path):
    """By tokens, as a proxy of the whole text is: what is encoded again is the same but for its
    last word. Any other document that is changed shows."""
    ids = document_ids(load(tokenizer_model()), *prose()[:3])
    for end in range(len(ids) - 60, len(ids)):
        assert not text_of(tmp_path / "cut", ids[:end]).reencoded, end
    second = ids.index(BOS, 1) + 1
    ids[second : second + 2] = reversed(ids[second : second + 2])
    assert text_of(tmp_path / "changed", ids).reencoded == [1]


@pytest.mark.parametrize(
    "ids, message",
    [
        ([BOS], "expected BOS=1, and a token or more behind it"),
        ([], "not a shard: magic 20240520, version 1, 0 tokens, 1024 bytes"),
        ([BOS, BOS, BOS], "its text has no bytes, nothing can be scored"),
        ([BOS, 0, 2], "its text has no bytes, nothing can be scored"),
        ([7, 8, 9], "expected BOS=1, and a token or more behind it"),
        ([BOS, 9, 500], "token 500 at 2 of 3, the tokenizer has 384 pieces"),
    ],
    ids="one none boundaries control no_bos foreign".split(),
)
def test_validation_text_that_cannot_be_scored_is_one_line(folder, check, ids, message):
    write_shard(folder / "data" / "fineweb_val_000000.bin", ids)
    status = check(folder).status
    assert status.startswith(f"verify: error: {folder / 'data' / 'fineweb_val_000000.bin'}: ")
    assert message in status and "\n" not in status


# --------------------------------------------------------------------------------------------------
# Files of another run


def figures_of(folder: Path, **changes) -> None:
    """Changes the figures in the log of the run."""
    path = folder / "logs" / "run.txt"
    head, line = path.read_text("utf-8").rstrip().rsplit("figures: ", 1)
    path.write_text(f"{head}figures: {json.dumps(json.loads(line) | changes)}\n", "utf-8")


def test_the_artifact_is_the_one_that_the_log_scored(folder, check, at_rest):
    own = sha256(folder / "model.ptz")
    figures_of(folder, artifact_sha256=own)
    result = check(folder, *files_of(folder))
    assert "size" in result.passed and f"; sha256 {own}" in result.text
    figures_of(folder, artifact_sha256="0" * 64)
    result = check(folder, *files_of(folder, artifact_sha256="1" * 64))
    assert "size" in result.failed
    for source, said in ("log", "0"), ("submission.json", "1"):
        assert f"{source}: artifact_sha256 '{said * 64}', not '{own}'" in result.text


def test_scores_of_another_artifact_are_compared_with_nothing(folder, check, at_rest):
    """A run that was killed between its artifact and its sample; and one of the same artifact."""
    for name in "model.ptz.sample.npz", "scores.npz":
        for artifact in sha256(folder / "model.ptz"), "0" * 64:
            scores = dict(np.load(folder / name)) | dict(artifact=artifact)
            np.savez(folder / name, **scores)
            result = check(folder, "--scores", folder / "scores.npz")
            kind = "sample" if "sample" in name else "claimed"
            assert (f"{kind}_positions" in result.failed) is (artifact == "0" * 64)
            text = f"{kind}_positions FAILED of another artifact, sha256 000"
            assert (text in result.text) is (artifact == "0" * 64)
            assert ("claimed_sample" in result.passed) is (artifact != "0" * 64)
        scores = dict(np.load(folder / name)) | dict(artifact=sha256(folder / "model.ptz"))
        np.savez(folder / name, **scores)


def test_scores_of_another_text_are_named(folder, check, at_rest):
    """Of another length; and of the same one, whose first document has other bytes."""
    scores = dict(np.load(folder / "scores.npz"))
    shorter = {name: x[:-9] if x.ndim else x for name, x in scores.items()}
    np.savez(folder / "scores.npz", **shorter)
    result = check(folder, "--scores", folder / "scores.npz")
    message = "claimed_positions FAILED 1490 positions, 1490 different, expected 1 to 1499 in order"
    assert message in result.text
    counted = verify.Text(folder / "data", folder / "data" / "tokenizer.model").sizes[0]
    np.savez(folder / "scores.npz", **scores | dict(bytes=scores["bytes"] + (np.arange(1499) == 5)))
    result = check(folder, "--scores", folder / "scores.npz")
    line = re.search(r"^verify: claimed_bytes FAILED (.*)$", result.text, re.M)[1]
    assert re.search(r"1 of 4 documents differ; document 1 of 4, at token 0, '", line)
    assert line.endswith(f": counted {counted + 1}, decoded {counted}")


def test_the_state_of_another_run_is_said_to_be_one(folder, check, at_rest):
    path = folder / "model.ptz.trained.pt"
    state = torch.load(path, weights_only=True)
    state["weights"]["blocks.0.mixer.A_log"].data += 0.1
    torch.save(state, path)
    result = check(folder)
    assert "gptq" in result.failed and "run" in result.failed
    assert "another blocks.0.mixer.A_log than was trained: they are of two runs" in result.text


@pytest.mark.parametrize("later", ["scored", "refused", "killed"])
def test_the_last_training_in_a_log_is_taken(folder, check, at_rest, later):
    path, rule = folder / "logs" / "run.txt", f"\n{'=' * 100}\n"
    text, figures = path.read_text("utf-8"), json.dumps(dict(checks={}, val_bpb=9.0))
    head = f"import math{rule}Running Python 3.11{rule}logs/run.txt world_size:1\n"
    last = {"scored": f"figures: {figures}\n", "refused": "", "killed": "step:1/9 train_lo"}
    path.write_text(f"{text}{rule}{head}{last[later]}", "utf-8")
    result = check(folder, "--log", path)
    assert "claims" in result.passed, result.text
    note = f"verify: {path}: takes run 1 of 2, the last that trained and came to its end\n"
    assert result.text.startswith(note)


@pytest.mark.parametrize("figures", [True, False])
@pytest.mark.parametrize("line", [True, False])
def test_a_resumed_run_says_so_in_its_figures(folder, check, at_rest, line, figures):
    figures_of(folder, resumed=figures)
    if line:
        path = folder / "logs" / "run.txt"
        head, last = path.read_text("utf-8").rsplit("figures: ", 1)
        path.write_text(f"{head}resumed: run.ckpt\nfigures: {last}", "utf-8")
    result = check(folder, "--log", folder / "logs" / "run.txt")
    assert ("claims" in result.failed) is (line and not figures)
    assert ("it was resumed, its figures do not say so" in result.text) is (line and not figures)


# --------------------------------------------------------------------------------------------------
# Files that cannot be used


def damaged(name: str):
    def change(folder: Path) -> list:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-40])
        return []

    return change


def made_of(name: str, content: str | bytes | None, *option: str):
    """A file with this content, None = a folder, and the option that names it."""

    def change(folder: Path) -> list:
        path = folder / name
        if path.is_file():
            path.unlink()
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [*option, path] if option else []

    return change


def scores_of(**changes):
    def change(folder: Path) -> list:
        np.savez(folder / "scores.npz", **(dict(np.load(folder / "scores.npz")) | changes))
        return ["--scores", folder / "scores.npz"]

    return change


def an_array(folder: Path) -> list:
    np.save(folder / "scores.npy", np.arange(3))
    return ["--scores", folder / "scores.npy"]


DATA, TOKENIZER = "data/stats.json", "data/tokenizer.model"
UNUSABLE = {
    "no artifact": (
        lambda folder: (folder / "model.ptz").unlink() or [],
        "model.ptz: no such file",
    ),
    "artifact a folder": (made_of("model.ptz", None), "model.ptz: cannot be read: Is a directory"),
    "tokenizer empty": (made_of(TOKENIZER, ""), "tokenizer.model: not a SentencePiece model"),
    "tokenizer cut": (damaged(TOKENIZER), "tokenizer.model: not a SentencePiece model"),
    "tokenizer a folder": (made_of(TOKENIZER, None), "cannot be read: Is a directory"),
    "stats of another kind": (made_of(DATA, "[1]"), "stats.json: not a JSON object"),
    "stats cut": (made_of(DATA, '{"files": {'), "stats.json: not a JSON object"),
    "stats of another form": (
        made_of(DATA, '{"files": {"fineweb_val_000000.bin": 3}}'),
        "stats.json: not what data/prepare.py writes: files: fineweb_val_000000.bin is 3",
    ),
    "files a list": (made_of(DATA, '{"files": [1]}'), "stats.json: not what data/prepare.py"),
    "sample cut": (damaged("model.ptz.sample.npz"), "model.ptz.sample.npz: not a score file"),
    "scores an array": (an_array, "scores.npy: not a score file"),
    "scores text": (
        scores_of(nats=np.array(["a"] * 1499)),
        "scores.npz: not a score file: nats are no numbers",
    ),
    "scores of two lengths": (
        scores_of(nats=np.ones(3)),
        "scores.npz: not a score file: nats, bytes, position are not rows of one length",
    ),
    "log empty": (made_of("l.txt", "", "--log"), "l.txt: empty, expected the log of a run"),
    "log binary": (made_of("l.txt", bytes(range(256)), "--log"), "l.txt: no log of a run"),
    "log a folder": (made_of("l.txt", None, "--log"), "l.txt: cannot be read: Is a directory"),
    "log of a refused run": (
        made_of("l.txt", f"x\n{'=' * 100}\nRunning Python 3\n{'=' * 100}\nerror\n", "--log"),
        "l.txt: not the log of a run that came to its end: no `figures:`",
    ),
    "submission a list": (made_of("s.json", "[]", "--submission"), "s.json: not a JSON object"),
    "submission deep": (
        made_of("s.json", "[" * 100_000, "--submission"),
        "s.json: not a JSON object",
    ),
    "submission of another kind": (
        made_of("s.json", '{"val_bpb": "1.06"}', "--submission"),
        "s.json: not a submission: val_bpb is '1.06'",
    ),
    "own_text a list": (
        made_of("s.json", '{"own_text": [1]}', "--submission"),
        "s.json: not a submission",
    ),
    "script with an error": (
        made_of("s.py", "x = (", "--train-script"),
        "s.py: not a Python script: '(' was never closed (s.py, line 1)",
    ),
    "script no text": (
        made_of("s.py", b"\xff\xfe\0", "--train-script"),
        "s.py: not a Python script",
    ),
    "script a folder": (made_of("s.py", None, "--train-script"), "s.py: cannot be read: Is a dir"),
}


@pytest.mark.parametrize("change, message", UNUSABLE.values(), ids=UNUSABLE)
def test_a_file_that_cannot_be_used_is_one_line(folder, check, change, message):
    options = change(folder)
    before = {path for path in folder.rglob("*") if path.is_file()}
    status = check(folder, *options).status
    assert status.startswith("verify: error: ") and message in status and "\n" not in status
    assert {path for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "data, message",
    [("nowhere", "nowhere: no such folder"), ("logs", "logs: no file fineweb_val_*.bin in it")],
)
def test_a_folder_without_shards_is_one_line(folder, check, data, message):
    tokenizer = folder / "data" / "tokenizer.model"
    status = check(folder, data=folder / data, tokenizer=tokenizer).status
    assert status.startswith("verify: error: ") and message in status and "\n" not in status


def test_files_that_may_not_be_read_are_one_line(folder, check):
    """As nobody where the tests run as root: then for all files."""
    os.chmod(folder / "model.ptz", 0)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)
        status = check(folder).status
    finally:
        os.seteuid(user)
    assert status.startswith("verify: error: ") and "Permission denied" in status
    assert "\n" not in status


def test_a_tokenizer_without_a_piece_for_a_space_is_refused(folder, check):
    model = tokenizer_model()
    space = load(model).piece_to_id("\u2581")
    path = folder / "data" / "tokenizer.model"
    path.write_bytes(edit_pieces(model, {space: ("other", NORMAL)}))
    assert "no piece for U+2581 alone" in check(folder).status


def test_the_verifier_finds_by_the_log_what_the_run_had(tmp_path):
    log, text = tmp_path / "run.txt", (ROOT / "logs" / "demo.txt").read_text("utf-8")
    log.write_text(text)
    job = verify.parse(["--log", str(log)])
    verify.fill_in(job)
    names = ("final_model.int6.ptz", "data/datasets/demo", "data/tokenizers/demo_1024_bpe.model")
    assert (job.artifact, job.data, job.tokenizer) == tuple(map(Path, names))
    assert job.script == ROOT / "train_gpt.py"
    log.write_text(text.replace("\n  system: record\n", "\n  system: crawler\n"))
    job = verify.parse(["own.ptz", "--log", str(log)])
    verify.fill_in(job)
    assert (job.artifact, job.data) == (Path("own.ptz"), Path(names[1]))
    assert job.script == ROOT / "systems" / "crawler.py"


def test_the_verifier_needs_files_or_a_log(capsys):
    with pytest.raises(SystemExit):
        verify.parse(["own.ptz", "--data", "data"])
    assert "expected an artifact, --data and --tokenizer, or the --log" in capsys.readouterr().err
    assert verify.main(["--log", "nosuch.txt"]) == (
        "verify: error: nosuch.txt: no such file, expected the log of a run"
    )


@pytest.mark.parametrize("option", ["--nproc", "--normalisation-tokens"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_number_that_is_none_is_refused(option, value, capsys):
    with pytest.raises(SystemExit) as error:
        verify.main(["a.ptz", "--data", "d", "--tokenizer", "t", option, value])
    assert error.value.code == 2
    assert f"argument {option}: invalid positive value: '{value}'" in capsys.readouterr().err


def test_a_script_that_is_not_the_program_fails_the_run(folder, check, monkeypatch):
    monkeypatch.setattr(verify, "launch", own_launch)
    for source, message in (
        ("import no_such_module", "exit status 1, no scores: ModuleNotFoundError: No module named"),
        ("print(1)", "exit status 0, no scores: and no error"),
    ):
        (folder / "s.py").write_text(source)
        result = check(folder, script=folder / "s.py")
        assert result.failed == {"run"}
        assert re.search(rf"^verify: run FAILED RuntimeError: {message}", result.text, re.M)


own_launch = verify.launch


def test_what_is_laid_out_for_the_program_is_described(folder, tmp_path):
    """Rewritten text is no language: the program takes what its description says."""
    job = SimpleNamespace(
        text=verify.Text(folder / "data", folder / "data" / "tokenizer.model"),
        code={"train_gpt.py": script_of(folder)},
        artifact=folder / "model.ptz",
        tokenizer=folder / "data" / "tokenizer.model",
    )
    for name, ids in ("whole", None), ("rewritten", np.array([BOS, 9, 300])):
        (tmp_path / name).mkdir()
        verify.fill(job, tmp_path / name, ids)
        stats = json.loads((tmp_path / name / "data" / "stats.json").read_text())
        shard = tmp_path / name / "data" / "fineweb_val_000000.bin"
        own = dict(tokens=1500 if ids is None else 3, sha256=sha256(shard))
        assert stats["files"] == {"fineweb_val_000000.bin": own}
        assert stats["tokenizer_sha256"] == sha256(job.tokenizer)


# --------------------------------------------------------------------------------------------------
# Signals

ENDLESS = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.{how})
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
path = pathlib.Path({pids!r})
path.with_suffix(".tmp").write_text(f"{{child.pid}}")
path.with_suffix(".tmp").rename(path)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "number, how",
    [(signal.SIGTERM, "SIG_DFL"), (signal.SIGINT, "SIG_DFL"), (signal.SIGHUP, "SIG_IGN")],
)
def test_a_signal_ends_what_was_started_and_removes_folders(
    folder, check, monkeypatch, tmp_path, capsys, number, how
):
    """Also a program that does not listen to SIGTERM, and what it had started itself."""
    pids, temporary = tmp_path / "pids", tmp_path / "temporary"
    temporary.mkdir()
    (folder / "s.py").write_text(ENDLESS.format(how=how, pids=str(pids)))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr("forks.GRACE", 1)
    handlers = [signal.getsignal(stop) for stop in verify.STOPS]

    def signalled():
        while not pids.exists():
            time.sleep(0.01)
        assert any(temporary.iterdir())
        os.kill(os.getpid(), number)

    def launch(*args):  # not before it is running
        threading.Thread(target=signalled, daemon=True).start()
        return own_launch(*args)

    monkeypatch.setattr(verify, "launch", launch)
    files = folder / "model.ptz", "--data", folder / "data", "--tokenizer"
    files += folder / "data" / "tokenizer.model", "--train-script", folder / "s.py"
    assert verify.main([str(file) for file in files]) == 128 + number
    assert capsys.readouterr().err == f"verify: error: stopped by {number.name}\n"
    assert not any(temporary.iterdir())
    while is_running(int(pids.read_text())):
        time.sleep(0.01)  # init may take a moment
    assert [signal.getsignal(stop) for stop in verify.STOPS] == handlers


def test_a_hang_up_that_is_ignored_stays_ignored():
    """Under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with verify.stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
