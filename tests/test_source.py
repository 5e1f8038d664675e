"""What train_gpt.py promises about itself: its size, its order, and that nothing in it is dead or hidden."""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from dataclasses import fields
from pathlib import Path

import train_gpt

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "train_gpt.py").read_text()
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def test_at_most_1500_lines_of_120_columns():
    lines = SOURCE.splitlines()
    assert len(lines) <= 1500
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 120]
    operators = [token.string for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline)
                 if token.type == tokenize.OP]
    assert ";" not in operators  # one statement a line


def test_banners_are_the_sections_of_the_docstring():
    banner = re.compile(r"^# --- (\d+\. .*) -+$", re.M)
    docstring = " ".join(ast.get_docstring(TREE).split())
    assert banner.findall(SOURCE) == re.findall(r"\d+\. [^;.]+", docstring.partition("in run order: ")[2])


def test_functions_are_short():
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in FUNCTIONS)
    assert statistics.median(lengths) <= 12
    assert [node.name for node in FUNCTIONS if node.end_lineno - node.lineno + 1 > 45] == ["train"]


def test_every_hyperparameter_is_read():
    outside = "\n".join(ast.unparse(node) for node in TREE.body
                        if not (isinstance(node, ast.ClassDef) and node.name == "Hyperparameters"))
    outside = re.sub(r"BOUNDS = \{.*?\}|PRESETS: .*?\n", "", outside, flags=re.S)
    read = set(re.findall(r"\bhp\.(\w+)", outside)) | set(re.findall(r"\bsaved\.(\w+)", outside))
    assert {f.name for f in fields(train_gpt.Hyperparameters)} - read == set()


def test_the_environment_is_read_in_two_places():
    reads = [line.strip() for line in SOURCE.splitlines() if "os.environ" in line]
    assert sum("Hyperparameters.from_env(os.environ" in line for line in reads) == 2
    assert {line.split(" =")[0] for line in reads if "from_env" not in line} == {"RANK", "LOCAL_RANK", "WORLD_SIZE"}


def test_nothing_is_hidden():
    names = {node.id for node in ast.walk(TREE) if isinstance(node, ast.Name)}
    modules = {alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names}
    assert not names & {"exec", "eval", "compile", "__import__"}
    assert not modules & {"pickle", "base64", "lzma", "zlib", "marshal", "ctypes"}
    local = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts} - {"train_gpt"}
    assert not modules & local  # all that is counted lies in this file


def test_public_functions_say_what_they_do():
    public = [node for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
              and node.name[0] != "_" and node.end_lineno - node.lineno > 8]
    assert [node.name for node in public if not ast.get_docstring(node)] == ["main"]


def test_import_has_no_side_effect(tmp_path):
    code = ("import sys, threading, torch; before = torch.random.get_rng_state(); import train_gpt;"
            "assert torch.equal(before, torch.random.get_rng_state()); assert threading.active_count() == 1;"
            "assert not torch.distributed.is_initialized(); assert 'fla' not in sys.modules")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and not list(tmp_path.iterdir())


def test_the_record_is_the_default():
    assert train_gpt.PRESETS["record"] == {}
    run = dict(RUN_ID="same")
    assert train_gpt.Hyperparameters.from_env(run) == train_gpt.Hyperparameters.from_env(run | dict(PRESET="record"))


def test_versions_are_pinned_once():
    lines = [line.split(";")[0].strip() for file in ("requirements.txt", "tests/requirements.txt")
             for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
    names = [line.split("==")[0] for line in lines]
    assert len(names) == len(set(names))
    readme = (ROOT / "README.md").read_text()
    assert not [line for line in lines if line in readme]


def test_readme_numbers_stand_in_the_logs_it_names():
    """Every figure of four or more decimals in a table row that names a log is in that log."""
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if "logs/" in line and line.startswith("|")]
    assert rows
    for row in rows:
        text = "".join((ROOT / name).read_text() for name in re.findall(r"logs/[\w.-]+\.txt", row))
        assert text, row
        for figure in re.findall(r"\d+\.\d{4,}", row):
            assert figure in text, f"{figure} is in no log of: {row}"
