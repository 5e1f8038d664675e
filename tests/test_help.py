"""HELP=1 ./run.sh: what it prints is what the program has, which here is imported."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

import train_gpt

sys.path.append(str(ROOT / "tools"))
import help as help_page  # noqa: E402  (the path comes first)
import variables  # noqa: E402

MODULES = {path.stem: path.stem for path in (ROOT / "systems").glob("*.py")}
MODULES = {"record": "train_gpt"} | {
    k: v for k, v in MODULES.items() if k not in ("parts", "layers", "layouts")
}
CASES = [(system, preset) for system in sorted(MODULES) for preset in ("record", "demo")]
# of a shell, of launchers, or put into the environment by run.sh itself
# of the shell, of torchrun and of libraries
NOT_SETTINGS = {"BASH_VERSION", "HOME", "SECONDS", "TMPDIR", "MPLCONFIGDIR"}
NOT_SETTINGS |= {"LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"}


def class_of(system: str) -> type:
    return importlib.import_module(MODULES[system]).Hyperparameters


def page(width: int = 100, **env: str) -> list[str]:
    return list(help_page.page(env, width))


def page_of(system: str, preset: str, width: int = 100) -> list[str]:
    named = {} if system == "record" else dict(SYSTEM=system)
    return page(width, PRESET=preset, **named)


def defaults(lines: list[str]) -> dict[str, str]:
    """Of the page, by name, as a shell reads them; the first of a name is the hyperparameter's."""
    words = [line.strip() for line in lines if re.match(r"  [A-Z][A-Z_0-9]*=", line)]
    pairs = [shlex.split(line)[0].split("=", 1) for line in words]
    return {name: value for name, value in reversed(pairs)}


@pytest.mark.parametrize("system, preset", CASES)
def test_every_field_is_there_with_its_default(system, preset):
    hp = class_of(system).from_env(dict(PRESET=preset, RUN_ID="<anew>"))
    found = defaults(page_of(system, preset))
    for f in fields(hp):
        text = found[f.name.upper()]
        value = {"0": False, "1": True}[text] if f.type is bool else f.type(text)
        assert value == getattr(hp, f.name), f.name
    others = {variable.name for variable in variables.OTHERS}
    assert found.keys() == {f.name.upper() for f in fields(hp)} | others


@pytest.mark.parametrize("system", sorted(MODULES))
def test_what_is_expected_is_what_a_refusal_says(system):
    hp = class_of(system)()
    found = {v.name: v.expected for v in variables.hyperparameters(variables.systems()[system])}
    for f in fields(hp):
        if f.type is str:
            assert found[f.name.upper()] == "text"
        elif f.type is bool:
            with pytest.raises(train_gpt.Refused, match=found[f.name.upper()]):
                type(hp).from_env({f.name.upper(): "yes"})
        else:
            setattr(hp, f.name, f.type(-1))
            with pytest.raises(train_gpt.Refused) as error:
                hp.check_bounds(f)
            said = str(error.value).partition(": expected ")[2]
            assert found[f.name.upper()] == f"{f.type.__name__}, {said}"


def test_the_meaning_is_the_comment_and_what_the_rules_say():
    found = {v.name: v for v in variables.hyperparameters(variables.systems()["transformer"])}
    source = (ROOT / "train_gpt.py").read_text("utf-8")
    for name in ("train_batch_tokens", "rope_dims", "ema_decay", "eval_rows"):
        comment = re.search(rf"^    {name}: .*?  # (.*)$", source, re.M)[1]
        assert found[name.upper()].meaning.startswith(comment)
    assert found["NUM_KV_HEADS"].meaning.endswith("expected to divide NUM_HEADS")
    assert "expected one of ('', 'lora')" in found["TTT"].meaning
    assert "expected more than one pass" in found["LAYOUT"].meaning  # the system's own rule
    groups = {name: found[name].group for name in ("SEED", "MATRIX_LR", "TTT_LORA_LR", "TTT_LR")}
    expected = dict(SEED="run", MATRIX_LR="optimizer", TTT_LORA_LR="test-time training")
    assert groups == expected | dict(TTT_LR="only transformer")


