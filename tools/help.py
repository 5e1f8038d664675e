"""Prints every environment variable of a run, as HELP=1 ./run.sh does.

    python tools/help.py                                 # of the record
    SYSTEM=crawler PRESET=demo python tools/help.py      # of another system, with other defaults

Hyperparameters by group, each as NAME=default with what it must be and what it means, then the
variables of run.sh and the tools. Needs neither data nor a library, Python 3.11 or newer.
"""

import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH
import settings  # noqa: E402  (the path comes first)
import variables  # noqa: E402

SETTING, EXPECTED = 34, 18  # columns, with the space behind
HEAD = """\
./run.sh         sets up, gets data, trains, quantizes, packs, scores, verifies
./run.sh check   forecasts from a few steps whether a run would end well here
./run.sh test    runs the tests

A setting is an environment variable: MATRIX_LR=0.03 ./run.sh
"""


def about(system: str, script: Path, preset: str) -> str:
    others = [f"SYSTEM={name}" for name in variables.systems() if name not in ("record", system)]
    return (
        f"Settings of system {system} ({script}), with the defaults of PRESET={preset}. "
        "A run without a GPU takes PRESET=demo unless another one is given. "
        f"Other systems: {', '.join(others)}."
    )


def lines_of(variable: variables.Variable, width: int) -> Iterator[str]:
    """NAME=default, what is expected, meaning; the latter wrapped, and below a long setting."""
    setting = f"  {variable.name}={variable.default}"
    indent = SETTING + EXPECTED
    rest = textwrap.wrap(variable.meaning, width - indent, break_long_words=False) or [""]
    first = f"{variable.expected:{EXPECTED - 1}} {rest[0]}".rstrip()
    if len(setting) < SETTING:
        yield f"{setting:{SETTING}}{first}"
    else:
        yield setting
        yield f"{'':{SETTING}}{first}"
    yield from (f"{'':{indent}}{line}" for line in rest[1:])


def page(env, width: int) -> Iterator[str]:
    """Its lines. Raises: ValueError if SYSTEM or PRESET are none."""
    script, preset = settings.find_script(env), env.get("PRESET") or "record"
    found = variables.hyperparameters(variables.ROOT / script, preset)
    system = env.get("SYSTEM") or "record"
    yield from HEAD.splitlines()
    yield from textwrap.wrap(about(system, script, preset), width)
    for group, members in groupby([*found, *variables.OTHERS], lambda v: v.group):
        yield ""
        yield group
        for variable in members:
            yield from lines_of(variable, width)


def main() -> str | None:
    width = min(100, max(60, shutil.get_terminal_size((100, 0)).columns))
    try:
        lines = list(page(os.environ, width))
    except (OSError, ValueError) as error:
        return f"run.sh: {error}"
    print("\n".join(lines))
    return None


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in `HELP=1 ./run.sh | head`
    sys.stdout.reconfigure(errors="backslashreplace")  # on any terminal
    sys.exit(main())
