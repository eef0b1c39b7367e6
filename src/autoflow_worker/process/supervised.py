"""A worker's side of its supervisor: it reports to it, and does not outlive it.

The two share a socket, which the worker gets as its stdin. The socket's end says that the
supervisor has ended, also by SIGKILL.
"""

import os
import signal
import socket
import threading
from contextlib import suppress
from enum import Enum
from pathlib import Path


class Report(Enum):
    """What a worker tells its supervisor, as a byte."""

    READY = b"r"  # It takes jobs.
    WORN = b"w"  # A fresh process is to take its place.


class Supervision:
    """The connection to the supervisor, which sends this process SIGTERM when it ends.

    The process's stdin is `/dev/null` afterwards, so that no program that a handler starts reads
    from the supervisor.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(fileno=os.dup(0))
        with Path(os.devnull).open("rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        threading.Thread(target=self._watch, name="supervisor-watch", daemon=True).start()

    def report(self, what: Report) -> None:
        """Tell the supervisor; nothing happens if it has ended."""
        with suppress(OSError):
            self._socket.send(what.value)

    def _watch(self) -> None:
        with suppress(OSError):
            while self._socket.recv(1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
