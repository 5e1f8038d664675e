"""tools/faults.py: no faults in the program, and faults where it is broken on purpose."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAULTS = str(ROOT / "tools" / "faults.py")

BROKEN = """
import os, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import faults
from faults import resumable, t

def in_place(path, *more, call=t.save_artifact):
    open(path, "wb").close()
    time.sleep(2)
    return call(path, *more)

def without_average(keeper, state, model, optimizer, average, *more, call=resumable.Keeper.restore):
    return call(keeper, state, model, optimizer, [a.clone() for a in average], *more)

def deaf(keeper):
    for number in resumable.SIGNALS:
        signal.signal(number, signal.SIG_DFL)

def with_a_child(keeper):
    if not os.fork():
        time.sleep(600)

def wrong(keeper):
    return "RESUME=auto starts anew"

scene, Keeper = faults.Scene(faults.Path.cwd() / "scene"), resumable.Keeper
for owner, name, bug, stage, number, share in (
    (t, "save_artifact", in_place, "pack", signal.SIGKILL, 5.0),
    (Keeper, "restore", without_average, "hessians", signal.SIGKILL, 0.0),
    (Keeper, "catch_signals", deaf, "train", signal.SIGTERM, 0.3),
    (Keeper, "catch_signals", with_a_child, "train", signal.SIGTERM, 0.3),
    (Keeper, "what_next", wrong, "score", signal.SIGTERM, 0.3),
):
    right = getattr(owner, name)
    setattr(owner, name, bug)
    print(bug.__name__, scene.kill(stage, number, share).faults, flush=True)
    setattr(owner, name, right)
"""


def test_the_program_has_none(record_property):
    result = subprocess.run(
        [sys.executable, FAULTS, "--moments", "1"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    rows = [line.split() for line in lines[1 : lines.index("")]]
    stages = "train hessians quantize pack score prepare".split()
    assert [row[:3] for row in rows] == [
        [stage, kind, "1"] for stage in stages for kind in ("SIGKILL", "SIGTERM")
    ]
    assert all(row[-2:] == ["1", "0"] for row in rows) and lines[-1] == "faults: 0"
    record_property("summary", f"killed at {len(rows)} random moments: no faults")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, str]:
    """What it says of each bug, by its name."""
    result = subprocess.run(
        [sys.executable, "-c", BROKEN, str(ROOT / "tools")],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("broken"),
    )
    assert result.returncode == 0, result.stderr
    return dict(re.findall(r"^(\w+) (.*)$", result.stdout, re.M))


@pytest.mark.parametrize(
    "bug, fault",
    [
        ("in_place", "model.ptz is neither the older nor the new one"),
        ("without_average", "resumed: another model.ptz"),
        ("deaf", "exit status -15"),
        ("with_a_child", "a process is left"),
        ("wrong", "went on from trained"),
    ],
)
def test_a_bug_is_a_fault(seen, bug, fault):
    assert fault in seen[bug]


def test_a_stage_that_is_none_is_refused():
    sys.path.insert(0, str(ROOT / "tools"))
    import faults

    with pytest.raises(SystemExit, match="2"):
        faults.main(["--stages", "train,cook"])
