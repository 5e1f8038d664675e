"""run.sh itself: how it installs, starts, is stopped and refuses. The scripts that it calls are
replaced by ones that take no time; tools/settings.py and tools/ranks.py are tested as they are."""

import contextlib
import hashlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import train_gpt

sys.path.append(str(ROOT / "tools"))
import ranks  # noqa: E402  (the path comes first)
import settings  # noqa: E402

needs_proc = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="finds processes by it")
NOBODY = 54321  # a user without an entry in /etc/passwd
PYTHON_OF_ALL = shutil.which("python3", path="/usr/bin:/bin")
as_nobody = pytest.mark.skipif(
    os.geteuid() != 0 or not PYTHON_OF_ALL, reason="needs root, and a Python that all may start"
)

VENV_PYTHON = """#!/usr/bin/env bash
if [ "$1" = -m ]; then
    echo "${@:2:2}" >>modules
    [ "$3" != config ] || echo "${PIP_CONFIG:-global.timeout='60'}"
    if [ "$3" = install ]; then
        echo "${@:4}" >>installed
        case "$*" in *"${REFUSED:-nothing}"*) echo "pip: refused" >&2; exit 1 ;; esac
        packages=.venv/lib/python3.11/site-packages
        case "$*" in *index-url*) mkdir -p "$packages/torch-1+cpu.dist-info" ;; esac
    fi
    [ "$2" != pip ] || [ "$3" != "${FAILS:-}" ] || { echo "pip: no network" >&2; exit 1; }
    exit 0
fi
exec "PYTHON" -S -E "$@"
"""
BASE_PYTHON = """#!/usr/bin/env bash
[ "$1" = -m ] || exec "PYTHON" -S -E "$@"
echo "${@:2:2}" >>modules
[ "${FAILS:-}" != venv ] || { echo "ensurepip is not available"; exit 1; }
rm -rf "${@: -1}"
mkdir -p "${@: -1}/bin"
cp python_of_venv "${@: -1}/bin/python"
touch "${@: -1}/pyvenv.cfg"
"""
SETTINGS = """
import os
print("export RUN_ID=run script=train_gpt.py gpus=0 dataset=data tokenizer=tok artifact=model.ptz")
print("nproc=" + os.environ.get("NPROC", "1"), "threads=3 source=--demo")
print("text=" + os.environ.get("TEXT", ""))
"""
TRAIN = """
import os, signal, sys, time
from pathlib import Path

rank = os.environ.get("RANK", "-")

def save(number, frame):
    time.sleep(0.2)
    with open("saved", "a") as file:
        file.write(f"{rank}:{number} ")
    sys.exit(143)

if "HOLD" in os.environ:
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
    Path(f"started{rank}").touch()
    while not Path("go").exists():
        time.sleep(0.01)
with open("trained", "a") as file:
    file.write(f"{sys.argv[0]} ")
if rank == os.environ.get("FAILING_RANK", "-"):
    sys.exit(int(os.environ.get("STATUS", "0")))
time.sleep(60 if "FAILING_RANK" in os.environ else 0)
"""
VERIFY = """
import os, time
from pathlib import Path

print("verify: all passed", flush=True)
if "HOLD_VERIFY" in os.environ:
    Path("verifying").touch()
    time.sleep(60)
"""
VERIFY_UNTIL_STOPPED = """
import signal, sys, time
from pathlib import Path

def stop(number, frame):
    time.sleep(0.2)
    print("verify: late", flush=True)
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
Path("verifying").touch()
time.sleep(60)
"""
RESUMABLE = """
import runpy, sys
sys.argv[:] = sys.argv[1:]
print("resumable", sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCREEN = """
import sys
for line in sys.stdin:
    print(line, end="", flush=True)
"""
STUBS = {
    "tools/settings.py": SETTINGS,
    "train_gpt.py": TRAIN,
    "tools/verify.py": VERIFY,
    "tools/record.py": "open('submission.json', 'w').write('new')",
    "tools/plot.py": "import sys; print('plot:', *sys.argv[1:])",
    "tools/summary.py": "import sys; print('summed up:', *sys.argv[1:])",
    "tools/help.py": "import sys; print('help by', sys.executable)",
    "tools/resumable.py": RESUMABLE,
    "tools/screen.py": SCREEN,
    "tools/check.py": "open('logs/check.env', 'w').write('check_failed=0')",
    "tools/dataset.py": "",
    "data/prepare.py": "raise SystemExit('prepare.py: no text')",
    "requirements.txt": "torch==1\n",
    "tests/requirements.txt": "pytest==1\n",
    "submission.json": "old",
}
COPIED = (
    "run.sh",
    *(f"tools/{name}" for name in ("supervise.sh", "install.sh", "lock.py", "ranks.py")),
)


def write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def build(folder: Path, python: str = sys.executable) -> Path:
    """A checkout with run.sh as it is, scripts that take no time, and .venv, installed."""
    for name, text in STUBS.items():
        write(folder / name, text)
    for name in COPIED:
        shutil.copy(ROOT / name, folder / name)
    write(folder / "python_of_venv", VENV_PYTHON.replace("PYTHON", python), 0o755)
    write(folder / "bin" / "python3", BASE_PYTHON.replace("PYTHON", python), 0o755)
    write(folder / "bin" / "nvidia-smi", "", 0o755)  # there is a GPU, if nothing else is said
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(folder / "python_of_venv", folder / ".venv" / "bin" / "python")
    write(folder / ".venv" / "pyvenv.cfg", "")
    write(folder / ".venv" / "installed.txt", "torch==1\npytest==1")
    return folder


@pytest.fixture
def folder(tmp_path):
    return build(tmp_path / "my größe")


def environment(folder: Path, **env: str) -> dict[str, str]:
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return dict(PATH=path, HOME=os.environ.get("HOME", "/"), DATA_PATH="data") | env


def run_sh(folder: Path, *arguments: str, command=("./run.sh",), cwd=None, **env: str):
    """Its returncode, stdout and stderr."""
    options = dict(cwd=cwd or folder, env=environment(folder, **env), timeout=60)
    return subprocess.run([*command, *arguments], capture_output=True, text=True, **options)


@contextlib.contextmanager
def started(folder: Path, *command: str, until: str = "started-", **env: str):
    """run.sh in the background, as leader of its group, when that file has appeared."""
    options = dict(cwd=folder, env=environment(folder, **env), start_new_session=True)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([*command, "./run.sh"], **options, **pipes)
    try:
        wait_for(lambda: (folder / until).exists() or process.poll() is not None)
        yield process
    finally:
        for pid in processes(folder):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


def processes(folder: Path) -> list[int]:
    """Those that work in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(path / "cwd")) == folder:
                found.append(int(path.name))
    return found


