"""Starts Python scripts in processes that need not import their libraries anew: forks of a process
that has imported them.

    with Forks(["torch", "numpy"], env) as forks:
        result = forks.run("train_gpt.py", folder, env)

A script finds all as `python script` gives it, and modules that are there already. For programs on
a CPU: a GPU that is in use does not survive a fork.

As a program, `python tools/forks.py MODULE ...`, it imports the modules, of which one that is
missing is left to the scripts, then reads jobs from stdin, a JSON object a line: script, folder,
env; out and error, files that get what it prints. It prints the exit status of each, -N for signal
N, and its seconds, as it ends, and ends with stdin.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

GRACE = 40  # seconds to end in, more than torchrun gives its ranks


def end(process: subprocess.Popen) -> None:
    """With all of its group; torchrun ends its ranks, which are no processes of that."""
    for number in signal.SIGTERM, signal.SIGKILL:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


class Forks:
    """modules: names; env: that of the process that imports them. One script at a time."""

    def __init__(self, modules: list[str], env: dict[str, str]):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        command = [sys.executable, __file__, *modules]
        self.process = subprocess.Popen(
            command, env=env, start_new_session=True, text=True, **pipes
        )

    def run(self, script: str, folder: Path, env: dict[str, str]) -> SimpleNamespace:
        """script: path from the folder. Returns: returncode, stdout, stderr, seconds. Raises:
        RuntimeError if the process that starts scripts is gone."""
        with tempfile.TemporaryDirectory() as streams:
            files = {name: str(Path(streams, name)) for name in ("out", "error")}
            job = dict(script=script, folder=str(folder), env=env, **files)
            try:
                self.process.stdin.write(json.dumps(job) + "\n")
                self.process.stdin.flush()
                status, seconds = self.process.stdout.readline().split()
            except (BrokenPipeError, ValueError):
                raise RuntimeError("what starts the scripts was killed: out of memory?") from None
            out, error = (
                Path(file).read_text("utf-8", errors="replace") for file in files.values()
            )
        own = dict(returncode=int(status), seconds=float(seconds))
        return SimpleNamespace(stdout=out, stderr=error, **own)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        """Ends the process and the script that it runs."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        end(self.process)
        self.process.stdout.close()


def redirect(path: str, descriptor: int) -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, descriptor)
    os.close(file)


def become(job: dict) -> None:
    """Makes this process the script's: streams, folder, environment, path of its modules."""
    redirect(os.devnull, 0)
    redirect(job["out"], 1)
    redirect(job["error"], 2)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["env"])
    del sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(job["script"])))


def next_job() -> dict | None:
    """In a child: what it is to run. None in the parent, which waits for each, after the last."""
    for line in sys.stdin:
        start, child = time.perf_counter(), os.fork()
        if not child:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), time.perf_counter() - start, flush=True)
    return None


def main(modules: list[str]) -> None:
    sys.path.pop(0)  # of this file: what lies beside it is no library
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # or each child looks through all that is there as it ends, in 0.7 s
    if job := next_job():
        become(job)
        runpy.run_path(os.path.abspath(job["script"]), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
