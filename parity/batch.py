"""A batch of scenarios: all of them told at once, on both sides and with both versions."""

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from redis.asyncio import Redis

from parity.compare import Difference, differences
from parity.rows import Rows, faults_of_rows
from parity.scenario import Json, Scenario, Version
from parity.side import Side
from parity.snapshot import Comparable, read
from tests.support.database import open_database
from tests.support.node import Node, NodeProcess
from tests.support.process import WorkerProcess

ROOT: Final = Path(__file__).parents[1]
NODE, OURS = "node", "ours"
SETTLED_AFTER: Final = 0.1
"""Seconds after which two equal looks at Redis mean that nothing more comes."""


@dataclass(frozen=True)
class Servers:
    """Where both sides' jobs and rows are; each version has a database of its own."""

    redis_url: str
    database_urls: Mapping[Version, str]
    prefix: str


@dataclass
class Found:
    """What a scenario came to with one version."""

    scenario: str
    version: Version
    differences: list[Difference] = field(default_factory=list)


class Gate:
    """Where stories wait for each other: the workers act when all of them have come."""

    def __init__(self, stories: int) -> None:
        self._missing = stories
        self._complete = asyncio.Event()
        self._opened = asyncio.Event()
        self.come: set[object] = set()

    async def reach(self, story: object) -> None:
        self.pass_by(story)
        await self._opened.wait()

    def pass_by(self, story: object) -> None:
        """Count a story in that does not wait here, because it has ended."""
        if story not in self.come:
            self.come.add(story)
            if len(self.come) == self._missing:
                self._complete.set()

    async def complete(self) -> None:
        await self._complete.wait()

    def open(self) -> None:
        self._opened.set()


class Batch:
    """Tells some scenarios.

    Args:
        folder: for the output of worker processes.
        prefix: of all its keys.
    """

    def __init__(
        self,
        scenarios: Sequence[Scenario],
        versions: Sequence[Version],
        servers: Servers,
        folder: Path,
        prefix: str,
    ) -> None:
        self._tellings = [
            (scenario, version, who)
            for scenario in scenarios
            for version in versions
            if version in scenario.versions
            for who in (NODE, OURS)
        ]
        self._servers = servers
        self._folder = folder
        self._prefix = prefix
        self._start = Gate(len(self._tellings))
        self._kill = Gate(len(self._tellings))
        self._kills = any(scenario.kills for scenario in scenarios)
        self._stack = AsyncExitStack()
        self._processes: list[WorkerProcess] = []
        self._node_workers: list[NodeProcess] = []

    async def run(self) -> list[Found]:
        async with self._stack as stack:
            redis = Redis.from_url(self._servers.redis_url, decode_responses=True)
            await stack.enter_async_context(redis)
            producers = stack.enter_context(NodeProcess())
            nodes = {
                (version, who): await stack.enter_async_context(
                    Node(
                        version,
                        self._servers.redis_url,
                        self._prefix_of(version, who),
                        process=producers,
                    )
                )
                for version in self._versions
                for who in (NODE, OURS)
            }
            tellings = [
                asyncio.create_task(self._tell(redis, nodes, *telling))
                for telling in self._tellings
            ]
            try:
                await self._start.complete()
                await self._start_workers()
                self._start.open()
                if self._kills:
                    await self._kill.complete()
                    self._kill_workers()
                    await self._start_workers()
                    self._kill.open()
                told = await asyncio.gather(*tellings)
            finally:
                for task in tellings:
                    task.cancel()
                for process in self._processes:
                    await asyncio.to_thread(process.close)
        snapshots = dict(zip(self._tellings, told, strict=True))
        return [
            Found(
                scenario.name,
                version,
                differences(scenario, node, snapshots[scenario, version, OURS]),
            )
            for (scenario, version, who), node in snapshots.items()
            if who == NODE
        ]

    @property
    def _versions(self) -> list[Version]:
        return sorted({version for _, version, _ in self._tellings})

    def _prefix_of(self, version: Version, who: str) -> str:
        return f"{self._prefix}-{version}-{who}"

    # -- stories -------------------------------------------------------------------------------

    async def _tell(
        self,
        redis: Redis,
        nodes: Mapping[tuple[Version, str], Node],
        scenario: Scenario,
        version: Version,
        who: str,
    ) -> Json:
        prefix = self._prefix_of(version, who)
        me = (scenario.name, version, who)
        side = Side(
            scenario,
            version,
            redis,
            nodes[version, who],
            prefix,
            is_node=who == NODE,
            start=lambda: self._start.reach(me),
            kill=lambda: self._kill.reach(me),
        )
        try:
            await scenario.story(side)
        except Exception as error:
            # The other stories go on; what was seen so far helps to find the cause.
            side.fact(f"the story breaks with {who}", str(error).splitlines()[0])
        finally:
            self._start.pass_by(me)
            self._kill.pass_by(me)
        comparable = Comparable(prefix, scenario)
        before: Json = {}
        for _ in range(20):
            found = comparable.all(await read(redis, prefix, scenario), side.facts)
            if found == before:
                break
            before = found
            await asyncio.sleep(SETTLED_AFTER)
        if who == OURS:
            rows = await self._rows(version)
            for fault in await faults_of_rows(redis, prefix, scenario, rows):
                job, _, what = comparable.text(fault).partition(" ")
                found[f"rows/{job.strip(':')}"] = what
        return found

    async def _rows(self, version: Version) -> Rows:
        async with open_database(self._servers.database_urls[version]) as database:
            return await database.rows()

    # -- workers -------------------------------------------------------------------------------

    async def _start_workers(self) -> None:
        process = self._stack.enter_context(NodeProcess())
        self._node_workers.append(process)
        started = [self._start_process(version) for version in self._versions]
        for version in self._versions:
            prefix = self._prefix_of(version, NODE)
            node = Node(version, self._servers.redis_url, prefix, process=process)
            await self._stack.enter_async_context(node)
            for queue, options in self._queues(version).items():
                await node.work(queue, **options)
        for worker in started:
            await worker.until_logged("worker_started")

    def _start_process(self, version: Version) -> WorkerProcess:
        folder = self._folder / f"{self._prefix}-{len(self._processes) + 1}"
        folder.mkdir(parents=True)
        env = {
            **os.environ,
            # The worker of this very tree, whatever else may be installed.
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
            "TASKS_CONFIG": "parity.tasks_config:tasks",
            "WORKER_QUEUES": ",".join(self._queues(version)),
            "REDIS_URL": self._servers.redis_url,
            "DATABASE_URL": self._servers.database_urls[version],
            "BULLMQ_PREFIX": self._prefix_of(version, OURS),
            "LOG_FORMAT": "json",
        }
        process = WorkerProcess(["start"], env, folder)
        self._processes.append(process)
        return process

    def _kill_workers(self) -> None:
        self._node_workers[-1].kill()
        for process in self._processes:
            process.send(signal.SIGKILL)

    def _queues(self, version: Version) -> dict[str, Json]:
        """The worker options of each queue that this version serves."""
        return {
            queue: options
            for scenario, served, who in self._tellings
            if served == version and who == NODE
            for queue, options in scenario.queues.items()
        }
