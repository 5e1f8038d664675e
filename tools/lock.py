"""Locks what file descriptor 9 of a shell is, as flock(1), which macOS does not have. For run.sh.

    exec 9>>FILE; python tools/lock.py FILE

The lock stays until the shell and all that it has started since have closed the descriptor. Runs on
any Python, as it comes before what is installed.
"""

import errno
import fcntl
import sys

try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError as error:
    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
        why = "run in a copy of the folder on a disk that knows locks"
        sys.exit(f"run.sh: {sys.argv[1]}: {error.strerror}: {why}")
    who = "another ./run.sh, or what it has started, is at work in this folder"
    why = "wait until it has ended, or run in a copy of the folder"
    sys.exit(f"run.sh: {sys.argv[1]}: {who}: {why}")
