"""What a process of handlers prints, line by line."""

import asyncio
import os
from collections.abc import Callable
from typing import Final

MAX_LINE: Final = 8_192
"""Bytes of a line; a longer one arrives in parts."""

_READ_SIZE: Final = 16 * 1024
_FLOOD_PAUSE: Final = 0.02
_LAST_READS: Final = 64


class ChildOutput:
    """A pipe for a process's stdout and stderr.

    A process that prints faster than about 1 MB a second has to wait, as at a slow terminal. So it
    does not keep the event loop busy.

    Attributes:
        descriptor: the end that the process writes to.
    """

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._loop = asyncio.get_running_loop()
        self._reader, self.descriptor = os.pipe()
        os.set_blocking(self._reader, False)
        self._rest = b""
        self._is_open = True

    def abandon(self) -> None:
        """Close both ends: there is no process."""
        os.close(self.descriptor)
        self._is_open = False
        os.close(self._reader)

    def read(self) -> None:
        """Begin to read; the process has its end by now."""
        os.close(self.descriptor)
        self._loop.add_reader(self._reader, self._on_readable)

    def drain(self) -> None:
        """Read what was printed so far, up to the size of a pipe or so."""
        for _ in range(_LAST_READS):
            if not self._read_once():
                return

    def close(self) -> None:
        """Read the rest, and close."""
        self.drain()
        if self._rest:
            self._tell(self._rest)
        self._shut()

    def _on_readable(self) -> None:
        if self._read_once() >= _READ_SIZE and self._is_open:
            self._loop.remove_reader(self._reader)
            self._loop.call_later(_FLOOD_PAUSE, self._go_on)

    def _go_on(self) -> None:
        if self._is_open:
            self._loop.add_reader(self._reader, self._on_readable)

    def _read_once(self) -> int:
        if not self._is_open:
            return 0
        try:
            data = os.read(self._reader, _READ_SIZE)
        except BlockingIOError:
            return 0
        if not data:
            self._shut()
            return 0
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._tell(line)
        while len(self._rest) > MAX_LINE:
            self._tell(self._rest[:MAX_LINE])
            self._rest = self._rest[MAX_LINE:]
        return len(data)

    def _tell(self, line: bytes) -> None:
        self._on_line(line.removesuffix(b"\r").decode(errors="backslashreplace"))

    def _shut(self) -> None:
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._reader)
            os.close(self._reader)