def content(folder: Path) -> dict[str, str]:
    names = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in names}


def line_of(result) -> str:
    """What a refused command says, which is one line on stderr."""
    assert len(result.stderr.splitlines()) == 1 and not result.stdout, result
    return result.stderr.strip()


def refused(result, message: str, status: int = 1) -> bool:
    return message in line_of(result) and result.returncode == status


# -----------------------------------------------------------------------------
# a run that ends


def test_a_run_trains_verifies_and_records(folder):
    result = run_sh(folder)
    assert result.returncode == 0 and not result.stderr
    *lines, summary = result.stdout.splitlines()
    assert lines == [
        "run.sh: an earlier submission.json is now submission.json.old",
        "resumable train_gpt.py",
        "verify: all passed",
        "plot: logs/run.txt",
        "",
    ]
    took = r"--program-took \d --verifier-took \d"
    assert re.fullmatch(rf"summed up: logs/run\.txt {took}", summary)
    files = content(folder)
    assert files["submission.json"] == "new" and files["submission.json.old"] == "old"
    assert files["logs/run.verify.txt"] == "verify: all passed\n"
    assert files["trained"] == "train_gpt.py "
    assert "modules" not in files  # nothing was installed


def test_what_fails_ends_the_run_with_its_status_and_the_old_submission_kept(folder):
    assert run_sh(folder, FAILING_RANK="-", STATUS="7").returncode == 7
    assert "submission.json" not in content(folder)
    write(folder / "tools/verify.py", "raise SystemExit('verify: 1 check, FAILED: bytes')")
    result = run_sh(folder)
    assert result.returncode == 1 and result.stderr == "verify: 1 check, FAILED: bytes\n"
    files = content(folder)
    assert "submission.json" not in files and files["submission.json.old"] == "old"


@pytest.mark.parametrize(
    "fault", ["raise SystemExit('plot: error: no disk')", "import os; os._exit(9)"]
)
def test_a_run_that_cannot_be_drawn_is_complete(folder, fault):
    write(folder / "tools/plot.py", fault)
    result = run_sh(folder)
    assert result.returncode == 0 and content(folder)["submission.json"] == "new"
    line = "run.sh: the run is complete, but no pictures of it were drawn\n"
    assert result.stderr == "plot: error: no disk\n" * ("disk" in fault) + line


def test_a_summary_that_fails_fails_no_run(folder):
    write(folder / "tools/summary.py", "raise SystemExit('summary: no text')")
    result = run_sh(folder)
    assert result.returncode == 0 and content(folder)["submission.json"] == "new"
    assert result.stderr.splitlines() == [
        "summary: no text",
        "run.sh: the run is complete, but not summed up",
    ]


@pytest.mark.parametrize("program", ["train_gpt.py", "tools/verify.py", "tools/record.py"])
def test_what_was_refused_is_not_summed_up(folder, program):
    write(folder / program, "raise SystemExit('refused')")
    result = run_sh(folder)
    assert result.returncode == 1 and result.stderr == "refused\n"
    assert "summed up" not in result.stdout


@pytest.mark.parametrize("arguments", [[], ["check"], ["test"]])
def test_help_does_nothing_else(folder, arguments):
    """With the Python of VENV, or, if that is not there, with PYTHON."""
    before = content(folder)
    result = run_sh(folder, *arguments, HELP="1")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("help by ") and len(result.stdout.splitlines()) == 1
    assert content(folder) == before
    shutil.rmtree(folder / ".venv")
    assert run_sh(folder, *arguments, HELP="1").stdout == result.stdout
    assert not (folder / ".venv").exists()
    assert "help by" not in run_sh(folder, "test", HELP="0").stdout


def test_help_by_an_old_python_is_refused(folder):
    shutil.rmtree(folder / ".venv")
    write(folder / "old", "#!/bin/sh\necho 3.9.2\nexit 1\n", 0o755)
    message = "run.sh: ./old: version 3.9.2, expected Python 3.11 or newer: name another Python"
    assert refused(run_sh(folder, PYTHON="./old", HELP="1"), message)


def test_eval_only_scores_and_does_nothing_else(folder):
    before = content(folder)
    assert run_sh(folder, EVAL_ONLY="1", FAILING_RANK="-", STATUS="3").returncode == 3
    assert content(folder) == before | {"trained": "train_gpt.py ", "logs/run.lock": ""}


