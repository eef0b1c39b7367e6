"""An output that blocks, fills up or is closed costs log lines, never the worker."""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from autoflow_worker.logs.writer import MAX_WAITING_LINES, LogWriter
from tests.support.until import until


class Pipe:
    """A pipe whose reading end does nothing by itself."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        self.stream = os.fdopen(writer, "w")

    def close(self) -> None:
        with suppress(OSError):
            os.close(self.reader)
        with suppress(OSError):
            self.stream.close()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


async def test_a_blocked_output_blocks_nobody(pipe: Pipe) -> None:
    writer = LogWriter(pipe.stream)
    lines = 2 * MAX_WAITING_LINES
    for number in range(lines):
        writer.msg(f"{number:>99}")
    assert not writer.flush(0.01)

    received: list[bytes] = []

    def read() -> None:
        while data := os.read(pipe.reader, 1 << 16):
            received.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    assert writer.flush(20)
    writer.msg("last")
    assert writer.flush(20)
    pipe.stream.close()
    await until(lambda: not reader.is_alive())
    text = b"".join(received).decode().splitlines()
    assert text[0].strip() == "0"
    assert text[-1] == "last"
    dropped = [int(line.split()[1]) for line in text if "dropped" in line]
    assert dropped
    assert sum(dropped) + len(text) - len(dropped) - 1 == lines


def test_an_output_whose_reader_comes_back_is_used_again(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with fifo.open("w") as stream:
        writer = LogWriter(stream)
        writer.msg("zero")
        assert writer.flush(20)
        os.close(reader)
        for line in ("one", "two"):
            writer.msg(line)
            assert writer.flush(20)
        with fifo.open("rb", buffering=0) as file:
            writer.msg("three")
            assert writer.flush(20)
            expected = b"... 2 log lines lost: Broken pipe\nthree\n"
            # What a pipe still held goes with its reader.
            assert file.read(1000).endswith(expected)


def test_a_full_disk_that_has_room_again_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    code = (
        "import resource, sys\n"
        "from autoflow_worker.logs.writer import LogWriter\n"
        "writer = LogWriter(open(sys.argv[1], 'w'))\n"
        "def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))\n"
        "def say(line):\n"
        "    writer.msg(line)\n"
        "    assert writer.flush(20)\n"
        "limit(10)\n"
        "say('before')\n"
        "say('torn')\n"
        "say('lost')\n"
        "limit(-1)\n"
        "say('after')\n"
        "say('last')\n"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)
    assert path.read_text().splitlines() == [
        "before",
        "tor",
        "... 2 log lines lost: File too large",
        "after",
        "last",
    ]


def test_a_closed_output_is_given_up() -> None:
    stream = io.StringIO()
    stream.close()
    writer = LogWriter(stream)
    writer.msg("one")
    assert writer.flush(10)
    assert LogWriter(None).flush(10)


def test_a_non_blocking_output_is_waited_for(pipe: Pipe) -> None:
    os.set_blocking(pipe.stream.fileno(), False)
    writer = LogWriter(pipe.stream)
    text = "x" * 1_000_000
    writer.msg(text)
    received = b""
    while len(received) < len(text) + 1:
        received += os.read(pipe.reader, 1 << 16)
    assert received.decode() == text + "\n"
