"""All tools: they find what they import wherever Python looks for it."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = [ROOT / "tools", ROOT, ROOT / "systems"]
# floor.py pretends to have a GPU, before torch is there
TOOLS = [path for path in sorted(FOLDERS[0].glob("*.py")) if path.stem != "floor"]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_a_tool_finds_its_neighbours(tool, monkeypatch):
    """PYTHONSAFEPATH=1: the folder of a script is no place to import from."""
    for path in TOOLS:
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    kept = [path for path in sys.path if Path(path).resolve() not in FOLDERS]
    monkeypatch.setattr(sys, "path", kept)
    found = runpy.run_path(str(tool), run_name="imported")
    assert ("main" in found) is ('__name__ == "__main__"' in tool.read_text("utf-8"))


def test_a_tool_starts_in_any_folder_and_locale(tmp_path):
    folder = tmp_path / "with a space"
    folder.mkdir()
    command = [sys.executable, "-S", str(ROOT / "tools" / "record.py"), "l\u00f6g.txt"]
    env = os.environ | dict(PYTHONSAFEPATH="1", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=60)
    assert result.returncode == 1 and result.stderr.count(b"\n") == 1
    assert b"No such file or directory" in result.stderr
