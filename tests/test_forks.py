"""tools/forks.py: a script is run as `python script` runs it, with its libraries there already."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from in_process import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from forks import Forks  # noqa: E402  (the path comes first)

LOOK = """
import json, os, sys, threading
import beside
threading.Thread(target=lambda: print("from a thread")).start()
own = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
path = [entry for entry in sys.path if "lib" not in entry]
print(json.dumps([__name__, os.path.abspath(__file__), os.getcwd(), own, path, beside.X]))
print(sys.stdin.read(), os.path.abspath(sys.argv[0]), sys.argv[1:])
print(sys.modules["__main__"].own is own)
print("and an error", file=sys.stderr)
"""
ENDS = {
    "": 0,
    "import sys; sys.exit(7)": 7,
    "import sys; sys.exit('a line')": 1,
    "raise ValueError('a traceback')": 1,
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": -9,
    "import atexit; atexit.register(print, 'at the end')": 0,
    "import no_such_module": 1,
    "def broken(": 1,
}


@pytest.fixture(scope="module")
def forks():
    with Forks(["numpy", "no_such_module", "logs"], dict(PATH=os.environ["PATH"])) as forks:
        yield forks


def plain(script, folder, env):
    command = [sys.executable, script]
    pipes = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return subprocess.run(command, cwd=folder, env=env, **pipes)


def test_a_script_sees_what_python_gives_it(forks, tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "beside.py").write_text("X = 5")
    (tmp_path / "below" / "look.py").write_text(LOOK)
    env = dict(PATH=os.environ["PATH"], A="1", EMPTY="", OMP_NUM_THREADS="1")
    one, other = (start("below/look.py", tmp_path, env) for start in (forks.run, plain))
    assert other.returncode == 0 and "from a thread" in other.stdout
    for name in ("returncode", "stdout", "stderr"):
        assert getattr(one, name) == getattr(other, name)


@pytest.mark.parametrize("source", ENDS)
def test_it_ends_as_it_does_alone(forks, tmp_path, source):
    (tmp_path / "script.py").write_text(source)
    one, other = (start("script.py", tmp_path, {}) for start in (forks.run, plain))
    assert one.returncode == other.returncode == ENDS[source]
    assert one.stdout == other.stdout
    assert one.stderr.splitlines()[-1:] == other.stderr.splitlines()[-1:]


def test_libraries_are_there_and_nothing_is_left_by_an_earlier_script(forks, tmp_path):
    text = "import sys; print(sorted({'numpy', 'logs', 'mark'} & set(sys.modules)))"
    (tmp_path / "mark.py").write_text("")
    (tmp_path / "script.py").write_text(f"{text}\nimport mark, os; os.environ['B'] = '1'")
    for _ in range(2):
        assert forks.run("script.py", tmp_path, {}).stdout == "['numpy']\n"


def test_its_time_is_its_own(forks, tmp_path):
    (tmp_path / "script.py").write_text("import time; time.sleep(0.3)")
    assert 0.3 <= forks.run("script.py", tmp_path, {}).seconds


def test_what_starts_scripts_may_be_killed(tmp_path):
    (tmp_path / "script.py").write_text("import os, signal; os.kill(os.getppid(), signal.SIGKILL)")
    with Forks([], dict(os.environ)) as forks:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="out of memory"):
                forks.run("script.py", tmp_path, {})


def test_a_script_ends_with_what_started_it(tmp_path):
    source = "import json, os, time; json.dump(os.getpid(), open('pid', 'w')); time.sleep(600)"
    (tmp_path / "script.py").write_text(source)
    forks = Forks([], dict(os.environ))
    job = dict(script="script.py", folder=str(tmp_path), env={}, out="/dev/null", error="/dev/null")
    forks.process.stdin.write(json.dumps(job) + "\n")
    forks.process.stdin.flush()
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    forks.__exit__()
    pid, deadline = json.loads((tmp_path / "pid").read_text()), time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:  # until it is buried
            os.kill(pid, signal.SIG_DFL)
            time.sleep(0.01)