@pytest.mark.parametrize(
    "env, resumable",
    [
        ({}, True),
        (dict(CHECKPOINT_EVERY="0"), True),
        (dict(CHECKPOINT_EVERY="60"), True),
        (dict(RESUME="auto"), True),
        (dict(CHECKPOINT_EVERY="0", RESUME="auto"), True),
        (dict(CHECKPOINT_EVERY="60", EVAL_ONLY="1"), False),
    ],
)
def test_a_run_is_started_so_that_it_can_be_stopped(folder, env, resumable):
    result = run_sh(folder, **env)
    assert result.returncode == 0, result.stderr
    assert ("resumable train_gpt.py" in result.stdout) is resumable
    assert content(folder)["trained"] == "train_gpt.py "


def test_data_that_cannot_be_prepared_starts_nothing(folder):
    assert refused(run_sh(folder, DATA_PATH=""), "prepare.py: no text")


@pytest.mark.parametrize("env", [{}, dict(EVAL_ONLY="1")])
def test_shards_of_another_tokenizer_start_nothing(folder, env):
    write(folder / "tools/dataset.py", "raise SystemExit('run.sh: another tokenizer')")
    assert refused(run_sh(folder, **env), "run.sh: another tokenizer")
    assert "trained" not in content(folder)
    files = content(folder)
    assert "trained" not in files and files["submission.json"] == "old"


@pytest.mark.parametrize(
    "stats, text, made_again",
    [
        ('{"text_sha256": {"train": "ab12"}}', "ab12", False),
        ('{"text_sha256": {"train": "cd34"}}', "ab12", True),
        ('{"name": "demo"}', "ab12", True),  # of a version that did not say it
        ('{"name": "fineweb10B_sp8192"}', "", False),  # not the demo
        (None, "ab12", True),
        (None, "", True),
    ],
)
def test_data_of_another_text_are_made_again(folder, stats, text, made_again):
    if stats:
        write(folder / "data/stats.json", stats)
    write(folder / "data/prepare.py", "open('prepared', 'w').close()")
    result = run_sh(folder, DATA_PATH="", TEXT=text)
    assert result.returncode == 0, result.stderr
    assert ("prepared" in content(folder)) is made_again


def test_settings_that_are_wrong_start_nothing(folder):
    write(folder / "tools/settings.py", """raise SystemExit("run.sh: MATRIX_LR='abc'")""")
    assert refused(run_sh(folder), "run.sh: MATRIX_LR='abc'")
    files = content(folder)
    assert "trained" not in files and files["submission.json"] == "old"


@pytest.mark.parametrize("arguments", [["chek"], ["check", "slow"], ["checktest"]])
def test_an_unknown_command_is_told_the_usage(folder, arguments):
    before = content(folder)
    assert refused(run_sh(folder, *arguments), "usage: ./run.sh [check | test", 2)
    assert content(folder) == before


# -----------------------------------------------------------------------------
# signals


def send(how: str, process: subprocess.Popen, folder: Path, number: int) -> None:
    if how == "script":
        process.send_signal(number)
    elif how == "group":
        os.killpg(process.pid, number)
    else:
        for pid in processes(folder):
            os.kill(pid, number)


@needs_proc
@pytest.mark.parametrize("how", ["script", "group", "all"])
@pytest.mark.parametrize("name", ["HUP", "INT", "TERM"])
def test_a_signal_reaches_the_training_which_saves(folder, name, how):
    """`all`: as systemd and Slurm do; training itself must bear a second one then."""
    number = signal.Signals[f"SIG{name}"]
    with started(folder, HOLD="1") as process:
        send(how, process, folder, number)
        _, stderr = process.communicate(timeout=60)
        assert not processes(folder)
    assert process.returncode == 128 + number
    files = content(folder)
    if how != "all":
        assert files["saved"] == "-:15 "
    assert "-:" in files["saved"] and "trained" not in files
    assert "submission.json" not in files and files["submission.json.old"] == "old"
    first, last = stderr.splitlines()
    assert first.startswith(f"run.sh: SIG{name}: waiting until process group ")
    assert last == f"run.sh: stopped by SIG{name}"


@needs_proc
def test_the_second_signal_waits_as_the_first(folder):
    with started(folder, HOLD="1") as process:
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        process.communicate(timeout=60)
    assert process.returncode == 130 and content(folder)["saved"] == "-:15 "


@needs_proc
@pytest.mark.parametrize("how", ["script", "group", "all"])
def test_a_hangup_under_nohup_ends_nothing(folder, how):
    with started(folder, "nohup", HOLD="1") as process:
        send(how, process, folder, signal.SIGHUP)
        (folder / "go").touch()
        process.communicate(timeout=60)
    files = content(folder)
    assert process.returncode == 0 and files["submission.json"] == "new" and "saved" not in files


