"""The museum as a whole: its table, its number of bugs, and the run in which nothing is caught."""

import importlib
import re
from pathlib import Path

from museum import ROOT, as_it_is, sound

HERE = Path(__file__).resolve().parent
MODULES = [importlib.import_module(path.stem) for path in sorted(HERE.glob("test_bugs_*.py"))]
BUGS = [bug for module in MODULES for bug in module.BUGS]
IMPOSSIBLE = {
    "L24": "a run has one seed, set once, and nothing in the counted files compares runs",
    "L25": "no program is started but nvidia-smi: what packs is libraries called in the process",
}


def test_a_run_without_a_bug_passes_every_check():
    checks = sound("train_gpt", None, as_it_is, ()).checks
    assert len(checks) == 7 and all(check["passed"] for check in checks.values())


def test_the_table_lists_every_bug_and_its_catcher():
    museum, *_ = (ROOT / "tests" / "README.md").read_text("utf-8").split("\n# ")
    lines = museum.splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert all(len(row) == 5 and all(row) for row in rows)
    impossible = {id: f"impossible: {reason}" for id, reason in IMPOSSIBLE.items()}
    caught = {bug.id: bug.catcher for bug in BUGS}
    assert {row[0]: row[-1].strip("`") for row in rows} == caught | impossible
    ids = [row[0] for row in rows]
    assert len(ids) == len(BUGS) + len(IMPOSSIBLE)
    assert ids == sorted(ids, key=lambda x: ("BDRTL".index(x[0]), int(re.sub(r"\D", "", x)), x))


def test_what_is_called_impossible_has_no_place_in_the_source():
    files = [ROOT / "train_gpt.py", *sorted((ROOT / "systems").glob("*.py"))]
    source = "".join(path.read_text("utf-8") for path in files)
    # of all numbers, and of those of adapters
    assert sorted(re.findall(r"\w*seed\(.*?\)", source)) == [
        "manual_seed(hp.seed)",
        "manual_seed(self.hp.seed)",
    ]
    assert re.findall(r"subprocess\.\w+\(\S+", source) == ['subprocess.run(["nvidia-smi"],']
    assert not re.search(r"os\.(system|popen|exec|spawn|fork)|multiprocessing|pty\.", source)


def test_the_museum_is_counted(record_property):
    ids = [bug.id for bug in BUGS] + list(IMPOSSIBLE)
    assert len(ids) == len(set(ids))
    record_property(
        "summary",
        f"museum: {len(ids)} bugs, {len(BUGS)} planted and caught, "
        f"{len(IMPOSSIBLE)} impossible by construction",
    )
