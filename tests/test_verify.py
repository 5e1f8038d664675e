"""tools/verify.py: an honest run passes every check, and what is wrong with the files of another is
named. Bugs in the program are in test_verify_cheats.py."""

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from corpus import BOS, NORMAL, edit_pieces, load, prose, tokenizer_model, write_shard
from in_process import ROOT, launch, planted, run, train

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]

import prepare  # noqa: E402  (the paths come first)
import verify  # noqa: E402

FEW = ("--normalisation-tokens", 1)
MODES = {  # of a system, and what of its own settings differs
    "sliding": ("train_gpt", {}),
    "stream": ("train_gpt", dict(eval_mode="stream")),
    "lora": ("train_gpt", dict(eval_mode="stream", ttt="lora")),
    "sgd": ("kv_share", dict(ttt="sgd")),
    "sgd in a stream": ("kv_share", dict(eval_mode="stream", ttt="sgd")),
    "lora in phases": ("transformer", dict(eval_mode="stream", ttt="lora")),
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """runs(mode) -> folder of one finished run, with its data and a copy of its program."""
    folders = {}

    def of(mode: str = "sliding") -> Path:
        if mode not in folders:
            folders[mode] = tmp_path_factory.mktemp("a run")
            system, settings = MODES[mode]
            train(folders[mode], planted(folders[mode], system), **settings)
        return folders[mode]

    return of


def script_of(folder: Path, mode: str = "sliding") -> Path:
    system = MODES[mode][0]
    return folder / ("train_gpt.py" if system == "train_gpt" else f"systems/{system}.py")


@pytest.fixture
def check(monkeypatch, capsys):
    """check(folder, *options, other files) -> status, names of passed and failed checks, text."""
    monkeypatch.setattr(verify, "launch", launch)

    def verified(folder: Path, *options, script=None, artifact=None, data=None, tokenizer=None):
        data = data or folder / "data"
        files = artifact or folder / "model.ptz", "--data", data, "--tokenizer"
        files += (tokenizer or data / "tokenizer.model", "--train-script")
        arguments = *files, script or script_of(folder), *options
        status = verify.main([str(argument) for argument in arguments])
        text = capsys.readouterr().out
        passed, failed = (
            re.findall(rf"^verify: (\w+) {word}\b", text, re.M) for word in ("passed", "FAILED")
        )
        return SimpleNamespace(status=status, passed=passed, failed=set(failed), text=text)

    return verified


@pytest.fixture
def at_rest(monkeypatch):
    """The program is not run: for checks that look at files only."""

    def refuses(*_):
        raise RuntimeError("not run")

    monkeypatch.setattr(verify, "check_run", refuses)


def submission_of(folder: Path, **changes) -> Path:
    """What tools/record.py makes of the run, as far as it is looked at."""
    figures = verify.read_log(folder / "logs" / "run.txt").figures
    scores = ("val_bpb", "val_loss", "raw_val_bpb", "pre_quant_val_bpb")
    own = {name: figures[name] for name in ("documents", "bytes", *scores)}
    submission = figures | dict.fromkeys(scores) | {"own_text": own} | changes
    del submission["documents"], submission["bytes"]
    path = folder / "submission.json"
    path.write_text(json.dumps(submission), "utf-8")
    return path


def files_of(folder: Path, **changes) -> list:
    submission = submission_of(folder, **changes)
    log, scores = folder / "logs" / "run.txt", folder / "scores.npz"
    return ["--log", log, "--scores", scores, "--submission", submission]


# -----------------------------------------------------------------------------
# Honest runs


def test_an_honest_run_passes_every_check(runs, check, monkeypatch):
    """Nothing of the caller feeds the score: neither its environment nor what lies beside."""
    folder = runs()
    for name, value in dict(EVAL_STRIDE="16", LAYOUT="G", VOCAB_SIZE="9").items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    result = check(folder, *FEW, *files_of(folder), "--full")
    assert result.status == 0 and not result.failed, result.text
    names = (
        "data size claims overlap gptq sample_positions sample_bytes claimed_positions "
        "claimed_bytes claimed_score claimed_sample run reproduced truncation future isolation "
        "normalisation full positions bytes score claimed_scores"
    )
    assert result.passed == names.split()
    figures = verify.read_log(folder / "logs" / "run.txt").figures
    bpb = float(re.search(r"^verify: score passed bpb (\S+)", result.text, re.M)[1])
    assert bpb == pytest.approx(figures["val_bpb"], abs=1e-9)
    assert f"/ {figures['bytes']} bytes" in result.text
    assert re.search(r"^verify: about [\d,]+ s: \d+ processes, ", result.text, re.M)
    assert "not checked:" in result.text and "without --full" in result.text
    assert result.text.endswith("verify: all 22 passed\n")


def moved(text: str, check: str) -> list[tuple[int, float]]:
    """(scores compared, by how much they moved) of each comparison in the line of a check."""
    line = re.search(rf"^verify: {check} \w+ (.*)$", text, re.M)[1]
    return [
        (int(n), float(by)) for n, by in re.findall(r"(\d+) scores moved by at most (\S+),", line)
    ]


COMPARED = {
    "stream": dict(truncation=[96, 1124], future=[1124, 48, 95], isolation=[191]),
    "lora": dict(truncation=[96, 1124], future=[1124, 48, 95, 240, 88, 208], rows=[240]),
    "lora in phases": dict(future=[1124, 48, 95, 624, 88, 208, 496], rows=[240]),
    "sgd": dict(truncation=[128, 1120], future=[48, 80, 127, 48, 224], isolation=[73]),
    "sgd in a stream": dict(future=[1124, 48, 95, 384, 88, 208, 104]),
}


@pytest.mark.parametrize("mode", COMPARED)
def test_an_honest_run_passes_in_every_mode(runs, check, mode):
    """No score moves by a bit. What can be learned is learned in the texts of the probes."""
    folder, counts = runs(mode), COMPARED[mode]
    result = check(folder, *FEW, *files_of(folder), script=script_of(folder, mode))
    assert result.status == 0 and not result.failed, result.text
    for name in counts:
        assert moved(result.text, name) == [(n, 0.0) for n in counts[name]], result.text
    before, *_, early = moved(result.text, "reproduced")
    assert before[0] == 1499 and before[1] < 1e-5
    assert early == ({"stream": 1499, "sgd": 64, "sgd in a stream": 64}.get(mode, 122), 0.0)
    taught = re.findall(r"TTT had moved them by up to (\S+)|is learned from, by (\S+)", result.text)
    assert len(taught) == (mode != "stream") + ("rows" in counts)
    assert all(float(ahead or row) > 1e-4 for ahead, row in taught)


def test_the_whole_text_is_scored_again_by_a_run_that_learned(runs, check):
    folder = runs("lora")
    result = check(folder, *files_of(folder), "--full", "--probes")
    assert result.status == 0 and "score" in result.passed and "claimed_scores" in result.passed


def test_the_same_in_processes_of_its_own(runs, check, monkeypatch):
    folder = runs("sgd")
    monkeypatch.setattr(verify, "launch", verify_launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = check(folder, *files_of(folder), "--probes", script=script_of(folder, "sgd"))
    assert result.status == 0 and "reproduced" in result.passed, result.text


verify_launch = verify.launch


def test_checks_are_callable_in_process(runs, monkeypatch):
    monkeypatch.setattr(verify, "launch", launch)
    folder = runs()
    files = folder / "model.ptz", "--data", folder / "data", "--tokenizer"
    files += folder / "data" / "tokenizer.model", "--train-script", script_of(folder)
    job = verify.parse([str(argument) for argument in (*files, "--probes", "isolation")])
    passed = verify.verify(job)
    names = [
        "data",
        "size",
        "overlap",
        "gptq",
        "sample_positions",
        "sample_bytes",
        "run",
        "reproduced",
    ]
    assert passed == dict.fromkeys([*names, "isolation"], True)


def test_transformed_text_is_verified_by_its_original(check, tmp_path):
    """CaseOps: a sidecar holds the bytes of the original, which the verifier decodes."""
    for name, texts in ("docs", prose()[30:200]), ("val", prose()[:30]):
        lines = [json.dumps(dict(text=text)) + "\n" for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    docs = ["--docs", str(tmp_path / "docs.jsonl"), "--val-docs", str(tmp_path / "val.jsonl")]
    options = ["--caseops", "--vocab-size", "400", "--name", "cased"]
    prepare.main([*docs, *options, "--output-root", str(tmp_path)])
    data = tmp_path / "datasets" / "cased"
    tokenizer = tmp_path / "tokenizers" / "cased_400_bpe_caseops.model"
    files = dict(data_path=data, tokenizer_path=tokenizer, vocab_size=400)
    script = planted(tmp_path, "transformer")
    train(tmp_path, script, eval_mode="stream", **files)
    options = *FEW, *files_of(tmp_path), "--probes", "normalisation"
    result = check(tmp_path, *options, script=script, data=data, tokenizer=tokenizer)
    assert result.status == 0 and not result.failed, result.text
    decoded = json.loads((data / "stats.json").read_text())["val"]["bytes"]
    assert re.search(rf"claimed_bytes passed .* decoded {decoded},", result.text)


@pytest.mark.parametrize("name", ["verify", "dataset", "logs"])
def test_the_verifier_shares_no_code_with_the_program(name):
    source = (ROOT / "tools" / f"{name}.py").read_text("utf-8")
    others = "train_gpt|prepare|torch|importlib|runpy"
    assert not re.search(rf"^\s*(import|from) ({others})", source, re.M)


def test_a_rehearsal_asks_for_what_is_run(runs, check, monkeypatch):
    """As many processes as announced, and texts of the sizes that were counted."""
    folder, seen = runs("lora"), []

    def counted(job, *args):
        seen.append(1)
        return launch(job, *args)

    monkeypatch.setattr(verify, "launch", counted)
    text = check(folder, *FEW).text
    assert f" s: {len(seen) - 2} processes, " in text  # two were run before


# -----------------------------------------------------------------------------
# Files with something wrong in them


def test_an_artifact_with_one_flipped_byte_does_not_run(runs, check):
    folder = runs()
    data = bytearray((folder / "model.ptz").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "flipped.ptz").write_bytes(data)
    result = check(folder, artifact=folder / "flipped.ptz")
    assert result.status == 1 and result.failed == {"run"} and "damaged" in result.text
    assert "no file" in result.text and "what the run scored is not compared" in result.text


def drop(scores):
    return {name: np.delete(x, 700) if x.ndim else x for name, x in scores.items()}


def lower(scores):
    scores["nats"][700] -= 1e-3
    return scores


def swap(scores):
    order = [1, 0, *range(2, len(scores["nats"]))]
    return {name: x[order] if x.ndim else x for name, x in scores.items()}


def move_a_byte(scores):
    at = np.flatnonzero(scores["bytes"] > 1)[0]
    scores["bytes"][at] -= 1
    scores["bytes"][-1] += 1
    return scores


def lower_all(scores):
    return scores | {"nats": scores["nats"] - 2e-4, "unlearned": scores["unlearned"] - 2e-4}


def on_a_gpu(scores):
    """Scores that lie as far from float32 as bf16 does."""
    noise = np.random.default_rng(0).normal(0, 0.014, len(scores["nats"]))
    unlearned = np.maximum(scores["unlearned"] + noise, 0)
    return scores | {"unlearned": unlearned, "nats": unlearned, "device": np.array("cuda")}


def lower_on_a_gpu(scores):
    scores = on_a_gpu(scores)
    return scores | {name: scores[name] * 0.999 for name in ("nats", "unlearned")}


def cut_short(scores):
    return {name: x[:-1] if x.ndim else x for name, x in scores.items()}


@pytest.mark.parametrize(
    "change, failed",
    [
        (drop, {"claimed_positions", "claimed_sample"}),
        (lower, {"claimed_score", "claimed_sample"}),
        (swap, {"claimed_positions", "claimed_sample"}),
        (move_a_byte, {"claimed_bytes"}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_changed_score_file_is_named(runs, check, at_rest, tmp_path, change, failed):
    folder = runs()
    np.savez(tmp_path / "changed.npz", **change(dict(np.load(folder / "scores.npz"))))
    options = *files_of(folder), "--scores", tmp_path / "changed.npz"
    result = check(folder, *options)
    assert result.status == 1 and result.failed == {*failed, "run"}, result.text


@pytest.mark.parametrize(
    "change, failed",
    [
        (drop, {"sample_positions", "reproduced"}),
        (cut_short, {"sample_positions", "reproduced"}),
        (swap, {"sample_positions", "reproduced"}),
        (move_a_byte, {"sample_bytes"}),
        (lower, {"reproduced"}),
        (lower_all, {"reproduced"}),
        (on_a_gpu, set()),
        (lower_on_a_gpu, {"reproduced"}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_changed_sample_is_named(runs, check, tmp_path, change, failed):
    folder = runs("stream")
    sample = dict(np.load(folder / "model.ptz.sample.npz"))
    np.savez(tmp_path / "changed.npz", **change(sample))
    result = check(folder, "--probes", "--sample", tmp_path / "changed.npz")
    assert result.failed == failed, result.text


def own_text(**changes):
    def change(figures):
        text = {name: figures[name] for name in ("documents", "bytes", "val_bpb", "val_loss")}
        return dict(own_text=text | changes)

    return change


@pytest.mark.parametrize(
    "change, failed",
    [
        (lambda f: own_text(val_bpb=f["val_bpb"] - 2e-9)(f), {"claims", "claimed_score"}),
        (lambda f: own_text(bytes=f["bytes"] + 1)(f), {"claims"}),
        (lambda f: dict(val_bpb=f["val_bpb"]), {"claims"}),  # at the top: the official split
        (lambda f: dict(hardware="8xNVIDIA H100 80GB HBM3"), {"claims"}),
        (lambda f: dict(step_stop=f["step_stop"] + 1), {"claims"}),
        (lambda f: dict(bytes_total=f["bytes_total"] - 1), {"size", "claims"}),
    ],
    ids=["lowered", "bytes", "other text", "hardware", "steps", "size"],
)
def test_a_changed_submission_is_named(runs, check, at_rest, change, failed):
    folder = runs()
    figures = verify.read_log(folder / "logs" / "run.txt").figures
    result = check(folder, *files_of(folder, **change(figures)))
    assert result.status == 1 and result.failed == {*failed, "run"}, result.text


def changed_figures(**changes):
    def change(log: str) -> str:
        head, line = log.rstrip().rsplit("figures: ", 1)
        return f"{head}figures: {json.dumps(json.loads(line) | changes)}\n"

    return change


@pytest.mark.parametrize(
    "change, failed",
    [
        (changed_figures(val_bpb=1.0), {"claims", "claimed_score"}),
        (changed_figures(val_loss=1.0), {"claims"}),
        (changed_figures(documents=50_000, official=True), {"claims"}),
        (changed_figures(bytes_code=1), {"size"}),
        (changed_figures(hardware="8xNVIDIA H100 80GB HBM3"), {"claims"}),
        (changed_figures(checks={"size": {"passed": False}}), {"claims"}),
        (changed_figures(checks={}), {"claims"}),
        (lambda log: log.replace("val_bpb:", "val_bpb:0"), {"claims"}),
        (lambda log: log.replace("softcap", "softcup"), {"claims"}),
    ],
    ids="bpb loss official code hardware failed unchecked exact source".split(),
)
def test_a_changed_log_is_named(runs, check, at_rest, tmp_path, change, failed):
    folder = runs()
    log = (folder / "logs" / "run.txt").read_text("utf-8")
    (tmp_path / "log.txt").write_text(change(log), "utf-8")
    options = "--scores", folder / "scores.npz", "--log", tmp_path / "log.txt"
    result = check(folder, *options)
    assert result.status == 1 and result.failed == {*failed, "run"}, result.text


def copy_of_data(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder / "data", to / "data"))


def documents_of(data: Path) -> list[np.ndarray]:
    ids = verify.read_shard(data / "fineweb_val_000000.bin")
    return np.split(ids, np.flatnonzero(ids == BOS)[1:])


@pytest.mark.parametrize(
    "cut, found", [(None, 1), (1, 0), (0, 1)], ids=["inside", "over two shards", "at a border"]
)
def test_validation_documents_in_the_training_shards_are_counted(
    runs, check, at_rest, tmp_path, cut, found
):
    """A document that a shard's end cuts is no whole one; 1 of 4 documents is too many."""
    data = copy_of_data(runs(), tmp_path)
    leaked = documents_of(data)[1]
    parts = [leaked, [BOS, 5]] if cut is None else [[BOS, 5, *leaked[:cut]], leaked[cut:]]
    for i, ids in enumerate(parts):
        write_shard(data / f"fineweb_train_{i + 2:06d}.bin", ids)
    result = check(runs(), data=data)
    assert f"{found} of 4 documents in 4 shards" in result.text
    assert result.failed == {"run"} | ({"overlap"} if found else set())


@pytest.mark.parametrize("told, failed", [(0, {"run"}), (1, {"run", "overlap"})])
def test_the_overlap_is_the_one_that_stats_json_tells(runs, check, at_rest, tmp_path, told, failed):
    data = copy_of_data(runs(), tmp_path)
    overlap = {"validation_documents_in_training": told, "validation_documents": 4}
    (data / "stats.json").write_text(json.dumps({"overlap": overlap}))
    assert check(runs(), data=data).failed == failed


def test_without_training_shards_nothing_is_counted(runs, check, at_rest, tmp_path):
    data = copy_of_data(runs(), tmp_path)
    for path in data.glob("fineweb_train_*"):
        path.unlink()
    result = check(runs(), data=data)
    assert result.failed == {"run"} and "verify: overlap: no training shards" in result.text


def test_a_tokenizer_whose_table_and_text_disagree(runs, check, at_rest, tmp_path):
    """A space inside a piece: three bytes to the table, one in the text."""
    model, folder = tokenizer_model(), runs()
    sp, ids = load(model), np.concatenate(documents_of(folder / "data"))
    pieces = {int(i): sp.id_to_piece(int(i)) for i in ids}
    used = next(i for i, piece in pieces.items() if piece.isalpha() and len(piece) == 2)
    first, second = pieces[used]
    edited = edit_pieces(model, {used: (f"{first}\u2581{second}", NORMAL)})
    (tmp_path / "edited.model").write_bytes(edited)
    result = check(folder, *files_of(folder), tokenizer=tmp_path / "edited.model")
    assert result.failed == {"data", "sample_bytes", "claimed_bytes", "claimed_score", "claims"}
    assert "the program is not run" in result.text


def bad_header(data: Path):
    write_shard(data / "fineweb_val_000000.bin", [1, 5, 6], header=(20240521, 1, None))


def too_short(data: Path):
    write_shard(data / "fineweb_val_000000.bin", [1, 5, 6], header=(20240520, 1, 4))


def foreign_ids(data: Path):
    write_shard(data / "fineweb_val_000000.bin", [1, 5, 60_000])


def no_bos(data: Path):
    write_shard(data / "fineweb_val_000000.bin", [5, 5, 6])


def sidecar_only(data: Path):
    write_shard(data / "fineweb_val_bytes_000000.bin", [1, 5, 6])


@pytest.mark.parametrize(
    "make, message",
    [
        (bad_header, "fineweb_val_000000.bin: not a shard: magic 20240521"),
        (too_short, "fineweb_val_000000.bin: not a shard: magic 20240520"),
        (foreign_ids, "fineweb_val_000000.bin: token 60000"),
        (no_bos, "expected BOS=1, and a token"),
        (sidecar_only, "no file fineweb_val_"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_shard_that_cannot_be_used_is_one_line(runs, check, tmp_path, make, message):
    make(tmp_path)
    shutil.copy(runs() / "data" / "tokenizer.model", tmp_path)
    status = check(runs(), data=tmp_path).status
    assert status.startswith("verify: error: ") and message in status and "\n" not in status


@pytest.mark.parametrize(
    "options, files, message",
    [
        ([], dict(artifact="nowhere.ptz"), "nowhere.ptz: no such file"),
        ([], dict(tokenizer="nowhere.model"), "nowhere.model: no such file"),
        ([], dict(tokenizer="train_gpt.py"), "train_gpt.py: not a SentencePiece model"),
        ([], dict(script="nowhere.py"), "nowhere.py"),
        (["--scores", ROOT / "README.md"], {}, "README.md: not a score file"),
        (["--submission", ROOT / "README.md"], {}, "README.md: not a JSON object"),
        (["--log", ROOT / "README.md"], {}, "README.md: not the log of a run"),
    ],
    ids="artifact tokenizer model script scores submission log".split(),
)
def test_a_file_that_cannot_be_used_is_one_line(runs, check, options, files, message):
    files = {name: runs() / file for name, file in files.items()}
    status = check(runs(), *options, **files).status
    assert status.startswith("verify: error: ") and message in status and "\n" not in status


def test_a_tokenizer_with_another_bos_does_not_fit(runs, check, tmp_path):
    (tmp_path / "other.model").write_bytes(tokenizer_model(bos_id=2, eos_id=1))
    assert "BOS is 2, expected 1" in check(runs(), tokenizer=tmp_path / "other.model").status


# -----------------------------------------------------------------------------
# Parts


def test_the_cap_is_decimal_and_counts_all_code(tmp_path):
    (tmp_path / "systems").mkdir()
    for name in "train_gpt.py", "unused.py", "systems/parts.py", "systems/other.py":
        (tmp_path / name).write_text("import math\n" + "#" * 100)
    script, artifact = tmp_path / "systems" / "own.py", tmp_path / "model.ptz"
    script.write_text("import parts\nif parts:\n    from train_gpt import bounded\n")
    code = verify.code_of(script)
    assert list(code) == ["systems/own.py", "systems/parts.py", "train_gpt.py"]
    size = sum(path.stat().st_size for path in code.values())
    log = SimpleNamespace(figures={})
    job = SimpleNamespace(artifact=artifact, code=code, log=log, submission={}, sha256="")
    for excess in 0, 1:
        with open(artifact, "wb") as file:
            file.truncate(16_000_000 - size + excess)
        assert verify.check_size(job)[0] is (excess == 0)


@pytest.mark.parametrize(
    "documents, end",
    [([9000, 7000, 384], 16_384), ([9000, 7000, 385], 16_000), ([20_000, 5], 20_000), ([7], 7)],
)
def test_the_sample_is_the_first_whole_documents(tmp_path, documents, end):
    ids = np.full(sum(documents), 5)
    ids[np.cumsum([0, *documents[:-1]])] = BOS
    write_shard(tmp_path / "fineweb_val_000000.bin", ids)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model())
    assert verify.Text(tmp_path, tmp_path / "tokenizer.model").end == end


@pytest.mark.parametrize("V, places", [(8192, 8), (1024, 18), (400, 41), (64, 41)])
def test_as_many_contexts_as_the_budget_has(V, places):
    budget = verify.parse(["x", "--data", "x", "--tokenizer", "x"]).normalisation_tokens
    groups = verify.contexts(V, budget)
    lengths = sorted(n for group in groups for n in group)
    assert lengths == [*range(1, places), 63]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_program_is_started_as_it_is_by_hand(tmp_path, gpu):
    code = {name: tmp_path / name for name in ("systems/own.py", "train_gpt.py")}
    (tmp_path / "systems").mkdir()
    for path in code.values():
        path.write_text("import os\nprint(__file__, sorted(os.environ))\n")
    with contextlib.ExitStack() as ends:
        job = SimpleNamespace(code=code, gpu=gpu, forks=None, ends=ends)
        result = verify.launch(job, tmp_path, {"A": "1"}, 1)
    assert result.returncode == 0 and result.stdout.startswith(str(tmp_path / "systems/own.py"))
    assert "'A'" in result.stdout and 0 < result.seconds < 600


def test_libraries_are_what_the_program_imports_and_is_not(tmp_path):
    code = {name: tmp_path / name for name in ("own.py", "train_gpt.py")}
    (tmp_path / "own.py").write_text("from train_gpt import GPT\nimport train_gpt as t, os\n")
    text = "import torch.nn as nn, os\nfrom a.b import c\ndef f():\n  import fla\nfrom . import x\n"
    (tmp_path / "train_gpt.py").write_text(text)
    assert verify.libraries(SimpleNamespace(code=code)) == ["os", "torch.nn", "a.b"]


def test_in_process_a_run_has_nothing_of_this_one(tmp_path, runs):
    result = run(script_of(runs()), tmp_path, {"EVAL_ONLY": "1", "ARTIFACT": "nowhere"})
    assert result.returncode == 1 and "nowhere" in result.stderr


@pytest.mark.parametrize("env, waits", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_wait_briefly_unless_told(monkeypatch, env, waits):
    """Otherwise a verification beside other work takes ten times as long."""
    seen = {}

    def start(job, folder, env, nproc):
        seen.update(env)
        return SimpleNamespace(returncode=1, stdout="", stderr="refused", seconds=0.0)

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(verify, "fill", lambda *_: None)
    monkeypatch.setattr(verify, "launch", start)
    with pytest.raises(RuntimeError, match="no scores: refused"):
        verify.execute(SimpleNamespace(gpu=False, nproc=1))
    assert seen["GOMP_SPINCOUNT"] == waits
