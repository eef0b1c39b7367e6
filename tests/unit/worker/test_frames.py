"""Frames between a worker and its handlers' processes, also where foreign bytes are among them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflow_worker.worker.frames import MAX_HEAD, Decoder, Frame, FrameError, Kind, encode

MANY = [
    Frame(Kind.RUN, {"job": 1, "id": "\ud800"}, b"{}"),
    Frame(Kind.DONE, {}, b""),
    Frame(Kind.LINE, {"a": [1, None]}, b"\0" * 300),
]


@given(st.integers(1, 400))
def test_frames_arrive_whole_however_they_are_cut(size: int) -> None:
    data = b"".join(encode(*frame) for frame in MANY)
    decoder = Decoder(max_body=300)
    found = []
    for start in range(0, len(data), size):
        decoder.feed(data[start : start + size])
        while frame := decoder.next():
            found.append(frame)
    assert found == MANY


@pytest.mark.parametrize(
    "data",
    [
        b"hello, this is no frame at all",
        encode(Kind.DONE, {}, b"x" * 301),
        encode(Kind.DONE, {"a": "x" * MAX_HEAD}),
        encode(Kind.DONE, {}).replace(b"{}", b"[]"),
        encode(Kind.DONE, {}).replace(b"{}", b"}{"),
        encode(Kind.DONE, {}).replace(b"\x16", b"\xff"),
    ],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    decoder = Decoder(max_body=300)
    decoder.feed(data)
    with pytest.raises(FrameError):
        decoder.next()
