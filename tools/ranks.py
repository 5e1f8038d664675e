"""Starts a script on several ranks of this machine: torch.distributed.run, for people.

    python tools/ranks.py 8 train_gpt.py

The exit status is that of the rank that failed, 128 + N for signal N; torchrun's is 1 for all of
them, below two tracebacks of its own. No name of this machine is looked up. SIGTERM, SIGINT and
SIGQUIT go to every rank, which has SECONDS to save and end. A hang-up is left to run.sh.

What several ranks say on stderr, a warning or why they end, is shown once: rank 0's as it comes, in
the end what another rank has said that rank 0 has not. stdout is that of all ranks.
"""

import contextlib
import logging
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

SECONDS = 60
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # how ranks end when another has failed
LOST = re.compile(r"Connection (closed|reset) by peer")  # which another rank has caused, by ending
NAME = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)  # torch puts it before each line of a traceback
# By a thread of gloo that still runs when a rank ends, which is then killed by SIGABRT
ABORTED = "terminate called without an active exception\n"
STDERR = "*/attempt_0/{}/stderr.log"  # where torchrun keeps that of a rank


def was_aborted(failure, text: str) -> bool:
    return failure.exitcode == -signal.SIGABRT and text.endswith(ABORTED)


def status_of(failures: dict, texts: list[str]) -> int:
    """Exit status of the rank that failed first; a line for each that a signal has killed.

    failures: rank -> ProcessFailure, those included that torchrun ended because of another. texts:
    what each rank said on stderr."""
    own = {rank: f for rank, f in failures.items() if f.exitcode not in STOPPED} or failures
    explained = any(text.replace(ABORTED, "").strip() for text in texts)  # why they end
    ended = {rank for rank in own if explained and was_aborted(own[rank], texts[rank])}
    for rank, failure in own.items():
        if failure.exitcode < 0 and rank not in ended:
            name = failure.signal_name()
            why = ": out of memory?" if name == "SIGKILL" else ""
            print(f"ranks: rank {rank} was killed by {name}{why}", file=sys.stderr)
    first = min(own, key=lambda rank: own[rank].timestamp)
    status = 1 if first in ended else own[first].exitcode
    return status if status >= 0 else 128 - status


def follow(folder: Path, ended: threading.Event) -> None:
    """Shows what rank 0 says on stderr, as it comes."""
    file, last = None, False
    while not last:
        last = ended.wait(0.1)
        for path in [] if file else folder.glob(STDERR.format(0)):
            file = path.open(errors="backslashreplace")
        with contextlib.suppress(OSError):  # nobody reads any more
            text = file.read().replace(ABORTED, "") if file else ""
            print(text, end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def following(folder: Path) -> Iterator[None]:
    ended = threading.Event()
    thread = threading.Thread(target=follow, args=(folder, ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def said(folder: Path) -> list[str]:
    """On stderr, by each rank in turn, without its name."""
    paths = sorted(folder.glob(STDERR.format("*")), key=lambda path: int(path.parent.name))
    return [NAME.sub("", path.read_text(errors="backslashreplace")) for path in paths]


def unlike_rank_0(texts: list[str]) -> list[str]:
    """What other ranks said and rank 0 did not, once; not that they lost a rank, if one of them
    says why it ended."""
    known, new = texts[0].splitlines() if texts else [], []
    causes = [text for text in texts if text.strip() and not LOST.search(text)]
    for text in texts[1:]:
        lost = LOST.search(text) and causes
        if not lost and set(text.splitlines()) - {*known}:
            known += text.splitlines()
            new.append(text)
    return new


def start(options: list[str], folder: Path) -> int:
    """Exit status. folder: where torchrun keeps what ranks say."""
    try:
        run.main(options)
    except ChildFailedError as error:
        return status_of(error.failures, said(folder))
    except SignalException as error:
        return 128 + error.sigval
    return 0


def main(argv: list[str]) -> int:
    """argv: number of ranks, script, its arguments."""
    nproc, *command = argv
    options = [
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={nproc}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGQUIT",
        f"--shutdown-timeout={SECONDS}",
        "--redirects=2",
    ]
    logging.disable(logging.ERROR)  # torchrun's
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        with following(Path(folder)):
            status = start([*options, f"--log-dir={folder}", *command], Path(folder))
        texts = [text.replace(ABORTED, "") for text in said(Path(folder))]
        with contextlib.suppress(OSError):
            print(*unlike_rank_0(texts), sep="", end="", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