@needs_proc
@pytest.mark.parametrize("what, number", [("close", 1), ("ctrl-c", 2)])
def test_a_terminal_that_closes_or_interrupts(folder, what, number):
    """A terminal of its own: the kernel sends the signal, to whom it does."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execve("./run.sh", ["./run.sh"], environment(folder, HOLD="1"))
    wait_for((folder / "started-").exists)
    if what == "close":
        os.close(terminal)
    else:
        os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + number
    assert content(folder)["saved"] == "-:15 "
    assert not processes(folder)


@needs_proc
@pytest.mark.parametrize("name", ["HUP", "INT", "TERM"])
def test_a_signal_ends_the_verifier_and_says_what_is_there(folder, name):
    number = signal.Signals[f"SIG{name}"]
    with started(folder, until="verifying", HOLD_VERIFY="1") as process:
        os.killpg(process.pid, number)
        _, stderr = process.communicate(timeout=60)
        assert not processes(folder)
    assert process.returncode == 128 + number
    assert "submission.json" not in content(folder)
    first, last = stderr.splitlines()  # none of bash's own
    complete = "model.ptz and logs/run.txt are complete, but not verified and recorded"
    assert first.startswith(f"run.sh: SIG{name}: waiting")
    assert last == f"run.sh: stopped by SIG{name}; {complete}"


@needs_proc
def test_what_the_verifier_says_when_it_is_stopped_is_kept(folder):
    """It goes through two more processes, all of which hear the signal."""
    write(folder / "tools/verify.py", VERIFY_UNTIL_STOPPED)
    with started(folder, until="verifying") as process:
        os.killpg(process.pid, signal.SIGINT)
        stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert content(folder)["logs/run.verify.txt"] == "verify: late\n"
    assert stdout.endswith("verify: late\n")


@pytest.fixture
def folder_with_torch(folder):
    write(folder / ".venv/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', 0o755)
    return folder


def test_nothing_stands_between_eight_ranks_and_the_record(folder_with_torch):
    for env, resumable in ({}, False), (dict(CHECKPOINT_EVERY="60"), True):
        result = run_sh(folder_with_torch, NPROC="8", **env)
        assert result.returncode == 0, result.stderr
        assert ("resumable" in result.stdout) is resumable


@needs_proc
def test_ranks_hear_one_signal_and_no_hangup(folder_with_torch):
    """Real torchrun, under nohup."""
    with started(folder_with_torch, "nohup", until="started0", HOLD="1", NPROC="2") as process:
        wait_for((folder_with_torch / "started1").exists)
        send("all", process, folder_with_torch, signal.SIGHUP)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
        assert not processes(folder_with_torch)
    assert process.returncode == 143 and "Traceback" not in stderr
    assert sorted(content(folder_with_torch)["saved"].split()) == ["0:15", "1:15"]


@pytest.mark.parametrize("env, threads", [({}, "3"), (dict(OMP_NUM_THREADS="5"), "5")])
def test_each_rank_has_its_share_of_the_cores_unless_told(folder_with_torch, env, threads):
    tell = 'open("threads" + os.environ["RANK"], "w").write(os.environ["OMP_NUM_THREADS"])'
    write(folder_with_torch / "train_gpt.py", f"import os; {tell}")
    result = run_sh(folder_with_torch, NPROC="2", **env)
    assert result.returncode == 0, result.stderr
    found = content(folder_with_torch)
    assert (found["threads0"], found["threads1"]) == (threads, threads)


@needs_proc
def test_a_rank_that_fails_ends_the_run_with_its_status(folder_with_torch):
    result = run_sh(folder_with_torch, FAILING_RANK="1", STATUS="7", NPROC="2")
    assert result.returncode == 7 and not result.stderr
    assert not processes(folder_with_torch)


SAYS = """
import os, sys, time
from pathlib import Path

print("warning: old", file=sys.stderr)
if os.environ["RANK"] in os.environ.get("ALONE", ""):
    print("alone", file=sys.stderr)
Path("said" + os.environ["RANK"]).touch()
while len([*Path().glob("said[0-2]")]) < 3:
    time.sleep(0.01)
