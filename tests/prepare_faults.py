"""data/prepare.py killed in the middle of its work: what is left on disk.

`prepare_faults` kills a real process at random moments; `kill_at_every_step` a forked one at each
change of the file system. Both look at the same: a dataset was there, another one is made under its
name.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from corpus import prose

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import prepare  # noqa: E402

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}


def visible(root: Path) -> dict[str, bytes]:
    """What a user sees below the root, by name: nothing that begins with a dot."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for folder in ("datasets", "tokenizers")
        for path in (root / folder).rglob("[!.]*")
        if path.is_file() and not any(part.startswith(".") for part in path.parts)
    }


class Scene:
    """A root with a dataset of one text, and the command that makes one of another text of it."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder / "root"
        folder.mkdir(parents=True, exist_ok=True)
        self.make(prose()[:40])
        self.old = visible(self.root)
        shutil.copytree(self.root, folder / "old")
        self.write(prose()[40:100])
        self.make_again()
        self.new = visible(self.root)
        assert self.old.keys() == self.new.keys() and len(self.old) == 4
        assert not [name for name in self.old if self.old[name] == self.new[name]]

    def write(self, texts) -> None:
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (self.folder / "docs.jsonl").write_text(data)

    @property
    def arguments(self) -> list[str]:
        options = "--num-val-docs 5 --vocab-size 400 --name own --output-root".split()
        return ["--docs", str(self.folder / "docs.jsonl"), *options, str(self.root)]

    def make(self, texts) -> None:
        self.write(texts)
        self.make_again()

    def make_again(self) -> None:
        prepare.main(self.arguments)

    def restore(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.folder / "old", self.root)

    def left(self) -> str:
        """ "old" or "new" if that is there and whole, "none" if no dataset is; else "mixed"."""
        seen = visible(self.root)
        if not any(name.startswith("datasets/own/") for name in seen):
            return "none"
        return {True: "old"}.get(seen == self.old, "new" if seen == self.new else "mixed")

    def finished(self) -> str:
        """What is there after the next call, with no trace of the killed one: "new"."""
        self.make_again()
        hidden = sorted(path.name for path in (self.root / "datasets").glob(".*"))
        return self.left() if hidden == [".own.lock"] else f"traces: {hidden}"


def prepare_faults(folder: Path, moments: int, seed: int) -> list[dict]:
    """Outcomes of a process that was killed at random moments of its life, by turns with SIGKILL
    and SIGTERM.

    left: "old" or "new", or "none" if it was killed between two renames; else a fault.
    finished: "new", what the next call makes of it; else a fault.
    status: -9, -15 or 143, or 0 if it ended before.
    """
    scene, rng = Scene(folder), random.Random(seed)
    start = time.perf_counter()
    subprocess.run(command(scene), check=True, capture_output=True)
    lasts, outcomes = time.perf_counter() - start, []
    for number in range(moments):
        scene.restore()
        kind = (signal.SIGKILL, signal.SIGTERM)[number % 2]
        seconds = rng.uniform(0, 1.1 * lasts)
        with subprocess.Popen(
            command(scene), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(kind)
            _, error = process.communicate()
        outcome = dict(signal=kind.name, seconds=seconds, status=process.returncode, error=error)
        outcomes.append(outcome | dict(left=scene.left(), finished=scene.finished()))
    return outcomes


def command(scene: Scene) -> list[str]:
    return [sys.executable, str(ROOT / "data" / "prepare.py"), *scene.arguments]


def kill_at_every_step(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(event, left, finished) of a process killed right before each change of the file system."""
    scene, step = Scene(folder), 0
    while True:
        scene.restore()
        event = killed_before(step, scene.make_again)
        if not event:
            return
        yield event, scene.left(), scene.finished()
        step += 1


def killed_before(step: int, job: Callable[[], None]) -> str:
    """The change that a fork of this process was about to make, when it was killed before it; ""
    if the job has fewer changes."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        seen = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal seen
            writes = event == "open" and "w" in str(arguments[1])
            if event in CHANGES or writes:
                if seen == step:
                    os.write(writer, f"{event} {Path(str(arguments[0])).name}".encode())
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        try:
            sys.addaudithook(watch)
            job()
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        event = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return event
