"""tools/record.py: what submission.json says of a run, and which logs it refuses."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "record.py"
sys.path.insert(0, str(TOOL.parent))
import record  # noqa: E402  (the path comes first)

LINE = "=" * 100 + "\n"
SOURCE = f'print("figures: ", "{"=" * 100}")\n'  # a source may hold what marks the parts of a log
SCORES = {"val_bpb": 1.06, "val_loss": 2.3, "raw_val_bpb": 1.07, "pre_quant_val_bpb": 1.05}
COSTS = {
    "step_stop": 4500,
    "wallclock_seconds": 599.9,
    "last_read_seconds": 588.0,
    "eval_time_seconds": 598.0,
    "bytes_code": 40,
    "bytes_model": 1000,
    "bytes_total": 1040,
}
RUN = {
    "preset": "record",
    "system": "record",
    "run_id": "run",
    "seed": 42,
    "hardware": "8xNVIDIA H100 80GB HBM3",
    "pytorch_version": "2.9.1+cu128",
}
TEXT = {"data_path": "data/sp8192", "documents": 50_000, "bytes": 151_080_000}
CHECKS = {"text": {"passed": True, "sha256": "00"}, "size": {"passed": True}}
FIGURES = RUN | SCORES | COSTS | TEXT | {"layout": "G S=2", "official": True, "checks": CHECKS}
OLDER = '{"val_bpb": 1.2, "run_id": "older"}'
VERIFIED = "verify: size passed 1040\nverify: score passed 1.06\nverify: all 2 passed\n"


def log(figures=FIGURES, settings=(), sources=(SOURCE,), last=None) -> str:
    """A log: sources, versions, hyperparameters, audit, and figures or another last line."""
    heads = [f"{head}\n{LINE}" for head in (*sources, "Running Python 3.11.7")]
    values = {"run_id": "run", "artifact": "model.ptz", "eval_only": "False", "scores": ""}
    values |= dict(settings)
    lines = [f"  {name}: {value}" for name, value in values.items()]
    lines += ["step:1/10 train_loss:7", 'audit: size passed {"head_room": 1}']
    lines += [f"figures: {json.dumps(figures)}" if last is None else last]
    return "".join(heads) + "\n".join(lines) + "\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, with the source that ran and the submission.json of an older run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    for name in "AUTHOR", "GITHUB_ID":
        monkeypatch.delenv(name, raising=False)
    Path("logs").mkdir()
    Path("train_gpt.py").write_text(SOURCE)
    Path("submission.json").write_text(OLDER)
    return tmp_path


def written(text: str, *arguments: str) -> dict:
    """The submission made from a log of this text."""
    Path("logs/run.txt").write_text(text)
    assert record.main(["logs/run.txt", *arguments]) is None
    return json.loads(Path("submission.json").read_text())


def refused(text: str | bytes, *arguments: str) -> str:
    """The reason for which a log of this text is refused; no file is left but the older one, which
    passes for no other run's."""
    Path("logs/run.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    Path("submission.json").write_text(OLDER)
    before = set(Path().rglob("*")) - {Path("submission.json")}
    reason = record.main(["logs/run.txt", *arguments])
    assert reason and "\n" not in reason
    (kept,) = set(Path().rglob("*")) - before
    assert kept.name.startswith("submission.json.old") and kept.read_text() == OLDER
    assert reason.endswith(f"; an earlier submission.json is now {kept}")
    return reason


def without(*names: str) -> dict:
    return {name: value for name, value in FIGURES.items() if name not in names}


# -----------------------------------------------------------------------------
# what is written


def test_an_official_run_stands_as_its_figures_say():
    result = written(log())
    assert result.pop("date")
    assert result == RUN | SCORES | COSTS | {
        "author": None,
        "github_id": None,
        "name": "record: G S=2",
        "track": "10min_16mb",
        "artifact_sha256": None,
        "own_text": None,
        "compliance": {
            "within_600_seconds_each": True,
            "full_validation_split": True,
            "text": True,
            "size": True,
        },
    }


@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("evaluation", [600.0, 600.1])
@pytest.mark.parametrize("training", [600.0, 600.1])
def test_scores_are_claimed_for_the_official_split_within_600_seconds_each(
    training, evaluation, official
):
    costs = {"wallclock_seconds": training, "eval_time_seconds": evaluation}
    result = record.submission(FIGURES | costs | {"official": official}, "2026-04-30")
    in_time = training == evaluation == 600.0
    claimed = in_time and official
    assert {name: result[name] for name in SCORES} == (SCORES if claimed else dict.fromkeys(SCORES))
    assert result["own_text"] == (None if claimed else TEXT | SCORES)
    assert result["compliance"]["within_600_seconds_each"] is in_time
    assert result["compliance"]["full_validation_split"] is official


def test_author_and_github_id_come_from_the_environment_or_are_null(monkeypatch):
    monkeypatch.setenv("AUTHOR", "Ada")
    monkeypatch.setenv("GITHUB_ID", "")
    result = written(log())
    assert (result["author"], result["github_id"]) == ("Ada", None)


def test_the_date_is_the_day_in_utc_on_which_the_log_was_written():
    Path("logs/run.txt").write_text(log())
    os.utime("logs/run.txt", (0, 1_777_507_199))  # 2026-04-29 23:59:59 UTC
    command = [sys.executable, "-S", TOOL, "logs/run.txt"]
    env = os.environ | {"TZ": "EAST-14"}  # where it is the 30th
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=60)
    assert json.loads(Path("submission.json").read_text())["date"] == "2026-04-29"


