"""README.md, docs/ and logs/README.md quote what logs/ hold, and tools/evidence.sh makes those."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import evidence  # noqa: E402  (the path comes first)

LOGS, SCRIPT = ROOT / "logs", ROOT / "tools" / "evidence.sh"
QUOTED = [path for path in evidence.texts() if "<!-- evidence: " in path.read_text("utf-8")]
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("path", QUOTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_quoted_is_what_the_logs_say(path):
    """Else: python tools/evidence.py"""
    text = path.read_text("utf-8")
    assert [*evidence.stale(text)] == []
    assert evidence.rewritten(text) == text


def test_each_table_is_quoted_once():
    names = [name for path in QUOTED for name, _ in evidence.BLOCK.findall(path.read_text("utf-8"))]
    assert sorted(names) == sorted(evidence.BLOCKS)


# --------------------------------------------------------------------------------------------------
# The tables, read without evidence.py


def quoted(name: str, path: Path = ROOT / "README.md") -> str:
    text = path.read_text("utf-8")
    return text.partition(f"<!-- evidence: {name} -->\n")[2].partition("<!-- /evidence -->")[0]


def test_the_demo_is_that_of_its_logs():
    said, (measured, forecast) = quoted("demo"), quoted("demo").splitlines()[2:]
    figures = json.loads((LOGS / "demo.txt").read_text("utf-8").rpartition("figures: ")[2])
    for name in "val_bpb", "raw_val_bpb", "pre_quant_val_bpb":
        assert f"{figures[name]:.4f}" in measured
    assert f"| {figures['bytes_total']:,} |" in measured
    assert f"| {figures['step_stop']:,} |" in measured
    verified = re.findall(r"^verify: \w+ passed ", (LOGS / "demo.verify.txt").read_text(), re.M)
    assert f"| {len(verified)} checks passed |" in measured
    assert f"{figures['val_bpb']:.4f}**" in said
    check = (LOGS / "demo.check.txt").read_text("utf-8")
    steps, size = re.findall(r"^ok +forecast: (?:training|bytes) .*", check, re.M)
    assert int(re.findall(r"[\d,]+", forecast)[0].replace(",", "")) == int(steps.split()[3])
    assert f"| {re.search(r'([0-9,]+) bytes', size)[1]} |" in forecast


def test_a_step_takes_what_the_log_says():
    said, log = quoted("floors", ROOT / "docs" / "cuda.md"), (LOGS / "floor.txt").read_text("utf-8")
    bounds = re.findall(r"^lower bound .*?: ([\d.]+) ms .*at most ([\d.]+) GB", log, re.M)
    assert re.findall(r"; ([\d.]+) GB \| ([\d.]+) ms \|$", said, re.M) == [
        (alive, bound) for bound, alive in bounds
    ]


# --------------------------------------------------------------------------------------------------
# What is stale


def test_a_stale_figure_is_named_and_made_good():
    figure = re.findall(r"\*\*(\d\.\d{4})\*\*", quoted("demo"))[0]
    changed = README.replace(f"**{figure}**", "**0.9999**")
    (line,) = evidence.stale(changed)
    assert line.startswith("demo: ") and f"'**0.9999**', by the logs '**{figure}**'" in line
    assert evidence.rewritten(changed) == README


def test_a_row_that_is_missing_is_told():
    last = quoted("demo").splitlines()[-1] + "\n"
    assert [*evidence.stale(README.replace(last, ""))] == ["demo: 3 lines, by the logs 4"]


def test_what_stands_outside_is_nobodys():
    """A line of another log, or without one, is left alone."""
    assert evidence.rewritten("| 1.8137 |\n<!-- a note -->\n") == "| 1.8137 |\n<!-- a note -->\n"


# --------------------------------------------------------------------------------------------------
# How logs are made


def test_each_log_that_is_quoted_says_how_it_was_made():
    text = "".join(path.read_text("utf-8") for path in evidence.texts())
    quoted_logs, known = (
        {*re.findall(r"\blogs/(\w+\.txt)\)", text)},
        {one.log for one in evidence.made()},
    )
    assert quoted_logs and quoted_logs <= known
    assert not [name for name in known if not (LOGS / name).is_file()]


def listed() -> list[tuple[str, str]]:
    """Targets and logs by tools/evidence.sh."""
    shown = subprocess.run([SCRIPT, "--list"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^(\w+) +logs/(\S+)", shown, re.M)


def test_the_list_is_that_of_the_logs():
    said = {(one.target, one.log) for one in evidence.made() if one.target != "-"}
    assert said - {("tests", "tests.txt")} == {*listed()} - {("tests", "tests.txt")}


def test_an_unknown_target_is_refused():
    result = subprocess.run([SCRIPT, "demo", "siez"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(
        "usage: tools/evidence.sh [--list | TARGET...], a TARGET: demo "
    )


BENCH = """
from types import SimpleNamespace
PUBLISHED = dict(record="33,862,953")

def module_of(name):
    return SimpleNamespace(Hyperparameters=lambda: SimpleNamespace(layout="G5 S"))

if __name__ == "__main__":
    import os, sys
    assert "LAYOUT" not in os.environ
    if sys.argv[1] == "--size":
        print("record  33,985,333  14,482,843  451,178  84,889  {estimate}  93.9%")
    sys.exit({status})
