"""`record.py folder`: what a submission's folder holds, and what is refused. The logs are invented,
but for the one of logs/demo.txt."""

import ast
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import in_process
import pytest
import test_record
from conftest import ROOT
from test_record import CHECKS, LINE, RUN, SCORES, record

folder = sys.modules["folder"]
SOURCE = 'class Hyperparameters:\n    seed: int = 1337\n    width: int = 8\nprint("hello")\n'
BASE = test_record.FIGURES | {"bytes_code": len(SOURCE), "bytes_total": 1000 + len(SOURCE)}
SETTINGS = {"width": "9", "ttt": "lora", "layout": "G S=2"}
BPB = {42: 1.060, 0: 1.061, 1234: 1.065}
MEAN, STD = 1.062, math.sqrt((0.002**2 + 0.001**2 + 0.003**2) / 2)
NATS = math.log(2) * 151_080_878 / 40_540_160  # a token of the split, at one bit a byte
LINES = """val_loader:shards:1 tokens:40540160 bytes:151080878 documents:50000
model_params:33985333
train_loader:dataset:sp8192 train_shards:80 tokens:8000000000
step:4500/20000 val_loss:2.8 val_bpb:1.0900 train_time:591000ms step_avg:131.33ms
final_int6_roundtrip val_loss:2.7 val_bpb:1.0700 eval_time:6219ms
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    for name in "AUTHOR", "GITHUB_ID":
        monkeypatch.delenv(name, raising=False)
    Path("logs").mkdir()
    Path("train_gpt.py").write_text(SOURCE)
    Path("requirements.txt").write_text("torch==2.9.1\n")
    return tmp_path


def write_log(seed: int = 42, figures=(), settings=(), sources=(SOURCE,), name=None, verify=True):
    """A finished, verified run of the seed; returns its log."""
    name = name or f"seed{seed}"
    sha256 = f"{seed:064x}"
    own = {"seed": seed, "run_id": name, "artifact_sha256": sha256, "val_bpb": BPB.get(seed, 1.06)}
    own |= {"val_loss": NATS * own["val_bpb"]}
    values = {"run_id": name, "seed": str(seed)} | SETTINGS | dict(settings)
    text = test_record.log(BASE | own | dict(figures), values, sources)
    head, line = text.split("figures: {")
    path = Path("logs", f"{name}.txt")
    final = f"val_loss:{own['val_loss']:.8f} val_bpb:{own['val_bpb']:.8f}"
    lines = f"{LINES}final_int6_stream_ttt_lora_exact {final}\n"
    path.write_text(f"{head}{lines}figures: {{{line}")
    size = f"verify: size passed artifact 1000; sha256 {sha256}\n"
    verified = f"{size}verify: score passed 1.06\nverify: all 2 passed\n"
    if verify:
        path.with_suffix(".verify.txt").write_text(verified)
    return str(path)


def made(*logs: str, options=()) -> Path:
    """The folder that is made of these logs."""
    before = set(Path().rglob("*"))
    assert record.main(["folder", *logs, *options]) is None
    (found,) = {p for p in set(Path().rglob("submission.json")) - before}
    return found.parent


def refused(*logs: str, options=()) -> str:
    """The lines for which nothing is written."""
    before = set(Path().rglob("*"))
    reason = record.main(["folder", *logs, *options])
    assert reason and all(line.startswith("record: ") for line in reason.splitlines())
    assert set(Path().rglob("*")) == before
    return reason


def three() -> list[str]:
    return [write_log(seed) for seed in BPB]


# -----------------------------------------------------------------------------
# what is written


def test_three_seeds_make_a_record(capsys):
    logs = three()
    path = made(*logs, options=("--title", "Deep stack", "--date", "2026-04-30"))
    assert str(path) == "records/track_10min_16mb/2026-04-30_Deep_stack"
    assert capsys.readouterr() == (f"{path}\n", "")
    names = "README.md submission.json requirements.txt train_gpt.py train_seed42.log "
    names += "train_seed0.log train_seed1234.log"
    assert {p.name for p in path.iterdir()} == set(names.split())
    for log, seed in zip(logs, BPB, strict=True):
        assert (path / f"train_seed{seed}.log").read_bytes() == Path(log).read_bytes()
    assert (path / "train_gpt.py").read_text() == SOURCE
    assert (path / "requirements.txt").read_text() == "torch==2.9.1\n"
    assert not [p for p in path.parent.iterdir() if p != path]


def test_submission_has_mean_and_deviation_of_the_sample():
    path = made(*three(), options=("--author", "Ada", "--github-id", "ada", "--blurb", "Short."))
    result = json.loads((path / "submission.json").read_text())
    assert (result["val_bpb"], result["val_bpb_std"]) == (
        pytest.approx(MEAN, abs=1e-12),
        pytest.approx(STD, abs=1e-12),
    )
    assert result["val_loss"] == pytest.approx(NATS * MEAN)
    assert (result["author"], result["github_id"], result["blurb"]) == ("Ada", "ada", "Short.")
    assert result["track"] == "10min_16mb" and result["seeds"] == list(BPB)
    assert result["bytes_total"] == result["artifact_bytes_max"] == 1000 + len(SOURCE)
    assert result["own_text"] is None
    assert result["seed_results"]["1234"] == {
        "val_loss": NATS * 1.065,
        "val_bpb": 1.065,
        "pre_quant_val_bpb": SCORES["pre_quant_val_bpb"],
        "post_quant_val_bpb": 1.07,
        "steps": 4500,
        "step_avg_ms": 131.33,
        "train_time_s": 599.9,
        "eval_time_s": 598.0,
        "artifact_bytes": 1000 + len(SOURCE),
        "artifact_sha256": f"{1234:064x}",
    }
    compliance = result["compliance"]
    assert compliance.pop("audit") == dict.fromkeys(CHECKS, True)
    assert compliance.pop("verified") == {"size": True, "score": True}
    assert set(compliance.values()) == {True}


def test_readme_has_the_usual_parts_and_the_logs_numbers():
    text = (made(*three(), options=("--title", "Deep")) / "README.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# Record: Deep — val_bpb 1.0620 (3-seed mean)"
    assert lines[2].startswith(f"**val_bpb: 1.06200** (3-seed mean, std {STD:.5f}) | **1,")
    titles = "Results,Architecture,Run Command,Requirements,Compliance,Included Files,Credits"
    assert re.findall(r"^## (.*)$", text, re.M) == titles.split(",")
    row = "| 1234 | 4,500 | 131.33 | 1.05000 | 1.0700 | 1.06500 | 1,084 | 599.9 | 598.0 |"
    assert row.replace("1,084", f"{1000 + len(SOURCE):,}") in lines
    assert f"| **Mean** | 4,500.0 | 131.33 | 1.05000 | 1.0700 | {MEAN:.5f} |" in text
    assert f"{STD:.5f} | 0.0 | 0.0 | 0.0 |" in text
    assert "| parameters | `33,985,333` |" in lines
    assert text.count(folder.FILL_IN) == 2
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py" in text


def test_the_run_command_sets_what_differs_from_the_source():
    text = (made(*three()) / "README.md").read_text()
    block = re.search(r"```bash\n(.*?)```", text, re.S)[1]
    words = shlex.split(block.replace("\\\n", " "))
    assert [word for word in words if "=" in word and not word.startswith("--")] == [
        "WIDTH=9",
        "TTT=lora",
        "LAYOUT=G S=2",
        "SEED=$SEED",
    ]


def test_the_command_of_a_real_log_gives_its_settings(monkeypatch):
    """What its source makes of the command is what the log says of the run."""
    log = ROOT / "logs" / "demo.txt"
    monkeypatch.setattr(record, "ROOT", ROOT)
    path = made(str(log))
    text = (path / "README.md").read_text()
    block = re.search(r"```bash\n(.*?)```", text, re.S)[1].replace("$SEED", "1337")
    env = dict(
        word.split("=", 1) for word in shlex.split(block.replace("\\\n", " ")) if "=" in word
    )
    hp = in_process.load(path / "train_gpt.py", "logged").Hyperparameters.from_env(env)
    logged = record.read_run(log).settings
    names = set(logged) - {"run_id", "preset", "system"}
    assert {name: str(getattr(hp, name)) for name in names} == {
        name: logged[name] for name in names
    }
    assert (path / "train_seed1337.log").read_bytes() == log.read_bytes()
    ast.parse((path / "train_gpt.py").read_text())
    figures = record.read_run(log).figures
    assert (path / "train_gpt.py").stat().st_size == figures["bytes_code"]
    assert path.parent.name == "track_non_record_16mb"


SYSTEM = "import parts\nimport train_gpt\nclass Hyperparameters:\n    width: int = bounded(9, 1)\n"
PARTS = "import math\n"


def test_a_system_brings_what_it_imports():
    Path("systems").mkdir()
    for name, source in (("toy", SYSTEM), ("parts", PARTS), ("other", "x = 1\n")):
        Path("systems", f"{name}.py").write_text(source)
    size = len(SOURCE + SYSTEM + PARTS)
    sizes = {"system": "toy", "bytes_code": size, "bytes_total": size + 1000}
    path = made(write_log(figures=sizes, sources=(SOURCE, PARTS, SYSTEM)))
    assert (path / "systems" / "toy.py").read_text() == SYSTEM
    assert (path / "systems" / "parts.py").read_text() == PARTS
    assert not (path / "systems" / "other.py").exists()
    text = (path / "README.md").read_text()
    assert "nproc_per_node=8 systems/toy.py" in text and "WIDTH" not in text
    Path("systems/parts.py").unlink()
    again = write_log(7, sizes, sources=(SOURCE, PARTS, SYSTEM))
    assert "2 sources beside train_gpt.py, expected 1 of systems/ (toy)" in refused(again)


def test_the_sources_are_the_logs_and_a_change_is_said(capsys):
    Path("train_gpt.py").write_text("changed\n")
    path = made(*three())
    assert (path / "train_gpt.py").read_text() == SOURCE
    expected = "warning: train_gpt.py: as they ran, from the log; no longer those of"
    assert expected in capsys.readouterr().err


def test_fewer_than_three_seeds_are_said(capsys):
    text = (made(write_log()) / "README.md").read_text()
    assert "(one seed)" in text and "Mean" not in text
    assert "1 of the 3 seeds" in capsys.readouterr().err


def test_a_run_that_follows_others_in_its_log_is_told(capsys):
    first = Path(write_log(7)).read_text()
    path = Path(write_log(42))
    path.write_text(f"{first}\n{LINE}{path.read_text()}")
    made_of = made(str(path))
    assert "run 2 of the 2 that its log held" in (made_of / "README.md").read_text()
    kept = (made_of / "train_seed42.log").read_text()
    assert kept.startswith(SOURCE) and kept.count('"seed": 7') == 0
    assert kept.endswith(path.read_text().splitlines()[-1] + "\n")


def test_own_text_is_no_record(monkeypatch):
    monkeypatch.setenv("AUTHOR", "Ada")
    own = {"official": False, "documents": 35, "bytes": 192_472, "hardware": "1xCPU"}
    path = made(*[write_log(seed, own) for seed in BPB], options=("--title", "Small"))
    assert path.parent.name == "track_non_record_16mb"
    result = json.loads((path / "submission.json").read_text())
    assert {result[name] for name in ("val_bpb", "val_loss", "val_bpb_std")} == {None}
    assert result["own_text"]["val_bpb"] == pytest.approx(MEAN)
    assert result["author"] == "Ada" and "own text" in result["name"]
    assert "seed_results" not in result
    assert result["compliance"]["full_validation_split"] is False
    text = (path / "README.md").read_text()
    assert text.startswith("# Non-record: Small — own text, no val_bpb of the competition\n")
    assert "35 documents of 192,472 bytes" in text and "val_bpb: 1.06" not in text
    assert "\npython train_gpt.py" in text or "SEED=$SEED python train_gpt.py" in text


def test_a_comparison_stands_in_the_readme():
    path = made(*three(), options=("--against", "1.081"))
    text = (path / "README.md").read_text()
    assert "## Significance" in text and "of a byte: yes: bpb lower by more than 0.00721" in text


def test_an_artifact_that_a_later_seed_has_overwritten_is_no_matter():
    """All seeds write to one name; what is verified is told by its sha256."""
    Path("model.ptz").write_bytes(bytes(77))
    assert made(*three()).is_dir()


# -----------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    "figures, expected",
    [
        ({"wallclock_seconds": 600.1}, "wallclock_seconds 600.1, a record has 600"),
        ({"eval_time_seconds": 601}, "eval_time_seconds 601, a record has 600"),
        ({"resumed": True}, "a resumed run, a record is trained in one go"),
        ({"hardware": "8xNVIDIA H200"}, "ran on 8xNVIDIA H200, a record on 8xH100"),
        ({"hardware": "4xH100"}, "ran on 4xH100, a record on 8xH100"),
    ],
)
def test_what_is_no_record_is_refused_or_goes_to_the_other_track(figures, expected):
    log = write_log(figures=figures)
    reason = refused(log)
    assert f"{log}: {expected}" in reason
    assert "give --track non_record_16mb" in reason
    path = made(log, options=("--track", "non_record_16mb"))
    assert path.parent.name == "track_non_record_16mb"
    assert json.loads((path / "submission.json").read_text())["val_bpb"] == BPB[42]
    assert (path / "README.md").read_text().startswith("# Non-record: ")


def test_own_text_is_refused_for_the_record_track():
    log = write_log(figures={"official": False, "documents": 35})
    reason = refused(log, options=("--track", "10min_16mb"))
    assert "scored 35 documents, 151080000 bytes, not the official split" in reason


@pytest.mark.parametrize("track", ["10min_16mb", "non_record_16mb"])
def test_the_cap_holds_in_both_tracks(track):
    log = write_log(figures={"bytes_total": 16_000_001})
    assert "16000001 bytes, the cap is 16000000" in refused(log, options=("--track", track))


def test_a_count_of_code_that_is_not_its_size_is_refused():
    log = write_log(figures={"bytes_code": 10})
    assert f"its sources are {len(SOURCE)} bytes, 10 were counted" in refused(log)


def test_what_is_not_verified_is_refused():
    log = write_log(verify=False)
    assert f"{log}: not verified: logs/seed42.verify.txt: No such file" in refused(log)
    beside = Path(log).with_suffix(".verify.txt")
    beside.write_text("verify: size passed 1\nverify: score FAILED 1\nverify: 2 checks, 1 FAILED\n")
    assert "failed: score" in refused(log)
    beside.write_text(f"verify: size passed 1 bytes; sha256 {'1' * 64}\nverify: all 1 passed\n")
    assert "of the artifact with sha256 111" in refused(log)
    beside.write_text("verify: size passed 1\nverify: all 1 passed\n")
    assert f"{beside}: names no artifact of {log}" in refused(log)


def test_a_failed_audit_is_refused():
    checks = CHECKS | {"once": {"passed": False}}
    assert "failed in its audit: once" in refused(write_log(figures={"checks": checks}))


def test_seeds_of_two_configurations_are_refused():
    log = write_log(0)
    other = f"{log}: not of one configuration with logs/seed42.txt: "
    first = write_log(42, settings={"width": "10"})
    assert f"{other}width is '9' not '10'" in refused(first, log)
    first = write_log(42, settings={"extra": "1"})
    assert f"{other}extra is None not '1'" in refused(first, log)
    first = write_log(42, {"pytorch_version": "2.10.0"})
    assert f"{other}pytorch_version is '{RUN['pytorch_version']}' not '2.10.0'" in refused(
        first, log
    )
    changed = SOURCE.replace("hello", "world")
    first = write_log(42, sources=(changed,))
    assert f"{other}its sources are others" in refused(first, log)


def test_names_of_files_may_differ():
    paths = {"artifact": "other.ptz", "scores": "x.npz", "data_path": "d", "tokenizer_path": "t"}
    assert made(write_log(0), write_log(42, settings=paths)).is_dir()


def test_a_seed_twice_is_refused():
    reason = refused(write_log(42), write_log(42, name="again"))
    assert "logs/seed42.txt, logs/again.txt: seed 42 in each: give one" in reason


def test_all_that_is_wrong_is_said_at_once():
    logs = [write_log(42, {"wallclock_seconds": 700}), write_log(42, name="b", verify=False)]
    logs += [write_log(0, {"bytes_total": 17_000_000}), "logs/none.txt"]
    Path("requirements.txt").unlink()
    options = ("--slug", "a/b", "--date", "today", "--against", "none.log")
    reason = refused(*logs, options=options)
    assert "requirements.txt: No such file" in reason and "none.log: No such file" in reason
    for part in (
        "700",
        "not verified",
        "17000000",
        "logs/none.txt: No such file",
        "seed 42 in each",
    ):
        assert part in reason
    assert "--slug 'a/b': expected" in reason and "--date 'today': expected YYYY-MM-DD" in reason
    assert len(reason.splitlines()) >= 7


def test_a_folder_is_never_overwritten():
    log, options = write_log(), ("--date", "2026-04-30", "--slug", "x")
    path = Path("records/track_10min_16mb/2026-04-30_x")
    path.mkdir(parents=True)
    assert f"{path}: exists, and is never overwritten" in refused(log, options=options)
    (path / "README.md").write_text("mine")
    refused(log, options=options)
    assert (path / "README.md").read_text() == "mine"


def test_a_folder_appears_whole_or_not_at_all(monkeypatch):
    log = write_log()
    calls = []

    def full(*arguments, **_):
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    Path("records/track_10min_16mb").mkdir(parents=True)
    monkeypatch.setattr(os, "rename", full)
    assert "cannot be written: No space left on device: give another --output" in refused(log)
    assert calls


def test_lines_go_to_stderr_with_exit_status_1():
    log = write_log(verify=False)
    command = [sys.executable, "-S", test_record.TOOL, "folder", log, "--slug", "/"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 2