def test_checks_of_the_verifier_stand_under_verified():
    Path("verified.txt").write_text(VERIFIED + "verify: not checked:\n  the hardware\n")
    compliance = written(log(), "--verified", "verified.txt")["compliance"]
    assert compliance["verified"] == {"size": True, "score": True}


def test_the_output_may_have_another_name():
    Path("logs/run.txt").write_text(log())
    assert record.main(["logs/run.txt", "--output", "other.json"]) is None
    assert json.loads(Path("other.json").read_text())["run_id"] == "run"
    assert Path("submission.json").read_text() == OLDER


def test_no_temporary_file_is_left():
    before = set(Path().rglob("*"))
    written(log())
    assert set(Path().rglob("*")) == before | {Path("logs/run.txt")}


def test_figures_settings_and_sources_are_read_from_their_parts_of_the_log():
    other = "x = 1\n  scores: of the source\n"
    Path("logs/run.txt").write_text(log(sources=(SOURCE, other)))
    run = record.read_run(Path("logs/run.txt"))
    assert run.figures == FIGURES
    assert run.settings == {
        "run_id": "run",
        "artifact": "model.ptz",
        "eval_only": "False",
        "scores": "",
    }
    assert [source.strip() for source in run.sources] == [SOURCE.strip(), other.strip()]


# -----------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    "last",
    ["step:2/10 train_loss:6", "figures: {", "figures: 3", "{}", 'figures: {"val_bpb": NaN}', ""],
)
def test_a_run_that_did_not_finish_is_refused(last):
    assert "logs/run.txt: no `figures:`" in refused(log(last=last))


@pytest.mark.parametrize("text", ["", "figures: {}\n", SOURCE, bytes(range(256)), "[" * 100_000])
def test_a_file_that_is_no_log_is_refused(text):
    expected = "no log of a run: expected a line `Running Python ...`" if text else "empty"
    assert f"logs/run.txt: {expected}" in refused(text)


@pytest.mark.parametrize(
    "name, value", [("seed", "42"), ("checks", [1]), ("checks", {"size": True}), ("val_bpb", None)]
)
def test_figures_of_another_program_are_refused(name, value):
    reason = refused(log(FIGURES | {name: value}))
    assert "logs/run.txt: its " in reason and "no log of this program" in reason


def test_figures_in_the_source_are_no_figures_of_the_run():
    text = log(sources=(f"figures: {json.dumps(FIGURES)}\n",), last="step:2/10 train_loss:6")
    assert "no `figures:`" in refused(text)


def test_a_failed_check_of_the_audit_is_refused():
    checks = CHECKS | {"size": {"passed": False}, "time": {"passed": False}}
    assert "logs/run.txt: failed in its audit: size, time:" in refused(
        log(FIGURES | {"checks": checks})
    )