"""
TABLE = "# Sizes\n\n<!-- evidence: sizes -->\n<!-- /evidence -->\n"


@pytest.fixture
def checkout(tmp_path):
    """A repository with the two tools, one log, one table, and a bench.py without torch."""
    for name in "tools", "logs", "docs":
        (tmp_path / name).mkdir()
    for name in "evidence.py", "evidence.sh", "logs.py":
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools")
    (tmp_path / "train_gpt.py").write_text("a program\n")
    (tmp_path / "README.md").write_text(TABLE)
    (tmp_path / "logs" / "README.md").write_text("none\n")
    (tmp_path / "logs" / "bench_cpu.txt").write_text("as it was\n")
    (tmp_path / "logs" / "made.tsv").write_text(
        "log\ttarget\tcommand\tseconds\tday\ttrain_gpt.py\n"
        "bench_cpu.txt\tsize\t`older`\t-\t2026-01-01\t000000000000\n"
        "other.txt\t-\t`another`\t-\t2026-01-01\t000000000000\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def make_size(checkout: Path, **bench):
    (checkout / "tools" / "bench.py").write_text(BENCH.format(**bench))
    env = os.environ | dict(VENV=sys.prefix, LAYOUT="A9", TMPDIR=str(checkout.parent))
    command = [checkout / "tools" / "evidence.sh", "size"]
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)


needs_git = pytest.mark.skipif(not shutil.which("git"), reason="no git")


@needs_git
def test_a_target_makes_its_log_and_the_text_follows(checkout):
    result = make_size(checkout, estimate="15,018,910", status=0)
    assert result.returncode == 0, result.stderr
    assert "15,018,910" in (checkout / "logs" / "bench_cpu.txt").read_text()
    row = "| record | `G5 S` | 33,862,953 | 33,985,333 | 15.02 MB |"
    assert row in (checkout / "README.md").read_text().splitlines()
    lines = (checkout / "logs" / "made.tsv").read_text().splitlines()
    assert len(lines) == 3 and lines[1].startswith("other.txt\t")
    name, target, _, seconds, day, source = lines[2].split("\t")
    assert (name, target) == ("bench_cpu.txt", "size") and seconds.isdigit() and len(day) == 10
    assert source == "8c304c3a2ac9"  # of "a program\n"
    assert not [*checkout.parent.glob("evidence.*")]


@needs_git
def test_a_target_that_fails_leaves_all_as_it_was(checkout):
    result = make_size(checkout, estimate="1", status=1)
    assert result.returncode == 1
    assert result.stderr.endswith("evidence.sh: size failed: logs/ are as they were\n")
    assert (checkout / "logs" / "bench_cpu.txt").read_text() == "as it was\n"
    assert "`older`" in (checkout / "logs" / "made.tsv").read_text()
    assert (checkout / "README.md").read_text() == TABLE


@needs_git
def test_the_tests_see_the_log_that_they_replace(checkout):
    """README quotes it, so that its absence would fail them."""
    (checkout / "README.md").write_text("# None\n")
    (checkout / "logs" / "tests.txt").write_text("1 passed in 1.00s\n")
    (checkout / "run.sh").write_text("#!/bin/sh\ncat logs/tests.txt && echo 2 passed in 2.00s\n")
    (checkout / "run.sh").chmod(0o755)
    env = os.environ | dict(VENV=sys.prefix, TMPDIR=str(checkout.parent))
    command = [checkout / "tools" / "evidence.sh", "tests"]
    result = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (checkout / "logs" / "tests.txt").read_text() == "2 passed in 2.00s\n"


def evidence_py(checkout: Path, *options):
    command = [sys.executable, checkout / "tools" / "evidence.py", *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_log_without_what_is_quoted_is_one_line(checkout):
    (checkout / "README.md").write_text(TABLE.replace("sizes", "floors"))
    missing = evidence_py(checkout)
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1
    assert missing.stderr.endswith("logs/floor.txt: No such file or directory\n")
    (checkout / "README.md").write_text(TABLE.replace("sizes", "demo"))
    (checkout / "logs" / "demo.txt").write_text("nothing\n")
    empty = evidence_py(checkout)
    assert empty.returncode == 1 and empty.stderr.count("\n") == 1
    assert "logs/demo.txt: no log of a run" in empty.stderr
    (checkout / "README.md").write_text(TABLE.replace("sizes", "targets"))
    (checkout / "logs" / "fit.txt").write_text("nothing\n")
    no_rows = evidence_py(checkout)
    assert no_rows.returncode == 1 and no_rows.stderr.count("\n") == 1
    assert "evidence: targets: a table without rows" in no_rows.stderr


def test_check_writes_nothing(checkout):
    (checkout / "tools" / "bench.py").write_text(BENCH.format(estimate="", status=0))
    (checkout / "logs" / "bench_cpu.txt").write_text("record 1 2 3 4 15,000,000 93.9%\n")
    result = evidence_py(checkout, "--check")
    assert result.returncode == 1
    assert result.stdout.startswith("README.md: sizes: 0 lines, by the logs 3\n")
    assert "logs/bench_cpu.txt: of another train_gpt.py than the present one" in result.stdout
    assert (checkout / "README.md").read_text() == TABLE