raise ValueError("of each")
"""


@pytest.mark.parametrize("alone, shown", [("", 1), ("0", 1), ("1", 2)])
def test_what_all_ranks_say_is_shown_once(folder_with_torch, alone, shown):
    """Of a rank that has said something else all is shown, to stay in one piece."""
    folder = folder_with_torch
    write(folder / "train_gpt.py", SAYS)
    (folder / "tmp").mkdir()
    result = run_sh(folder, NPROC="3", ALONE=alone, TMPDIR=str(folder / "tmp"))
    assert result.returncode == 1
    assert result.stderr.count("warning: old") == shown
    assert result.stderr.count("alone") == bool(alone)
    assert 1 <= result.stderr.count("ValueError: of each") <= shown  # others may have been ended
    assert not [*(folder / "tmp").iterdir()]


def test_what_rank_0_says_is_shown_as_it_comes(folder_with_torch):
    folder = folder_with_torch
    text = "print('at once', file=sys.stderr)\nif 'HOLD' in os.environ:"
    write(folder / "train_gpt.py", TRAIN.replace('if "HOLD" in os.environ:', text))
    with started(folder, until="started0", HOLD="1", NPROC="2") as process:
        assert process.stderr.readline() == "at once\n"
        (folder / "go").touch()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and not stderr


def test_a_rank_that_lost_another_is_heard_only_if_nobody_says_why():
    lost = "Traceback\nRuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:434\n"
    assert ranks.unlike_rank_0(["no space left\n", lost]) == []
    assert ranks.unlike_rank_0([lost, "a\nwrong\n", "wrong\na\n", "a\n"]) == ["a\nwrong\n"]
    assert ranks.unlike_rank_0(["", lost, lost]) == [lost]
    assert ranks.unlike_rank_0([]) == []


def test_a_rank_that_is_killed_is_named(capsys):
    """The others were ended by torchrun, because of it."""
    codes = {0: -signal.SIGTERM, 1: -signal.SIGKILL, 2: 128 + signal.SIGTERM}
    failures = {rank: ProcessFailure(rank, 0, code, "") for rank, code in codes.items()}
    assert ranks.status_of(failures, ["", "", ""]) == 128 + signal.SIGKILL
    assert capsys.readouterr().err == "ranks: rank 1 was killed by SIGKILL: out of memory?\n"


@pytest.mark.parametrize(
    "said, status",
    [
        (["wrong\n" + ranks.ABORTED, ""], 1),
        ([ranks.ABORTED, "wrong\n"], 1),  # another rank says why
        ([ranks.ABORTED, ""], 134),
        (["wrong\n", ""], 134),
    ],
)
def test_a_rank_that_is_aborted_behind_its_last_word_has_ended(capsys, said, status):
    failures = {0: ProcessFailure(0, 0, -signal.SIGABRT, ""), 1: ProcessFailure(1, 0, 1, "")}
    failures[0].timestamp, failures[1].timestamp = 1, 2
    assert ranks.status_of(failures, said) == status
    told = capsys.readouterr().err
    assert told == ("" if status == 1 else "ranks: rank 0 was killed by SIGABRT\n")


@needs_proc
@pytest.mark.parametrize("how, name", [("script", "TERM"), ("group", "INT"), ("script", "HUP")])
def test_a_signal_before_anything_has_begun(folder, how, name):
    hold = "import time; from pathlib import Path; Path('reading').touch(); time.sleep(0.3)"
    write(folder / "tools/settings.py", f"import signal; signal.signal(2, signal.SIG_DFL); {hold}")
    with started(folder, until="reading") as process:
        send(how, process, folder, signal.Signals[f"SIG{name}"])
        _, stderr = process.communicate(timeout=60)
        assert not processes(folder)
    assert process.returncode == 128 + signal.Signals[f"SIG{name}"]
    assert len(stderr.splitlines()) <= 1
    files = content(folder)
    assert "trained" not in files and files["submission.json"] == "old"


# -----------------------------------------------------------------------------
# one run at a time


@needs_proc
def test_a_second_run_is_refused_and_touches_nothing(folder):
    with started(folder, HOLD="1") as process:
        before = content(folder)
        second = run_sh(folder)
        assert refused(second, "run.sh: logs/run.lock: ")
        assert line_of(second).endswith("wait until it has ended, or run in a copy of the folder")
        assert refused(run_sh(folder, EVAL_ONLY="1"), "run.sh: logs/run.lock: ")
        assert content(folder) == before
        assert run_sh(folder, "check").returncode == 0
        assert run_sh(folder, "test", "-k", "x").returncode == 0
        (folder / "go").touch()
        process.communicate(timeout=60)
    assert process.returncode == 0 and run_sh(folder).returncode == 0


@needs_proc
def test_what_a_killed_run_has_started_keeps_the_lock(folder):
    with started(folder, HOLD="1") as process:
        process.kill()
        process.wait()
        assert processes(folder)
        assert refused(run_sh(folder), "run.sh: logs/run.lock: ")
        (folder / "go").touch()
        wait_for(lambda: not processes(folder))
    assert run_sh(folder).returncode == 0


@needs_proc
def test_a_run_waits_for_its_own_verifier_before_another_may_start(folder):
    with started(folder, until="verifying", HOLD_VERIFY="1"):
        assert refused(run_sh(folder), "run.sh: logs/run.lock: ")


# -----------------------------------------------------------------------------
# it starts everywhere


@pytest.mark.parametrize("command", [["./run.sh"], ["bash", "run.sh"], ["sh", "run.sh"]])
def test_it_starts_by_any_shell(folder, command):
    assert run_sh(folder, command=command).returncode == 0


def test_it_starts_from_another_folder_and_through_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder / "run.sh")
    for script in ("link", "my größe/run.sh"):
        result = run_sh(folder, command=[f"./{script}"], cwd=tmp_path, CDPATH="/")
        assert result.returncode == 0, result.stderr
    assert not (tmp_path / "logs").exists() and (folder / "logs").exists()


@pytest.mark.parametrize(
    "env",
    [
        dict(LC_ALL="C"),
        dict(HOME="/nonexistent"),
        dict(PYTHONHOME="/nonexistent", PYTHONPATH="/nonexistent", PYTHONSAFEPATH="1"),
        dict(RANK="3", WORLD_SIZE="4", PET_NNODES="2", TORCHELASTIC_RUN_ID="x"),
        dict(PIP_TARGET="elsewhere", PIP_USER="1"),
    ],
)
def test_variables_of_other_programs_do_not_reach_it(folder, env):
    script = "import os; print({name: os.environ.get(name) for name in NAMES})"
    write(folder / "train_gpt.py", script.replace("NAMES", str(sorted(env))))
    result = run_sh(folder, **env)
    assert result.returncode == 0, result.stderr
    expected = {k: env[k] if k in ("LC_ALL", "HOME") else None for k in sorted(env)}
    assert str(expected) in result.stdout


def test_kernels_and_fonts_are_kept_here_where_home_cannot_be_written(folder):
    for script, name in (("train_gpt.py", "TRITON_HOME"), ("tools/plot.py", "MPLCONFIGDIR")):
        write(folder / script, f"import os; print(os.environ.get('{name}'))")
    lines = run_sh(folder, HOME="/nonexistent").stdout.splitlines()
    assert {str(folder), str(folder / ".triton" / "matplotlib")} <= {*lines}
    assert run_sh(folder, HOME=str(folder)).stdout.splitlines().count("None") == 2


def test_a_mask_of_077_does_not_matter(folder):
    result = run_sh(folder, command=["sh", "-c", "umask 077; ./run.sh"])
    assert result.returncode == 0, result.stderr


@pytest.fixture
def folder_of_all():
    """Which every user may read."""
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        yield build(Path(root) / "checkout", PYTHON_OF_ALL)


def as_user(folder: Path, *arguments: str):
    user = dict(user=NOBODY, group=NOBODY, extra_groups=[])
    options = dict(cwd=folder, env=dict(PATH="/usr/bin:/bin", DATA_PATH="data"), timeout=60)
    command = ["./run.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options, **user)


@as_nobody
def test_a_checkout_that_cannot_be_written_is_refused(folder_of_all):
    for arguments in ([], ["check"]):
        message = f"{folder_of_all}/.: no folder that can be written"
        assert refused(as_user(folder_of_all, *arguments), message)
    folder_of_all.chmod(0o777)
    (folder_of_all / "logs").mkdir()
    (folder_of_all / "logs").chmod(0o555)
    assert refused(as_user(folder_of_all), f"{folder_of_all}/logs: no folder that can be written")
    assert (folder_of_all / "submission.json").read_text() == "old"


@as_nobody
def test_a_user_without_name_and_home_runs(folder_of_all):
    folder_of_all.chmod(0o777)
    result = as_user(folder_of_all)
    assert result.returncode == 0, result.stderr


# -----------------------------------------------------------------------------
# installation


def modules(folder: Path) -> list[str]:
    """What was called by python -m, and the word behind it."""
    path = folder / "modules"
    return path.read_text().splitlines() if path.exists() else []


MADE = ["pip --version", "venv --clear", "pip install"]


def test_the_first_start_installs_and_the_second_does_not(folder):
    shutil.rmtree(folder / ".venv")
    for _ in range(2):
        result = run_sh(folder)
        assert result.returncode == 0, result.stderr
        assert modules(folder) == MADE[1:]
    assert (folder / ".venv/installed.txt").read_text() == "torch==1\npytest==1"


def test_an_installation_is_announced_once(folder):
    (folder / ".venv/installed.txt").unlink()
    line = "run.sh: installing what requirements.txt names into .venv, which takes some minutes"
    assert run_sh(folder).stdout.splitlines()[0] == line
    assert line not in run_sh(folder).stdout


def test_requirements_that_changed_are_installed_into_what_is_there(folder):
    write(folder / "requirements.txt", "torch==2\n")
    write(folder / ".venv/own", "kept")
    assert run_sh(folder).returncode == 0
    assert modules(folder) == ["pip --version", "pip install"]
    assert (folder / ".venv/own").exists()


def test_an_installation_that_was_interrupted_is_made_again(folder):
    (folder / ".venv/installed.txt").unlink()
    assert run_sh(folder).returncode == 0 and modules(folder) == ["pip --version", "pip install"]
    (folder / ".venv/installed.txt").unlink()
    (folder / ".venv/bin/python").unlink()
    assert run_sh(folder).returncode == 0 and modules(folder)[2:] == MADE[1:]


def test_an_installation_whose_python_is_gone_is_made_again(folder):
    (folder / ".venv/bin/python").unlink()
    (folder / ".venv/bin/python").symlink_to("/nonexistent/python3.11")
    assert run_sh(folder).returncode == 0 and modules(folder) == MADE[1:]


def test_a_failed_update_is_not_taken_for_the_old_installation(folder):
    write(folder / "requirements.txt", "torch==2\n")
    assert run_sh(folder, FAILS="install").returncode == 1
    write(folder / "requirements.txt", "torch==1\n")
    assert run_sh(folder).returncode == 0 and modules(folder).count("pip install") == 2


def test_no_network_is_one_line_behind_those_of_pip(folder):
    (folder / ".venv/installed.txt").unlink()
    result = run_sh(folder, FAILS="install")
    said, line = result.stderr.splitlines()
    assert result.returncode == 1 and said == "pip: no network"
    assert line.startswith("run.sh: not all of requirements.txt is in .venv, pip says above why")
    assert "trained" not in content(folder) and not (folder / ".venv/installed.txt").exists()


# what pip install is called with
QUIET = "--disable-pip-version-check --quiet"
FOR_CPUS = f"{QUIET} --no-deps --index-url https://download.pytorch.org/whl/cpu"
FOR_CPUS += " --timeout 20 --retries 1 torch==1"
ALL = f"{QUIET} -r requirements.txt -r tests/requirements.txt"
MARK = ".venv/torch_is_for_cpus.txt"


def pip_installed(folder: Path) -> list[str]:
    """Arguments of each call of pip install, in order."""
    path = folder / "installed"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def without_gpu(folder):
    """A folder where nothing is installed, on a machine without a GPU."""
    wsl = Path("/usr/lib/wsl/lib/nvidia-smi")
    if shutil.which("nvidia-smi") or [*Path("/dev").glob("nvidia*")] or wsl.exists():
        pytest.skip("a GPU is here")
    (folder / ".venv/installed.txt").unlink()
    (folder / "bin/nvidia-smi").unlink()
    return folder


def test_with_a_gpu_torch_is_the_one_for_cuda(folder):
    (folder / ".venv/installed.txt").unlink()
    assert run_sh(folder).returncode == 0
    assert pip_installed(folder) == [ALL] and not (folder / MARK).exists()


def test_without_a_gpu_torch_is_the_one_for_cpus(without_gpu):
    for _ in range(2):
        result = run_sh(without_gpu)
        assert result.returncode == 0 and not result.stderr
        assert pip_installed(without_gpu) == [FOR_CPUS, ALL] and (without_gpu / MARK).exists()


def test_when_a_gpu_comes_torch_is_exchanged_once(without_gpu):
    assert run_sh(without_gpu).returncode == 0
    write(without_gpu / "bin/nvidia-smi", "", 0o755)
    assert run_sh(without_gpu, REFUSED="--force-reinstall").returncode == 1
    exchange = f"{QUIET} --no-deps --force-reinstall torch==1"
    for _ in range(2):
        assert run_sh(without_gpu).returncode == 0
        assert pip_installed(without_gpu)[2:] == [exchange, exchange, ALL]
    assert not (without_gpu / MARK).exists()


def test_an_index_for_cpus_that_cannot_be_reached_is_not_needed(without_gpu):
    result = run_sh(without_gpu, REFUSED="download.pytorch.org")
    assert result.returncode == 0 and not result.stderr
    assert pip_installed(without_gpu) == [FOR_CPUS, ALL] and not (without_gpu / MARK).exists()


@pytest.mark.parametrize(
    "line",
    [
        ":env:.index-url='https://mirror'",
        ":env:.extra-index-url='https://download.pytorch.org/whl/cpu'",
        ":env:.no-index='1'",
        "global.index-url='https://mirror'",
        "install.find-links='/wheels'",
    ],
)
def test_an_index_of_the_user_decides_which_torch_there_is(without_gpu, line):
    assert run_sh(without_gpu, PIP_CONFIG=line).returncode == 0
    assert pip_installed(without_gpu) == [ALL] and not (without_gpu / MARK).exists()


def test_pip_tells_an_index_of_the_user_in_these_words(tmp_path):
    """What install.sh looks for, by the pip that is here."""
    write(tmp_path / "pip.conf", "[install]\nindex-url = https://mirror\n[global]\nno-index = 1\n")
    env = dict(PATH=os.environ["PATH"], HOME=str(tmp_path), PIP_CONFIG_FILE="pip.conf")
    env |= dict(PIP_EXTRA_INDEX_URL="https://other", PIP_FIND_LINKS="/wheels")
    command = [sys.executable, "-m", "pip", "config", "list"]
    said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    for name in ("install.index-url", "global.no-index", ":env:.extra-index-url"):
        assert f"{name}=" in said
    assert ":env:.find-links='/wheels'" in said


def test_macos_has_one_torch_and_windows_none(folder, without_gpu):
    for system in ("Darwin", "MINGW64_NT-10.0"):
        write(folder / "bin/uname", f"#!/bin/sh\necho {system}\n", 0o755)
        result = run_sh(folder)
        assert pip_installed(folder) == [ALL]
        (folder / ".venv/installed.txt").unlink(missing_ok=True)
    assert refused(result, "run.sh: MINGW64_NT-10.0: expected Linux, macOS, or on Windows WSL 2")


def test_a_python_that_makes_no_venv_is_one_line_behind_its_own(folder):
    shutil.rmtree(folder / ".venv")
    result = run_sh(folder, FAILS="venv")
    said, line = result.stderr.splitlines()
    assert result.returncode == 1 and said == "ensurepip is not available"
    assert line.startswith("run.sh: python3 cannot make .venv") and "python3-venv" in line


def test_no_python_or_an_old_one_is_refused(folder):
    shutil.rmtree(folder / ".venv")
    result = run_sh(folder, PYTHON="python3.99")
    assert refused(result, "run.sh: no program python3.99, expected Python 3.11 or newer: name")
    write(folder / "old", "#!/bin/sh\necho 3.9.2\nexit 1\n", 0o755)
    message = "run.sh: ./old: version 3.9.2, expected Python 3.11 or newer: name another Python"
    assert refused(run_sh(folder, PYTHON="./old"), message)
    assert not (folder / ".venv").exists()


def test_a_venv_whose_folder_cannot_be_made_is_refused(folder):
    write(folder / "file", "")
    result = run_sh(folder, VENV="file/venv")
    assert result.returncode == 1 and "file" in line_of(result)


def test_a_folder_that_is_no_venv_is_not_cleared(folder):
    write(folder / "mine/text", "kept")
    result = run_sh(folder, VENV="mine")
    assert refused(result, "run.sh: VENV=mine: it exists and has no pyvenv.cfg")
    assert (folder / "mine/text").read_text() == "kept"


@pytest.fixture
def slow_to_install(folder):
    """Nothing is installed, and pip waits for the file `go`."""
    (folder / ".venv/installed.txt").unlink()
    text = VENV_PYTHON.replace("PYTHON", sys.executable)
    hold = "[ $3 != install ] || { touch installing; while [ ! -e go ]; do sleep 0.01; done; }"
    write(folder / ".venv/bin/python", text.replace("    exit 0", f"    {hold}\n    exit 0"), 0o755)
    return folder


@needs_proc
def test_an_installation_that_is_stopped_says_what_the_next_start_does(slow_to_install):
    folder = slow_to_install
    with started(folder, until="installing") as process:
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert not processes(folder)
    assert process.returncode == 130 and not (folder / ".venv/installed.txt").exists()
    first, last = stderr.splitlines()
    assert first.startswith("run.sh: SIGINT: waiting")
    assert last == "run.sh: stopped by SIGINT; the next start goes on with .venv"


@needs_proc
def test_two_installations_do_not_meet(slow_to_install):
    folder = slow_to_install
    with started(folder, until="installing") as process:
        for arguments in ([], ["check"], ["test"]):
            assert refused(run_sh(folder, *arguments), "run.sh: .venv.lock: ")
        (folder / "go").touch()
        process.communicate(timeout=60)
    assert process.returncode == 0 and modules(folder).count("pip install") == 1


# -----------------------------------------------------------------------------
# tools/settings.py


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count, usable): what torch says is here."""

    def pretend(count: int, usable: bool) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)

    monkeypatch.setattr(train_gpt.world, "size", 1)
    pretend(0, False)
    return pretend