def test_a_run_without_checks_is_refused():
    assert "there are no checks" in refused(log(FIGURES | {"checks": {}}))


def test_a_run_that_only_evaluated_is_refused():
    figures = without("raw_val_bpb", "pre_quant_val_bpb", "step_stop", "wallclock_seconds")
    assert "EVAL_ONLY" in refused(log(figures, {"eval_only": "True"}))


@pytest.mark.parametrize("name", record.REQUIRED)
def test_a_figure_that_is_missing_is_named(name):
    assert f"no figures for {name}:" in refused(log(without(name)))


def test_a_log_without_hyperparameters_is_refused():
    text = log().replace("  artifact: model.ptz\n", "")
    assert "no line for artifact" in refused(text)


@pytest.mark.parametrize("size", [999, 1001])
def test_an_artifact_of_another_size_is_refused(size):
    Path("model.ptz").write_bytes(bytes(size))
    assert f"model.ptz: {size} bytes, 1000 in logs/run.txt" in refused(log())


def test_an_artifact_of_the_logged_size_or_none_is_accepted():
    written(log())
    Path("model.ptz").write_bytes(bytes(1000))
    written(log())


@pytest.mark.parametrize("logged", ["0" * 64, hashlib.sha256(bytes(1000)).hexdigest()])
def test_an_artifact_with_another_sha256_is_refused(logged):
    text = log(FIGURES | {"artifact_sha256": logged})
    assert written(text)["artifact_sha256"] == logged  # without the artifact it is only told
    Path("model.ptz").write_bytes(bytes(1000))
    if logged != "0" * 64:
        assert written(text)["artifact_sha256"] == logged
    else:
        assert f"model.ptz: sha256 {bytes.hex(hashlib.sha256(bytes(1000)).digest())}, 000" in (
            refused(text)
        )


def test_a_verifier_that_looked_at_another_artifact_is_refused():
    verified = VERIFIED.replace("passed 1040", f"passed 1040 bytes; sha256 {'1' * 64}")
    Path("verified.txt").write_text(verified)
    assert "verified" in written(log(), "--verified", "verified.txt")["compliance"]
    text = log(FIGURES | {"artifact_sha256": "0" * 64})
    assert "verified.txt: of the artifact with sha256 111" in (
        refused(text, "--verified", "verified.txt")
    )


@pytest.mark.parametrize("figures, last", [({"resumed": True}, None), ({}, "resumed: run.ckpt")])
def test_a_resumed_run_claims_no_score(figures, last):
    """Whether its figures say so, or only a line of its log."""
    text = log(FIGURES | figures)
    if last:
        head, line = text.split("figures: {")
        text = f"{head}{last}\nfigures: {{{line}"
    result = written(text)
    assert {name: result[name] for name in SCORES} == dict.fromkeys(SCORES)
    assert result["own_text"] == TEXT | SCORES
    assert result["compliance"]["not_resumed"] is False


def test_a_failed_check_of_the_verifier_is_refused():
    text = "verify: size passed 1\nverify: score FAILED 1.07\nverify: 2 checks, 1 FAILED\n"
    Path("verified.txt").write_text(text)
    assert "verified.txt: failed: score:" in refused(log(), "--verified", "verified.txt")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "verify: all 0 passed\n",
        "verify: size passed 1\n",
        "verify: size passed 1\nverify: all 2 passed\n",
        VERIFIED + VERIFIED,
    ],
)
def test_a_verifier_that_did_not_finish_is_refused(text):
    Path("verified.txt").write_text(text)
    reason = refused(log(), "--verified", "verified.txt")
    assert "verified.txt: " in reason and "verify again" in reason


FIRST = log(FIGURES | {"seed": 1})
SCORED = log(without("step_stop"), {"eval_only": "True"})


