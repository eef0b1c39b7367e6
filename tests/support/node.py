"""The real BullMQ in Node: it adds jobs as the API does, and sees what the API sees."""

import asyncio
import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from tests.support.database import new_task_id
from tests.support.until import PATIENCE, until

FOLDER = Path(__file__).parents[1] / "node"
NODE = FOLDER / "node_modules" / ".node"
EVENTS = (
    "added",
    "active",
    "completed",
    "failed",
    "delayed",
    "stalled",
    "progress",
    "waiting-children",
)
# Options of a job that BullMQ keeps for ever.
KEEP_ALL = {"removeOnComplete": False, "removeOnFail": False}
# A line of JSON holds a whole reply.
LINE_LIMIT = 64 * 1024 * 1024

Json = dict[str, Any]


class NodeError(Exception):
    """BullMQ in Node raised; the message is its stack."""


@dataclass(frozen=True)
class Event:
    """What a QueueEvents listener heard.

    Attributes:
        queue: the queue's name.
        name: "completed", "failed", ...
        args: `jobId`, and what the event carries, such as `returnvalue` or `failedReason`.
    """

    queue: str
    name: str
    args: Json


@dataclass
class Scheduled:
    """One job as the API schedules it.

    Attributes:
        payload: without `correlationId`.
        delay: in ms; None leaves it out.
        backoff: in ms, exponential.
        opts: more BullMQ options, or others in place of the API's.
    """

    payload: Mapping[str, Any] = field(default_factory=dict)
    task_id: str = field(default_factory=new_task_id)
    correlation_id: str = "a-correlation"
    priority: Literal["critical", "high", "normal", "low"] = "normal"
    attempts: int = 3
    delay: int | None = None
    backoff: int = 5000
    opts: Mapping[str, Any] = field(default_factory=dict)

    def as_command(self) -> Json:
        """What node.mjs takes."""
        return {
            "payload": dict(self.payload),
            "taskId": self.task_id,
            "correlationId": self.correlation_id,
            "priority": self.priority,
            "attempts": self.attempts,
            "delay": self.delay,
            "backoff": self.backoff,
            "opts": dict(self.opts),
        }


class NodeProcess:
    """A Node process that serves many `Node`s; a context manager. It dies with this process.

    Args:
        quiet: drop what it prints to stderr.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._stderr = subprocess.DEVNULL if quiet else None
        self._folder = Path(tempfile.mkdtemp(prefix="node-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = self._folder / "socket"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder)

    def start(self) -> None:
        """Start it, unless it runs, and return when it listens."""
        if self._process is not None and self._process.poll() is None:
            return
        assert NODE.exists(), "Node's packages are missing: run `make setup`"
        self.kill()
        self._process = subprocess.Popen(
            [NODE, FOLDER / "node.mjs", self.socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"listening\n", "Node did not start"

    def kill(self) -> None:
        """End it, if it runs."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
        self.socket.unlink(missing_ok=True)