@pytest.mark.parametrize(
    "env, message",
    [
        (dict(MATRIX_LR="abc"), "MATRIX_LR='abc': expected float"),
        (dict(EVAL_ONLY="yes"), "EVAL_ONLY='yes': expected 0 or 1"),
        (dict(PRESET="nosuch"), "PRESET='nosuch': no preset "),
        (dict(LAYOUT="X"), "LAYOUT='X': "),
        (dict(TRAIN_BATCH_TOKENS="1000"), "TRAIN_BATCH_TOKENS=1000: expected a multiple of"),
        (dict(NPROC="0"), "NPROC='0': expected a number of processes, 1 or more"),
        (dict(NPROC="-2"), "NPROC='-2': expected a number"),
        (dict(NPROC="abc"), "NPROC='abc': expected a number"),
        (dict(NPROC="2.0"), "NPROC='2.0': expected a number"),
        (dict(NPROC="3"), "NPROC=3: TRAIN_BATCH_TOKENS="),
        (dict(SYSTEM="nosuch"), "SYSTEM='nosuch': expected one of baseline, crawler, "),
        (dict(SYSTEM="parts"), "SYSTEM='parts': expected one of baseline, crawler, "),
        (dict(SYSTEM="layouts"), "SYSTEM='layouts': expected one of baseline, crawler, "),
        (dict(SYSTEM="../train_gpt"), "SYSTEM='../train_gpt': expected one of "),
        (dict(SYSTEM="baseline.py"), "SYSTEM='baseline.py': expected one of "),
        (dict(RUN_ID="../x"), "RUN_ID='../x': expected a file name"),
        (dict(RUN_ID="a/b"), "RUN_ID='a/b': expected a file name"),
        (dict(RUN_ID="a\nb"), "RUN_ID='a\\nb': expected a file name"),
        (dict(RUN_ID="a" * 101), "expected a file name of at most 100"),
        (dict(RUN_ID="-a"), "RUN_ID='-a': expected a file name"),
    ],
    ids=str,
)
def test_a_wrong_setting_gives_one_line(gpus, monkeypatch, capsys, env, message):
    monkeypatch.setattr(os, "environ", env)
    line = settings.main([])
    assert line.startswith("run.sh: ") and message in line and "\n" not in line
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "here, env, preset, nproc",
    [
        (0, {}, "demo", 2),
        (0, dict(NPROC="1"), "demo", 1),
        (0, dict(TRAIN_SEQ_LEN="2048"), "demo", 1),  # one row, which two ranks cannot share
        (0, dict(PRESET="record"), "record", 2),
        (1, {}, "record", 1),
        (2, {}, "record", 2),
        (7, {}, "record", 4),
        (16, {}, "record", 8),
        (8, dict(PRESET="demo"), "demo", 1),
        (8, dict(NPROC="2"), "record", 2),
    ],
)
def test_preset_and_ranks_are_those_of_the_machine(gpus, here, env, preset, nproc):
    gpus(here, here > 0)
    found = settings.read_settings(env)
    assert (found["PRESET"], found["nproc"], found["gpus"]) == (preset, str(nproc), str(here))
    assert found["source"] == ("--demo" if preset == "demo" else "--variant=sp8192")
    text = hashlib.sha256((ROOT / "data/demo.jsonl.zst").read_bytes()).hexdigest()
    assert found["text"] == (text if preset == "demo" else "")


