"""What the counted files promise of themselves: size, order, and that nothing is dead or hidden."""

import ast
import importlib
import io
import math
import re
import runpy
import statistics
import subprocess
import sys
import tokenize
from dataclasses import fields
from pathlib import Path

import pytest

import train_gpt

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "train_gpt.py"
IN_SYSTEMS = sorted((ROOT / "systems").glob("*.py"))
SYSTEMS = [path for path in IN_SYSTEMS if "\n    system = " in path.read_text()]
COUNTED = [CORE, *IN_SYSTEMS]

each_counted_file = pytest.mark.parametrize("path", COUNTED, ids=lambda path: path.stem)
each_system = pytest.mark.parametrize("path", SYSTEMS, ids=lambda path: path.stem)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def nodes(path: Path, kind) -> list:
    return [node for node in ast.walk(parse(path)) if isinstance(node, kind)]


def tokens(path: Path) -> list[tokenize.TokenInfo]:
    return [*tokenize.generate_tokens(io.StringIO(path.read_text()).readline)]


def length(node) -> int:
    return node.end_lineno - node.lineno + 1


def imported(path: Path) -> set[str]:
    """Names of the top-level modules that a file imports anywhere."""
    found = {alias.name for node in nodes(path, ast.Import) for alias in node.names}
    found |= {"." * node.level + (node.module or "") for node in nodes(path, ast.ImportFrom)}
    return {name.partition(".")[0] for name in found}


def fields_of(path: Path) -> dict:
    """Of the hyperparameters of a system, by name."""
    return {f.name: f for f in fields(importlib.import_module(path.stem).Hyperparameters)}


# -----------------------------------------------------------------------------
# size and form


def test_at_most_1500_lines():
    assert len(CORE.read_text().splitlines()) <= 1500


def test_at_most_85000_bytes():
    assert CORE.stat().st_size <= 85_000


@each_counted_file
def test_lines_of_100_columns_with_one_statement_each(path):
    lines = path.read_text().splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 100]
    operators = {token.string for token in tokens(path) if token.type == tokenize.OP}
    assert ";" not in operators


def test_one_line_in_twenty_has_a_comment():
    comments = [token for token in tokens(CORE) if token.type == tokenize.COMMENT]
    assert len(comments) >= 0.05 * len(CORE.read_text().splitlines())


@pytest.mark.parametrize("path", IN_SYSTEMS, ids=lambda path: path.stem)
def test_a_file_of_systems_has_at_most_200_lines(path):
    assert len(path.read_text().splitlines()) <= 200


def test_banners_are_the_sections_of_the_docstring():
    banners = re.findall(r"^# --- (\d+\. .*) -+$", CORE.read_text(), re.M)
    docstring = " ".join(ast.get_docstring(parse(CORE)).split())
    sections = re.findall(r"\d+\. [^;.]+", docstring.partition("in run order: ")[2])
    assert banners == sections
    assert [int(name.partition(".")[0]) for name in banners] == [*range(1, len(banners) + 1)]


def test_functions_are_short():
    functions = nodes(CORE, ast.FunctionDef)
    assert statistics.median(map(length, functions)) <= 12
    assert [node.name for node in functions if length(node) > 45] == ["train"]
    long = [n.name for path in IN_SYSTEMS for n in nodes(path, ast.FunctionDef) if length(n) > 45]
    assert not long


