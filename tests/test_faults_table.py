"""The tables of docs/troubleshooting.md are what the programs print.

A message stands in a table as a user reads it, with <what depends on the case>. The words between
must be those of the program, and the test of the row must look for some of them.
"""

import ast
import importlib
import os
import re
from dataclasses import fields
from functools import cache
from itertools import pairwise

import pytest
from conftest import ROOT
from toys import SYSTEMS

TESTS, GUIDE = ROOT / "tests", ROOT / "docs" / "troubleshooting.md"
LAUNCHING = [f"tools/{name}.py" for name in ("lock", "settings", "help", "variables", "misnamed")]
PROGRAMS = {  # where the lines of each come from
    "train_gpt.py": ["train_gpt.py", "systems/*.py"],
    "prepare.py": ["data/prepare.py"],
    "verify.py": ["tools/verify.py", "tools/dataset.py", "tools/logs.py"],
    "record.py": [f"tools/{name}.py" for name in "record logs folder compare dialects".split()],
    "packed.py": ["tools/packed.py"],
    "ranks.py": ["tools/ranks.py"],
    "repack.py": ["tools/repack.py", "tools/packed.py"],
    "resumable.py": ["tools/resumable.py", "tools/packed.py"],
    "run.sh": ["run.sh", "tools/*.sh", *LAUNCHING, "train_gpt.py", "tools/dataset.py"],
    "seeds.sh": ["tools/seeds.sh"],
    "summary.py": ["tools/summary.py", "tools/logs.py"],
    "check.py": ["tools/check.py", "train_gpt.py", "tools/dataset.py"],
}
FOREIGN = {  # of torch, NCCL, pip and Python
    "CUDA out of memory",
    "NCCL error",
    "No matching distribution found for torch==2.13.0",
    "ModuleNotFoundError: No module named 'torch'",
}
# a message with one of these says itself what to do
ADVICE = re.compile(
    r"expected|needs?\b|\b(give|set|run|call|wait|delete|free|start|ask|name|install|check|mount|see"
    r"|verify|make|take|goes on|starts anew|larger|newer|smaller)\b|usage:"
)
STATUSES = {"0", "1", "2", "128 + number"}
HOLE = "\0"  # in place of what depends on the case


@cache
def rows() -> list[tuple[str, ...]]:
    """program, what is wrong, message, what to do, exit status, what is on disk, test; of all
    tables of the chapter."""
    _, chapter = GUIDE.read_text("utf-8").split("\n## All messages\n")
    lines = [line[1:-1].strip() for line in chapter.splitlines() if line.startswith("|")]
    cells = [line.replace(r"\|", "\t").split("|") for line in lines]  # \| is no border
    cells = [tuple(cell.replace("\t", "|").strip("` ") for cell in row) for row in cells]
    return [row for row in cells if row[0] != "program" and not row[0].startswith("---")]


def headings() -> list[str]:
    """The messages that head the paragraphs on the likeliest problems."""
    likeliest, _ = GUIDE.read_text("utf-8").split("\n## All messages\n")
    return re.findall("^### `([^`]+)`", likeliest, re.M)


@cache
def variables() -> set[str]:
    modules = [importlib.import_module(name) for name in SYSTEMS]
    return {f.name.upper() for module in modules for f in fields(module.Hyperparameters)}


def texts_of_python(source: str) -> set[str]:
    """Its strings, with a hole for each value that is put in."""

    def text(node) -> str:
        return node.value if isinstance(node, ast.Constant) else HOLE

    tree, texts = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.add("".join(map(text, node.values)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    return texts


def texts_of_shell(source: str) -> set[str]:
    holes = re.sub(r"\$\{[^}]*\}|\$\w+|\$\(.*?\)", HOLE, source)
    return set(re.findall(r'"([^"\n]*)"', holes))


@cache
def pieces(program: str) -> set[str]:
    """What its strings are between two holes."""
    texts = {os.strerror(number) for number in range(1, 133)} | {"[Errno"}  # by Python
    for pattern in PROGRAMS[program]:
        for path in sorted(ROOT.glob(pattern)):
            of_kind = texts_of_python if path.suffix == ".py" else texts_of_shell
            texts |= of_kind(path.read_text("utf-8"))
    parts = (part for text in texts for part in re.split(f"[{HOLE}\n]", text))
    return {plain(part) for part in parts} - {""}


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def is_printed(part: str, program: str, junctions: int = 3) -> bool:
    """Whether it is a piece of the program, or several behind each other."""
    if is_one(part, program):
        return True
    places = (i for i in range(1, len(part)) if junctions and is_one(part[:i].strip(), program))
    return any(is_printed(part[i:].strip(), program, junctions - 1) for i in places)


def is_one(part: str, program: str) -> bool:
    if part.endswith("=") and part[:-1] in variables():
        return True
    return not part.strip(" ,;:'\"/[]()") or part in pieces(program)


def literal(message: str) -> list[str]:
    """What of a message stands in the program: all outside of < >."""
    return [plain(part) for part in re.split("<[^<>]*>", message) if part.strip()]


def source_of_file(test: str) -> str:
    """Of the file that has this test function, FILE::FUNCTION."""
    file, _, name = test.partition("::")
    source = (TESTS / file).read_text("utf-8")
    names = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert names.count(name) == 1, f"{file} has no function {name}"
    return source


def test_there_are_at_least_60_rows_and_none_twice():
    assert len(rows()) >= 60
    assert all(len(row) == 7 and all(row) for row in rows()), [r for r in rows() if len(r) != 7]
    for what in (row[:2] for row in rows()), (row[:3] for row in rows()):
        seen = list(what)
        assert len(seen) == len(set(seen))
    assert {row[0] for row in rows()} <= PROGRAMS.keys()
    assert {row[4] for row in rows()} <= STATUSES


def test_what_to_do_stands_in_the_message_or_beside_it():
    silent = [row[2] for row in rows() if row[3] == "-" and not ADVICE.search(row[2])]
    assert not silent


def test_the_likeliest_problems_are_headed_by_messages_that_are_printed():
    assert len(headings()) >= 10 and set(headings()) >= FOREIGN
    for heading in set(headings()) - FOREIGN:
        parts = literal(heading)
        assert any(all(is_printed(part, name) for part in parts) for name in PROGRAMS), heading


def test_foreign_messages_name_the_torch_that_is_pinned():
    pinned = re.search("^torch==.*", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    assert f"No matching distribution found for {pinned[0]}" in FOREIGN


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]}: {row[1]}")
def test_a_message_of_the_table_is_printed_and_tested(row):
    program, _, message, _, _, _, test = row
    parts = literal(message)
    assert parts and all(is_printed(part, program) for part in parts), [
        part for part in parts if not is_printed(part, program)
    ]
    file = plain(source_of_file(test).replace("\\", ""))  # as a pattern matches it
    assert any(run in file for part in parts for run in runs(part)), parts


def runs(part: str) -> list[str]:
    """Two words in a row, or a name in capitals: what is not found by chance."""
    words = part.split()
    pairs = [" ".join(pair) for pair in pairwise(words)]
    return [x for x in pairs if len(x) > 6] + [x for x in words if x.isupper() and len(x) > 7]
