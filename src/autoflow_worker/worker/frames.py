"""The frames in which a worker and a process of its handlers talk, over a socket.

A handler may write to any descriptor, also to this socket. So each frame begins with a mark, and
its parts are bounded: what is no frame ends the process, and costs one attempt.
"""

import json
import struct
from enum import IntEnum
from typing import Any, Final, NamedTuple

_MARK: Final = b"AFW1"
_LENGTHS: Final = struct.Struct("!4sBII")  # the mark, the kind, the bytes of head and of body

MAX_HEAD: Final = 512 * 1024
"""Bytes of a frame's head."""


class Kind(IntEnum):
    """What a frame is about. The first five go to the process, the others come back."""

    INIT = 1  # what it is to import, and how it logs
    RUN = 2  # a job; the body is its data
    CANCEL = 3  # a job is to end
    STOP = 4  # the worker is stopping
    QUIT = 5  # exit when nothing runs
    READY = 16
    INIT_FAILED = 17
    TAKEN = 18  # a job arrived: what happens from here on is its handler's doing
    PROGRESS = 19  # the body is JSON
    LOG = 20  # a line for the job's log in Redis
    LINE = 21  # a log line; the body is JSON
    DONE = 22  # the handler returned; the body is its output as JSON
    FAILED = 23


class Frame(NamedTuple):
    """One message: its kind, a small JSON object, and bytes that need not be parsed to pass on."""

    kind: Kind
    head: dict[str, Any]
    body: bytes


class FrameError(Exception):
    """What arrived is no frame."""


def encode(kind: Kind, head: dict[str, Any], body: bytes = b"") -> bytes:
    """Return the bytes of a frame."""
    # Not by orjson: an id may hold a lone surrogate.
    text = json.dumps(head, separators=(",", ":")).encode()
    return b"".join((_LENGTHS.pack(_MARK, kind, len(text), len(body)), text, body))


class Decoder:
    """Cuts a stream of bytes into frames.

    Args:
        max_body: bytes of a frame's body.
    """

    def __init__(self, max_body: int) -> None:
        self._max_body = max_body
        # Bytes to cut frames from, and what came after them: joined only when a frame is whole, as
        # one of 10 MB comes in many parts.
        self._bytes = b""
        self._start = 0
        self._parts: list[bytes] = []
        self._waiting = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        self._parts.append(data)
        self._waiting += len(data)

    def next(self) -> Frame | None:
        """Return the next whole frame, if it has arrived.

        Raises:
            FrameError: the stream holds something else.
        """
        if not self._has(_LENGTHS.size):
            return None
        start = self._start
        mark, kind, head_length, body_length = _LENGTHS.unpack_from(self._bytes, start)
        if mark != _MARK or head_length > MAX_HEAD or body_length > self._max_body:
            raise FrameError("no frame, or one that is too long")
        length = _LENGTHS.size + head_length + body_length
        if not self._has(length):
            return None
        start = self._start + _LENGTHS.size
        self._start += length
        body_start = start + head_length
        try:
            head = json.loads(self._bytes[start:body_start])
            if not isinstance(head, dict):
                raise FrameError("a head that is no object")
            return Frame(Kind(kind), head, self._bytes[body_start : self._start])
        except (ValueError, RecursionError) as error:
            raise FrameError(f"a frame that can't be read: {error}") from error

    def _has(self, length: int) -> bool:
        """Whether so many bytes have come that are in no frame yet; have them in one piece then."""
        there = len(self._bytes) - self._start
        if there >= length:
            return True
        if there + self._waiting < length:
            return False
        self._bytes = b"".join((self._bytes[self._start :], *self._parts))
        self._start = self._waiting = 0
        self._parts.clear()
        return True