class Node:
    """BullMQ in a Node process; an async context manager.

    Args:
        version: 5 (5.65, the API's today) or 6 (6.7).
        redis_url: where the queues are.
        prefix: the queues' key prefix.
        process: an existing process to share; None starts one.
        quiet: drop what an own process prints to stderr, as during outages that are meant.

    Attributes:
        events: what `listen()` has heard so far.
    """

    def __init__(
        self,
        version: Literal[5, 6],
        redis_url: str,
        prefix: str,
        *,
        process: NodeProcess | None = None,
        quiet: bool = False,
    ) -> None:
        self._session = {"version": version, "url": redis_url, "prefix": prefix}
        self._own = NodeProcess(quiet=quiet) if process is None else None
        self._process = process or self._own
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.events: list[Event] = []

    async def __aenter__(self) -> Self:
        assert self._process is not None
        await asyncio.to_thread(self._process.start)
        self._from_node, self._to_node = await asyncio.open_unix_connection(
            self._process.socket, limit=LINE_LIMIT
        )
        self._reader = asyncio.create_task(self._read())
        await self._write(self._session)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        try:
            # Node closes the session's queues, and then its side.
            self._to_node.write_eof()
            await asyncio.wait_for(asyncio.shield(self._reader), 5)
        except (TimeoutError, OSError):
            self._process.kill()
            await self._reader
        finally:
            self._to_node.close()
            if self._own is not None:
                self._own.__exit__()

    async def schedule(
        self, queue: str, payload: Mapping[str, Any] | None = None, **options: Any
    ) -> str:
        """Add a job as the API does (contract, section 1) and return its id.

        Args:
            queue: its name, and the job's.
            payload: without `correlationId`.
            options: the other attributes of `Scheduled`.
        """
        ids = await self.schedule_all(queue, [Scheduled(payload or {}, **options)])
        return ids[0]

    async def schedule_all(self, queue: str, jobs: Sequence[Scheduled]) -> list[str]:
        """Add many jobs as the API does, in one transaction per thousand; return their ids."""
        ids: list[str] = []
        for start in range(0, len(jobs), 1000):
            chunk = [job.as_command() for job in jobs[start : start + 1000]]
            ids += await self._call("schedule", queue=queue, jobs=chunk)
        return ids

    async def add(self, queue: str, data: object, *, name: str | None = None, **opts: Any) -> str:
        """`queue.add(name, data, opts)` as any other producer would, with BullMQ's own options."""
        result: str = await self._call("add", queue=queue, name=name or queue, data=data, opts=opts)
        return result

    async def next_millis(self, cases: Sequence[Json], *, tz: str) -> list[Json]:
        """Return each schedule's next time (`at`), or why BullMQ refuses it (`error`).

        Args:
            cases: `millis`, and repeat `options`.
            tz: the Node process's own zone.
        """
        return list(await self._call("nextMillis", cases=list(cases), tz=tz))

    async def flow(self, flow: Json) -> Json:
        """`FlowProducer.add(flow)`."""
        result: Json = await self._call("flow", flow=flow)
        return result

    async def queue(self, queue: str, method: str, *args: Any) -> Any:
        """Any method of Node's `Queue`: getWorkers, upsertJobScheduler, obliterate, ..."""
        return await self._call("queue", queue=queue, method=method, args=args)

    async def job(self, queue: str, job_id: str, method: str, *args: Any) -> Any:
        """Any method of Node's `Job`: getState, retry, promote, remove, ..."""
        return await self._call("job", queue=queue, jobId=job_id, method=method, args=args)

    async def get_job(self, queue: str, job_id: str) -> Json | None:
        """`queue.getJob(id)` as JSON: returnvalue, failedReason, attemptsMade, ...; or None."""
        result: Json | None = await self.queue(queue, "getJob", job_id)
        return result

    async def get_state(self, queue: str, job_id: str) -> str:
        """`queue.getJobState(id)`: completed, failed, delayed, active, waiting, ... or unknown."""
        result: str = await self.queue(queue, "getJobState", job_id)
        return result

    async def get_counts(self, queue: str) -> dict[str, int]:
        """`queue.getJobCounts()`: how many jobs there are of each state."""
        result: dict[str, int] = await self.queue(queue, "getJobCounts")
        return result

    async def get_workers(self, queue: str) -> list[Json]:
        """`queue.getWorkers()`: the workers that Node, and so a dashboard, sees."""
        result: list[Json] = await self.queue(queue, "getWorkers")
        return result

    async def pause(self, queue: str) -> None:
        """`queue.pause()`."""
        await self.queue(queue, "pause")

    async def resume(self, queue: str) -> None:
        """`queue.resume()`."""
        await self.queue(queue, "resume")

    async def work(self, queue: str, **opts: Any) -> None:
        """Start a Node `Worker` that does what each job's `payload["script"]` says.

        A script is a list of steps, one for each run: `{"return": value}`, `{"throw": message}`,
        `{"unrecoverable": message}`, `{"delay": ms}`, ...; `parity/script.py` has them all. The
        option `backoff` names one of the strategies in node.mjs.
        """
        await self._call("work", queue=queue, opts=opts)

    async def listen(self, queue: str, *events: str) -> None:
        """Collect a queue's events, its past ones too, with Node's `QueueEvents`."""
        await self._call("listen", queue=queue, events=events or EVENTS)

    def heard(self, name: str, job_id: str | None = None) -> list[Event]:
        """The events of one kind so far, of one job or of all."""
        return [
            event
            for event in self.events
            if event.name == name and job_id in (None, event.args.get("jobId"))
        ]

    async def until_heard(
        self, name: str, job_id: str | None = None, timeout: float = PATIENCE
    ) -> Event:
        """Wait for an event and return the first of its kind."""

        def missing() -> str:
            return f"event {name} of {job_id or 'any job'} among {self.events[-20:]}"

        heard: Callable[[], list[Event]] = lambda: self.heard(name, job_id)  # noqa: E731
        found: list[Event] = await until(heard, timeout, message=missing)
        return found[0]

    async def _call(self, command: str, **args: Any) -> Any:
        number = next(self._ids)
        reply = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._write({"id": number, "do": command, **args})
        return await reply

    async def _write(self, message: Json) -> None:
        self._to_node.write(json.dumps(message).encode() + b"\n")
        await self._to_node.drain()

    async def _read(self) -> None:
        async for line in self._from_node:
            message = json.loads(line)
            if "event" in message:
                self.events.append(Event(message["queue"], message["event"], message["args"]))
                continue
            reply = self._waiting.pop(message["id"])
            if reply.done():
                continue
            if "error" in message:
                reply.set_exception(NodeError(message["error"]))
            else:
                reply.set_result(message["result"])
        for reply in self._waiting.values():
            reply.cancel("the Node process ended")


async def produce(
    version: Literal[5, 6], redis_url: str, prefix: str, queue: str, jobs: Sequence[Scheduled]
) -> list[str]:
    """Start Node, add many jobs as the API does, end it; return their ids."""
    async with Node(version, redis_url, prefix) as node:
        return await node.schedule_all(queue, jobs)
