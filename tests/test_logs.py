"""tools/logs.py: the runs in a log, and which of them is taken."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import logs  # noqa: E402  (the path comes first)

RULE = "\n" + "=" * 100 + "\n"


def run(*lines: str, sources=("import math\n",), versions="Running Python 3.11\n| ==== |") -> str:
    """What a run writes into an empty log."""
    return RULE.join([*sources, versions, "".join(f"{line}\n" for line in lines)])


def figures(**values) -> str:
    return f"figures: {json.dumps(values)}"


TRAINED = run("  seed: 1", figures(step_stop=9, checks={}))
SCORED = run("  seed: 2", figures(checks={}), sources=("a", "b"))
KILLED = run("  seed: 3", "step:2/9 train_loss:6")


def read(path: Path, *texts: str) -> list[logs.Run]:
    path.write_text(RULE.join(texts))
    return logs.read_runs(path)


def test_runs_are_told_apart(tmp_path):
    found = read(tmp_path / "log.txt", TRAINED, SCORED, KILLED)
    assert [[source.strip() for source in run.sources] for run in found] == [
        ["import math"],
        ["a", "b"],
        ["import math"],
    ]
    assert [run.settings for run in found] == [{"seed": "1"}, {"seed": "2"}, {"seed": "3"}]
    assert [run.figures for run in found] == [{"step_stop": 9, "checks": {}}, {"checks": {}}, None]
    assert all(run.versions.strip().endswith("| ==== |") for run in found)
    assert [run.trained for run in found] == [True, False, False]


@pytest.mark.parametrize(
    "texts, number",
    [
        ([TRAINED], 1),
        ([TRAINED, SCORED], 1),
        ([TRAINED, KILLED], 1),
        ([TRAINED, TRAINED], 2),
        ([SCORED, KILLED], 1),
        ([KILLED, SCORED], 2),
        ([KILLED, KILLED], 2),
        ([KILLED, TRAINED, SCORED, KILLED], 2),
        ([TRAINED, "import ma"], 1),
        ([TRAINED, TRAINED[: TRAINED.index("Running") + 9]], 1),
        ([TRAINED, TRAINED[:-2]], 1),
    ],
)
def test_the_last_finished_training_is_taken(tmp_path, texts, number):
    found = read(tmp_path / "log.txt", *texts)
    taken, note = logs.choose(tmp_path / "log.txt", found)
    assert taken is found[number - 1]
    assert bool(note) == (number < len(found))
    assert not note or f"log.txt: takes run {number} of {len(found)}, the last that " in note


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty, expected the log of a run"),
        (b"\n \n", "empty, expected the log of a run"),
        (bytes(range(256)) * 9, "no log of a run: expected a line `Running Python ...`"),
        (b"usage: other [-h]\n" + RULE.encode(), "no log of a run"),
        (run(figures(seed="x")).encode(), "its figure seed is 'x': no log of this program"),
        (run(figures(checks=dict(size=1))).encode(), "its check size is 1: no log of this"),
    ],
)
def test_what_is_no_log_is_one_line(tmp_path, content, message):
    (tmp_path / "log.txt").write_bytes(content)
    with pytest.raises(ValueError) as error:
        logs.read_runs(tmp_path / "log.txt")
    assert str(error.value).startswith(f"{tmp_path / 'log.txt'}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line", ["", "{}", "figures: 3", "figures: {", "figures: [1]", 'figures: {"val_bpb": NaN}']
)
def test_a_last_line_that_is_no_figures(line):
    assert logs.as_figures(line) is None


def test_garbage_in_the_lines_of_a_run_is_no_matter(tmp_path):
    (tmp_path / "log.txt").write_bytes(
        run("\0\x1b[31m").encode() + b"\xff\xfe\n" + figures().encode()
    )
    (taken,) = logs.read_runs(tmp_path / "log.txt")
    assert taken.figures == {}


@pytest.mark.parametrize(
    "lines, resumed",
    [([figures()], False), ([figures(resumed=True)], True), (["resumed: a.pt", figures()], True)],
)
def test_a_resumed_run_says_so(tmp_path, lines, resumed):
    assert read(tmp_path / "log.txt", run(*lines))[0].resumed is resumed