@pytest.mark.parametrize(
    "gpus_here, cores, ranks, threads", [(0, 8, 2, 4), (0, 1, 2, 1), (8, 64, 8, 1)]
)
def test_ranks_of_a_cpu_share_its_cores(monkeypatch, gpus_here, cores, ranks, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    assert settings.count_threads(gpus_here, ranks) == threads


def test_there_are_not_more_ranks_than_gpus(gpus):
    gpus(2, True)
    with pytest.raises(ValueError, match="NPROC='4': expected at most 2, a process for each GPU"):
        settings.read_settings(dict(NPROC="4"))


def test_gpus_that_cannot_be_used_are_left_to_check(gpus):
    gpus(1, False)
    with pytest.raises(ValueError, match="torch cannot use the GPUs that are here"):
        settings.read_settings({})
    assert settings.read_settings({}, for_check=True)["gpus"] == "0"


def test_what_is_printed_is_what_a_shell_reads(gpus, monkeypatch, capsys):
    odd = dict(SYSTEM="baseline", ARTIFACT="a b/$(x) 'größe'.ptz", RUN_ID="run", PRESET="demo")
    monkeypatch.setattr(os, "environ", odd)
    assert settings.main([]) == 0
    script = 'eval "$1"; env -i RUN_ID="$RUN_ID" env; echo "$script"; echo "$artifact"'
    command = ["bash", "-euc", script, "bash", capsys.readouterr().out]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.stdout.splitlines() == ["RUN_ID=run", "systems/baseline.py", odd["ARTIFACT"]]


SYSTEMS = {path.stem for path in (ROOT / "systems").glob("*.py")}
SYSTEMS = sorted(SYSTEMS - {"parts", "layers", "layouts"})


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_looks_for_its_parts_beside_itself(system):
    source = (ROOT / "systems" / f"{system}.py").read_text()
    line = "sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH=1 leaves it out\n"
    assert re.search(re.escape(line) + r"import (layers|layouts|parts)\b", source)


def test_a_system_starts_with_a_safe_path():
    """As the counted file that it is; a wrong setting ends it early."""
    env = os.environ | dict(PYTHONSAFEPATH="1", PRESET="demo", MATRIX_LR="abc")
    script = str(ROOT / "systems" / "baseline.py")
    said = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert "MATRIX_LR='abc': expected float" in said.stderr
