"""Starts a script on several ranks of this machine: torch.distributed.run, for people.

    python tools/ranks.py 8 train_gpt.py

The exit status is that of the rank that failed, 128 + N for signal N; torchrun's is 1 for all of
them, below two tracebacks of its own. No name of this machine is looked up. SIGTERM, SIGINT and
SIGQUIT go to every rank, which has SECONDS to save and end. A hang-up is left to run.sh.
"""

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

SECONDS = 60
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # how ranks end when another has failed


def status_of(failures: dict) -> int:
    """Exit status of the rank that failed first; a line for each that a signal has killed.

    failures: rank -> ProcessFailure, those included that torchrun ended because of another."""
    own = {rank: f for rank, f in failures.items() if f.exitcode not in STOPPED} or failures
    for rank, failure in own.items():
        if failure.exitcode < 0:
            name = failure.signal_name()
            why = ": out of memory?" if name == "SIGKILL" else ""
            print(f"ranks: rank {rank} was killed by {name}{why}", file=sys.stderr)
    first = min(own.values(), key=lambda failure: failure.timestamp).exitcode
    return first if first >= 0 else 128 - first


def main(argv: list[str]) -> int:
    """argv: number of ranks, script, its arguments."""
    nproc, *command = argv
    options = [
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={nproc}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGQUIT",
        f"--shutdown-timeout={SECONDS}",
    ]
    logging.disable(logging.ERROR)  # torchrun's
    try:
        run.main([*options, *command])
    except ChildFailedError as error:
        return status_of(error.failures)
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
