"""tools/seeds.sh: a run of each seed, then a record's folder of all. ./run.sh and tools/record.py
are replaced by ones that take no time; both are tested elsewhere."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

RUN = """#!/usr/bin/env bash
echo "$SEED $RUN_ID $ARTIFACT ${MATRIX_LR:-}" >>runs
[ "$SEED" != "${BROKEN:-}" ] || exit 3
echo "verify: all 14 passed" >"logs/$RUN_ID.verify.txt"
"""
RECORD = """
import sys
print(sys.argv[1:], file=open("calls", "a"))
print("records/a folder" if sys.argv[1] == "folder" else "a question")
sys.exit(sys.argv[1] == "check")
"""


@pytest.fixture
def folder(tmp_path):
    for name, text in {"run.sh": RUN, "tools/record.py": RECORD}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "run.sh").chmod(0o755)
    (tmp_path / "logs").mkdir()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    shutil.copy(ROOT / "tools" / "seeds.sh", tmp_path / "tools")
    return tmp_path


def seeds(folder, *arguments, **env) -> subprocess.CompletedProcess:
    env = dict(PATH=os.environ["PATH"], VENV="venv") | env
    command = [folder / "tools" / "seeds.sh", *arguments]
    return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)


def test_each_seed_is_run_and_all_are_one_folder(folder):
    result = seeds(folder, "7 0", "--title", "two words", MATRIX_LR="0.1")
    assert result.returncode == 0, result.stderr
    expected = [f"{n} train_seed{n} train_seed{n}.int6.ptz 0.1" for n in (7, 0)]
    assert (folder / "runs").read_text().splitlines() == expected
    made, checked = (folder / "calls").read_text().splitlines()
    logs = ["logs/train_seed7.txt", "logs/train_seed0.txt"]
    assert made == str(["folder", *logs, "--title", "two words"])
    assert checked == str(["check", "records/a folder"])
    assert "a question" in result.stdout and "is complete" in result.stdout


def test_after_a_stop_only_what_is_missing_is_run(folder):
    assert seeds(folder, "1 2 3", BROKEN="2").returncode == 3
    assert not (folder / "calls").exists()
    assert seeds(folder, "1 2 3").returncode == 0
    assert [line.split()[0] for line in (folder / "runs").read_text().splitlines()] == list("1223")


@pytest.mark.parametrize("arguments", [[], ["--title", "x"], ["1,2"], [""]], ids=str)
def test_without_seeds_it_says_how_it_is_called(folder, arguments):
    result = seeds(folder, *arguments)
    assert result.returncode == 2 and "; found seeds '" in result.stderr
    assert not (folder / "runs").exists()