def test_a_rule_is_that_of_the_method_which_is_called():
    """The transformer reads layouts in its own way; a rule that it adds to is still one."""
    plain = "expected GSA with counts"
    for system, has in dict(record=True, kv_share=True, transformer=False, crawler=False).items():
        found = {v.name: v for v in variables.hyperparameters(variables.systems()[system])}
        assert (plain in found["LAYOUT"].meaning) == has
        assert found["EVAL_MODE"].meaning.endswith("expected sliding or stream")


def test_a_system_that_is_new_is_read(tmp_path):
    """Constants and functions of its file, and a field that it redefines without a comment."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import torch\nimport train_gpt\nfrom train_gpt import bounded\nSIZE = 3\n\n"
        "def at_least_one(x):\n    return bounded(x, 1)\n\n"
        "@dataclass\nclass Hyperparameters(train_gpt.Hyperparameters):\n"
        "    system = 'mine'\n    ema_decay: float = 0.5\n"
        "    taps: int = at_least_one(SIZE)  # of the mixer\n"
    )
    found = {v.name: v for v in variables.hyperparameters(script)}
    assert found["TAPS"][1:] == ("3", "int, 1 or more", "of the mixer", "only mine")
    assert found["EMA_DECAY"].default == "0.5" and "average" in found["EMA_DECAY"].meaning
    script.write_text(script.read_text().replace("SIZE = 3", ""))
    variables.namespace_of.cache_clear(), variables.source_of.cache_clear()
    with pytest.raises(ValueError, match="mine.py: its fields cannot be read: NameError: "):
        variables.hyperparameters(script)


@pytest.mark.parametrize("width", [100, 80])
@pytest.mark.parametrize("system", sorted(MODULES))
def test_the_page_fits_the_terminal(system, width):
    lines = page_of(system, "record", width)
    assert max(map(len, lines)) <= width and lines == [line.rstrip() for line in lines]
    assert not set("".join(lines)) - set(map(chr, range(32, 127)))


def test_what_other_files_read_is_on_the_page():
    shell = [ROOT / "run.sh", *(ROOT / "tools").glob("*.sh")]
    read = re.findall(r"\$\{([A-Z][A-Z_0-9]+):?-", "".join(p.read_text("utf-8") for p in shell))
    started = ("settings", "check", "resumable", "ranks", "verify", "record", "summary")
    tools = [ROOT / "tools" / f"{name}.py" for name in started] + [ROOT / "data" / "prepare.py"]
    pattern = r"""env(?:iron)?(?:\.get\(|\[)["']([A-Z][A-Z_0-9]+)["']"""
    read += re.findall(pattern, "".join(path.read_text("utf-8") for path in tools))
    assert {"VENV", "NPROC", "MATCHED_FINEWEB_REPO_ID"} <= {*read}
    assert {*read} - NOT_SETTINGS <= defaults(page()).keys()


@pytest.mark.parametrize(
    "env, message",
    [
        (dict(SYSTEM="nosuch"), "run.sh: SYSTEM='nosuch': expected one of baseline, crawler, "),
        (dict(PRESET="nosuch"), "expected one of record, demo"),
    ],
    ids=str,
)
def test_a_system_or_preset_that_is_none_gives_one_line(env, message, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", env)
    line = help_page.main()
    assert message in line and "\n" not in line and capsys.readouterr() == ("", "")


def test_it_needs_neither_an_installation_nor_a_library(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    python.chmod(0o755)
    env = dict(PATH=os.environ["PATH"], HELP="1", VENV=str(tmp_path / "venv"), PYTHON=str(python))
    options = dict(capture_output=True, text=True, timeout=60)
    said = subprocess.run([str(ROOT / "run.sh")], env=env | dict(SYSTEM="crawler"), **options)
    assert (said.returncode, said.stderr) == (0, "")
    assert "  LOOP_BITS=8 " in said.stdout and os.listdir(tmp_path) == ["python"]
    said = subprocess.run([str(ROOT / "run.sh")], env=env | dict(PYTHON="/nonexistent"), **options)
    assert said.returncode == 1 and "no program /nonexistent" in said.stderr and not said.stdout


def test_every_hyperparameter_has_a_meaning_in_one_place():
    """The comment behind it or, if it has none, a line of MEANINGS."""
    commented = {}
    for script in variables.systems().values():
        commented |= variables.comments_of(script)[0]
        for variable in variables.hyperparameters(script):
            assert variable.meaning and not variable.meaning.startswith("expected"), variable
    assert commented.keys().isdisjoint(variables.MEANINGS)