@pytest.mark.parametrize(
    "later",
    [SCORED, log(last="step:2/10 train_loss:6"), log(last="")[:-1], 'print("', SCORED[:-9]],
    ids=["scored", "killed", "refused", "half a source", "half a line"],
)
def test_what_follows_a_finished_training_does_not_hide_it(later, capsys):
    result = written(f"{FIRST}\n{LINE}{later}")
    assert result["seed"] == 1
    warnings = [line for line in capsys.readouterr().err.splitlines() if "takes run" in line]
    of = 1 if later == 'print("' else 2
    assert len(warnings) == of - 1
    for line in warnings:
        assert f"logs/run.txt: takes run 1 of {of}, the last that trained" in line


def test_of_two_trainings_the_later_counts(capsys):
    second = log(FIGURES | {"seed": 2})
    assert written(f"{FIRST}\n{LINE}{second}")["seed"] == 2
    assert "takes run" not in capsys.readouterr().err


@pytest.mark.parametrize("output", ["none/submission.json", "logs", "logs/run.txt/submission.json"])
def test_an_output_that_cannot_be_written_is_named(output):
    Path("logs/run.txt").write_text(log())
    before = set(Path().rglob("*"))
    reason = record.main(["logs/run.txt", "--output", output])
    assert reason.startswith(f"record: {output}: ") and "give another" in reason
    assert "\n" not in reason and set(Path().rglob("*")) == before


@pytest.mark.parametrize("content", ["x = 1\n", "[]", '{"name": "other"}'])
def test_what_is_no_submission_is_never_replaced_or_renamed(content):
    Path("logs/run.txt").write_text(log())
    Path("other").write_text(content)
    reason = record.main(["logs/run.txt", "--output", "other"])
    assert "other: exists and is no submission" in reason
    assert Path("other").read_text() == content


def test_no_earlier_submission_is_lost():
    reasons = [refused(log(last="")) for _ in range(3)]
    names = [reason.rpartition(" ")[2] for reason in reasons]
    assert names == [f"submission.json.old{n}" for n in ("", 1, 2)]
    assert all(Path(name).read_text() == OLDER for name in names)


def test_a_missing_file_is_refused_by_name():
    assert "none.txt: No such file" in refused(log(), "--verified", "none.txt")
    assert "logs/none.txt: No such file" in record.main(["logs/none.txt"])
    assert "logs: Is a directory" in record.main(["logs"])


@pytest.mark.parametrize("output", ["logs/run.txt", "logs/../verified.txt"])
def test_what_is_read_is_never_replaced(output):
    Path("logs/run.txt").write_text(log())
    Path("verified.txt").write_text(VERIFIED)
    with pytest.raises(SystemExit) as end:
        record.main(["logs/run.txt", "--verified", "verified.txt", "--output", output])
    assert end.value.code == 2
    assert Path("logs/run.txt").read_text() == log()
    assert Path("verified.txt").read_text() == VERIFIED


# -----------------------------------------------------------------------------
# what is only warned of, and the program as a whole


@pytest.mark.parametrize(
    "changed", [[], ["train_gpt.py"], ["systems/toy.py"], ["train_gpt.py", "systems/toy.py"]]
)
def test_sources_that_changed_are_a_warning(changed, capsys):
    Path("systems").mkdir()
    Path("systems/toy.py").write_text("import train_gpt\n")
    text = log(FIGURES | {"system": "toy"}, sources=("import train_gpt\n", SOURCE))
    for name in changed:
        Path(name).write_text("changed\n")
    written(text)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(changed)
    for line in lines:
        found = f"warning: logs/run.txt: {len(changed)} of 2 source files are no longer those of"
        assert found in line


def test_a_refusal_is_one_line_on_stderr_and_exit_status_1():
    Path("logs/run.txt").write_text(log(last=""))
    command = [sys.executable, "-S", TOOL, "logs/run.txt"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert not Path("submission.json").exists()


def test_it_needs_neither_torch_nor_the_training_script():
    Path("logs/run.txt").write_text(log())
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import record; record.main(); "
    code += "sys.exit(bool({'torch', 'numpy', 'train_gpt'} & set(sys.modules)))"
    command = [sys.executable, "-S", "-c", code, TOOL.parent, "logs/run.txt"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert json.loads(Path("submission.json").read_text())["val_bpb"] == 1.06
