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
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        self._buffer += data

    def next(self) -> Frame | None:
        """Return the next whole frame, if it has arrived.

        Raises:
            FrameError: the stream holds something else.
        """
        buffer = self._buffer
        if len(buffer) < _LENGTHS.size:
            return None
        mark, kind, head_length, body_length = _LENGTHS.unpack_from(buffer)
        if mark != _MARK or head_length > MAX_HEAD or body_length > self._max_body:
            raise FrameError("no frame, or one that is too long")
        body_start = _LENGTHS.size + head_length
        end = body_start + body_length
        if len(buffer) < end:
            return None
        with memoryview(buffer) as view:
            head_text, body = bytes(view[_LENGTHS.size : body_start]), bytes(view[body_start:end])
        del buffer[:end]
        try:
            head = json.loads(head_text)
            if not isinstance(head, dict):
                raise FrameError("a head that is no object")
            return Frame(Kind(kind), head, body)
        except (ValueError, RecursionError) as error:
            raise FrameError(f"a frame that can't be read: {error}") from error
