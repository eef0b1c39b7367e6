"""One telling of a scenario: what its story uses, whichever worker runs the jobs."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from redis.asyncio import Redis

from parity.scenario import Json, Scenario, Version
from tests.support.node import Event, Node
from tests.support.until import PATIENCE

FIRST_PAUSE: Final = 0.05
LAST_PAUSE: Final = 0.25
"""Seconds between two looks. Many stories look at once, so the pauses grow."""

Rendezvous = Callable[[], Awaitable[None]]


class Side:
    """A story's view of its queues; the producer is Node on both sides.

    Attributes:
        version: of the BullMQ that adds the jobs.
        is_node: whether Node's Worker runs the jobs.
        facts: what the story asked for.
        start: returns when the workers run.
        kill: returns when the workers were killed by SIGKILL and others run in their place.
    """

    def __init__(
        self,
        scenario: Scenario,
        version: Version,
        redis: Redis,
        node: Node,
        prefix: str,
        *,
        is_node: bool,
        start: Rendezvous,
        kill: Rendezvous,
    ) -> None:
        self.scenario = scenario
        self.version = version
        self.redis = redis
        self.node = node
        self.prefix = prefix
        self.is_node = is_node
        self.facts: Json = {}
        self.start = start
        self.kill = kill

    # -- names ---------------------------------------------------------------------------------

    def id(self, name: str) -> str:
        """Return a job's id. Rows of all scenarios are in one table, so it has the queue's name."""
        return name if name.isdigit() else f"{self.scenario.queue}-{name}"

    def short(self, job_id: str) -> str:
        """Return the name of a job with this id."""
        return job_id.removeprefix(f"{self.scenario.queue}-")

    def key(self, name: str, queue: str = "") -> str:
        return f"{self.prefix}:{self.scenario.queue_of(queue)}:{name}"

    # -- producing -----------------------------------------------------------------------------

    async def add(self, job: str | None, *steps: Json, queue: str = "", **opts: Any) -> str:
        """Add a job with this script; without a name BullMQ numbers it. Return its id."""
        own = {} if job is None else {"jobId": self.id(job)}
        data = {"script": list(steps)}
        return await self.node.add(self.scenario.queue_of(queue), data, **own, **opts)

    async def add_data(self, name: str, data: object, **opts: Any) -> str:
        """Add a job with any data."""
        return await self.node.add(self.scenario.queue, data, jobId=self.id(name), **opts)

    def child(
        self,
        name: str,
        *steps: Json,
        queue: str = "",
        children: list[Json] | None = None,
        **opts: Any,
    ) -> Json:
        """Return a job for `flow` or for the step `children`."""
        full = self.scenario.queue_of(queue)
        job = {
            "name": full,
            "queueName": full,
            "data": {"script": list(steps)},
            "opts": {"jobId": self.id(name), **opts},
        }
        return job if children is None else {**job, "children": children}

    async def flow(self, name: str, *steps: Json, **rest: Any) -> Json:
        """Add a flow; the arguments are those of `child`."""
        return await self.node.flow(self.child(name, *steps, **rest))

    async def let_go(self, *names: str) -> None:
        """Let jobs go on that are at the step `hold`."""
        for name in names:
            data = json.loads((await self.hash(name))["data"])
            await self.job(name, "updateData", {**data, "go": True})

    async def promote(self, *names: str, queue: str = "") -> None:
        """Have delayed jobs run now."""
        for name in names:
            await self.job(name, "promote", queue=queue)

    async def queue(self, method: str, *args: Any, queue: str = "") -> Any:
        """Call a method of Node's `Queue`."""
        return await self.node.queue(self.scenario.queue_of(queue), method, *args)

    async def job(self, name: str, method: str, *args: Any, queue: str = "") -> Any:
        """Call a method of Node's `Job`."""
        return await self.node.job(self.scenario.queue_of(queue), self.id(name), method, *args)

    async def schedule(self, repeat: Json, *steps: Json, **opts: Any) -> None:
        """Upsert the job scheduler `s`."""
        template = {
            "name": self.scenario.queue,
            "data": {"script": list(steps)},
            "opts": opts,
        }
        await self.queue("upsertJobScheduler", "s", repeat, template)

    async def listen(self) -> None:
        """Collect what Node's QueueEvents says of the main queue."""
        await self.node.listen(self.scenario.queue)

    def heard(self) -> list[Event]:
        return [event for event in self.node.events if event.queue == self.scenario.queue]

    # -- looking -------------------------------------------------------------------------------

    def fact(self, name: str, value: object) -> None:
        """Note a fact, which has to be equal on both sides."""
        self.facts[name] = value

    async def hash(self, name: str, queue: str = "") -> dict[str, str]:
        """Return the fields of a job."""
        fields: Any = await self.redis.hgetall(self.key(self.id(name), queue))
        found: dict[str, str] = fields
        return found

    async def is_in(self, state: str, name: str, queue: str = "") -> bool:
        """Tell whether a list or a set holds a job; "gone" asks if its hash is gone."""
        key, job_id = self.key(state, queue), self.id(name)
        if state == "gone":
            return not await self.redis.exists(self.key(job_id, queue))
        if state in LISTS:
            return await self.redis.lpos(key, job_id) is not None
        return await self.redis.zscore(key, job_id) is not None

    async def state(self, name: str, queue: str = "") -> str:
        """Return the list or set that holds a job, "gone" without its hash, else "nowhere"."""
        job_id = self.id(name)
        async with self.redis.pipeline(transaction=True) as pipeline:
            for state in SETS:
                pipeline.zscore(self.key(state, queue), job_id)
            for state in LISTS:
                pipeline.lpos(self.key(state, queue), job_id)
            pipeline.exists(self.key(job_id, queue))
            *places, exists = await pipeline.execute()
        held = [
            state for state, place in zip(SETS + LISTS, places, strict=True) if place is not None
        ]
        return held[0] if held else "nowhere" if exists else "gone"

    async def until(self, state: str, *names: str, queue: str = "") -> None:
        """Wait until each of these jobs is in a state: a list's or set's name, or "gone"."""
        for name in names:

            async def reached(name: str = name) -> bool:
                return await self.is_in(state, name, queue)

            await self.wait(reached, f"{name} to be {state}")

    async def left(self, state: str, name: str) -> None:
        """Wait until a job is no longer in a state."""

        async def out() -> bool:
            return not await self.is_in(state, name)

        await self.wait(out, f"{name} to leave {state}")

    async def ended(self, *names: str, queue: str = "") -> None:
        """Wait until each of these jobs is completed, failed or gone."""
        for name in names:

            async def over(name: str = name) -> bool:
                ends = ("completed", "failed", "gone")
                return any([await self.is_in(state, name, queue) for state in ends])

            await self.wait(over, f"the end of {name}")

    async def events(self, queue: str = "") -> list[dict[str, str]]:
        """Return the queue's events so far."""
        entries: Any = await self.redis.xrange(self.key("events", queue))
        return [fields for _, fields in entries]

    async def until_events(self, event: str, count: int, queue: str = "") -> None:
        """Wait until the queue has had so many events of a kind."""

        async def enough() -> bool:
            return sum(e["event"] == event for e in await self.events(queue)) >= count

        await self.wait(enough, f"{count} events {event}")

    async def until_count(self, state: str, count: int, queue: str = "") -> None:
        """Wait until a set or list has so many members."""

        async def counted() -> bool:
            key = self.key(state, queue)
            is_list = state in LISTS
            return int(await (self.redis.llen(key) if is_list else self.redis.zcard(key))) == count

        await self.wait(counted, f"{count} jobs to be {state}")

    async def wait(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        """Wait for a condition.

        Raises:
            AssertionError: it does not come true; the job hashes are of no use then.
        """
        deadline = time.monotonic() + PATIENCE / 3
        pause = FIRST_PAUSE
        while not await condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            await asyncio.sleep(pause)
            pause = min(pause * 1.2, LAST_PAUSE)


SETS = ("completed", "failed", "delayed", "prioritized", "waiting-children")
LISTS = ("wait", "active", "paused")