@each_counted_file
def test_what_is_longer_than_eight_lines_says_what_it_does(path):
    """The two classes of a system are described by its file."""
    described = {"main"} if path == CORE else {"Hyperparameters", "GPT"}
    for node in parse(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and length(node) > 8:
            assert ast.get_docstring(node) or node.name in described, node.name
    assert ast.get_docstring(parse(path))


# -----------------------------------------------------------------------------
# hyperparameters and environment


def read_in(path: Path) -> set[str]:
    """Hyperparameters that a file reads: hp.x, self.hp.x, saved.x, or by names in "x y".split(); in
    its Hyperparameters self.x, but not where they are only validated."""
    found = set()

    def visit(node, owners: set[str]) -> None:
        if isinstance(node, ast.ClassDef) and node.name == "Hyperparameters":
            owners = owners | {"self"}
        if isinstance(node, ast.FunctionDef) and node.name == "validate" and "self" in owners:
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if ast.unparse(node.value) in owners:
                found.add(node.attr)
            if isinstance(node.value, ast.Constant) and node.attr == "split":
                found.update(node.value.value.split())
        for child in ast.iter_child_nodes(node):
            visit(child, owners)

    visit(parse(path), {"hp", "self.hp", "saved"})
    return found


def test_every_hyperparameter_is_read():
    assert fields_of(CORE).keys() - read_in(CORE) == set()


@each_system
def test_every_hyperparameter_of_a_system_is_read_there_or_in_what_it_imports(path):
    read = set.union(*map(read_in, [path, *own_imports(path)]))
    assert fields_of(path).keys() - fields_of(CORE).keys() - read == set()


@each_counted_file
def test_the_environment_is_read_in_two_places(path):
    """The ranks, once; and the hyperparameters, again where an artifact is the base."""
    uses = [node for node in nodes(path, ast.Call) if "os.environ" in map(ast.unparse, node.args)]
    functions = sorted(ast.unparse(node.func).rpartition(".")[2] for node in uses)
    assert functions == (["World", "from_env", "from_env"] if path == CORE else [])
    names = [ast.unparse(node) for node in nodes(path, ast.Attribute | ast.Name)]
    assert len([name for name in names if re.search(r"\benviron|getenv", name)]) == len(uses)


@each_system
def test_a_system_keeps_the_bounds_of_the_fields_it_overrides(path):
    kept = fields_of(path)
    for name, field in fields_of(CORE).items():
        assert (kept[name].type, kept[name].metadata) == (field.type, field.metadata), name


def test_bounds_are_stated_where_they_are_not_zero_and_infinity():
    every = [field for path in [CORE, *SYSTEMS] for field in fields_of(path).values()]
    stated = [field.metadata["bounds"] for field in every if "bounds" in field.metadata]
    assert len(stated) > 100 and (0, math.inf) not in stated
    assert all(field.type in (int, float) for field in every if field.metadata)


@each_system
def test_the_record_is_the_default(path):
    """A preset that is another one is a file of settings, which names the system."""
    for system in CORE, path:
        from_env = importlib.import_module(system.stem).Hyperparameters.from_env
        run = dict(RUN_ID="same")
        assert from_env(run) == from_env(run | dict(PRESET="record"))
    systems = {"record", *(path.stem for path in SYSTEMS)}
    presets = {path.name.split(".")[0] for path in (ROOT / "presets").iterdir()}
    assert train_gpt.Hyperparameters.system == "record" and presets == systems


# -----------------------------------------------------------------------------
# files


def own_imports(path: Path) -> list[Path]:
    """The other files of systems/ that a file imports; they are counted with it."""
    return [other for other in IN_SYSTEMS if other != path and other.stem in imported(path)]


def local_modules() -> set[str]:
    folders = ROOT, ROOT / "systems", ROOT / "tools", ROOT / "data", ROOT / "tests"
    return {path.stem for folder in folders for path in folder.glob("*.py")}


def test_the_record_is_one_file():
    """All that is counted lies in it: it imports neither systems nor tools."""
    assert {"crawler", "verify", "prepare", "conftest"} < local_modules()
    assert not imported(CORE) & (local_modules() | {"", "systems", "tools", "data", "tests"})


@pytest.mark.parametrize("path", IN_SYSTEMS, ids=lambda path: path.stem)
def test_a_system_imports_the_core_torch_numpy_and_the_standard_library(path):
    """And parts that are no system; all of it when it starts, so that it is counted."""
    allowed = {"train_gpt", "torch", "numpy"} | sys.stdlib_module_names
    allowed |= {other.stem for other in own_imports(path) if other not in SYSTEMS}
    assert "train_gpt" in imported(path) and not imported(path) - allowed
    top = [node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(top) == len(nodes(path, ast.Import | ast.ImportFrom))


@each_system
def test_a_system_is_named_as_its_file_and_runs_its_own_classes(path, monkeypatch):
    called = []
    monkeypatch.setattr(train_gpt, "main", lambda *classes: called.extend(classes))
    names = runpy.run_path(str(path), run_name="__main__")
    assert called[:2] == [names["Hyperparameters"], names["GPT"]]
    assert names["Hyperparameters"].system == path.stem
    assert issubclass(names["Hyperparameters"], train_gpt.Hyperparameters)
    assert issubclass(names["GPT"], train_gpt.GPT)


HIDING = set(
    "pickle dill base64 binascii codecs lzma zlib bz2 gzip zipfile marshal ctypes importlib runpy "
    "imp pkgutil zipimport urllib http socket requests".split()
)


@each_counted_file
def test_nothing_is_hidden(path):
    """No code in data, no data in code, nothing that was not there before the run."""
    names = {node.id for node in nodes(path, ast.Name)}
    assert not names & {"exec", "eval", "compile", "__import__", "globals", "locals", "vars"}
    assert not imported(path) & HIDING
    attributes = {ast.unparse(node) for node in nodes(path, ast.Attribute)}
    assert not attributes & {"torch.load", "torch.hub", "np.load", "sys.settrace"}
    keywords = {node.arg for node in nodes(path, ast.keyword)}
    assert "allow_pickle" not in keywords
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    docstrings = {ast.get_docstring(node, clean=False) for node in nodes(path, documented)}
    texts = [node.value for node in nodes(path, ast.Constant)]
    texts = [text for text in texts if isinstance(text, str | bytes) and text not in docstrings]
    assert max(map(len, texts)) <= 200


def test_import_has_no_side_effect(tmp_path):
    names = ", ".join(path.stem for path in COUNTED)
    code = f"""
import sys, threading, torch
before = torch.random.get_rng_state()
import {names}
assert torch.equal(before, torch.random.get_rng_state())
assert threading.active_count() == 1
assert not torch.distributed.is_initialized()
assert "fla" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'systems'}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and not list(tmp_path.iterdir())


def test_versions_are_pinned_once():
    files = "requirements.txt", "tests/requirements.txt"
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    lines = [line.split(";")[0].strip() for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
    names = [line.split("==")[0] for line in lines]
    assert len(names) == len(set(names))
    readme = (ROOT / "README.md").read_text()
    assert not [line for line in lines if line in readme]


TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\((?:\.\./)*(logs/[\w.-]+\.txt)\)")


def quoted_rows(path: Path):
    """(row, logs) of each row of a table that names logs, or whose section does."""
    for section in path.read_text().split("\n#"):
        for row in re.findall(r"^\|.*", section, re.M):
            yield row, LINK.findall(row) or LINK.findall(section)


def test_numbers_of_the_readme_stand_in_the_logs_it_names():
    """Every figure of four or more decimals in a table that names a log is in that log."""
    found = 0
    for row, logs in (pair for path in TEXTS for pair in quoted_rows(path)):
        text = "".join((ROOT / name).read_text() for name in logs)
        for figure in re.findall(r"\d+\.\d{4,}", row) if logs else ():
            assert figure in text, f"{figure} is in no log of: {row}"
            found += 1
    assert found > 0


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_a_log_that_is_named_is_there(path):
    for name in LINK.findall(path.read_text()):
        assert (ROOT / name).is_file(), name
