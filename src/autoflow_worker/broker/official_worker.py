"""Make bullmq's `Worker`, after a check that bullmq is the version that this package knows.

`scripts` makes the arguments of one of BullMQ's scripts itself, and `job_queue` calls private
methods of bullmq. Another version of bullmq could corrupt jobs in silence. So the first worker of a
process is compared with both before any job is touched.
"""

import copy
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import product
from typing import Any, Final

import msgpack
from bullmq import Worker

from autoflow_worker.broker.job_fields import read_claim
from autoflow_worker.broker.libraries import mismatch
from autoflow_worker.broker.paused_lists import PUSHING, differs
from autoflow_worker.broker.scripts import ClaimArguments, CompletionArguments

# The methods that are called by position, with their parameters in order.
_PARAMETERS: Final = {
    "moveToActive": ("token", "opts"),
    "moveToDelayedArgs": ("job_id", "timestamp", "token", "delay", "opts"),
    "retryJobArgs": ("job_id", "lifo", "token", "opts"),
    "extendJobLocks": ("job_ids", "tokens", "duration"),
    "moveStalledJobsToWait": ("maxStalledCount", "stalledInterval"),
    "getState": ("job_id",),
    "finishedErrors": ("opts",),
}
_COMMANDS: Final = ("moveToFinished", "moveToDelayed", "retryJob")

# The options of a worker and of a job, and which finished jobs to keep.
_CASES: Final[tuple[tuple[dict[str, Any], dict[str, Any], Any], ...]] = (
    ({}, {}, False),
    ({"metrics": {"maxDataPoints": 60}}, {"attempts": 3}, 100),
    ({"limiter": {"max": 1, "duration": 1000}}, {"failParentOnFailure": True}, True),
    ({"lockDuration": 1234, "metrics": {}}, {"removeDependencyOnFailure": True}, {"age": 60}),
)

_known: Final[set[type[Worker]]] = set()


def official_worker(name: str, redis: Any, prefix: str, options: Mapping[str, Any]) -> Worker:
    """Make bullmq's `Worker` without a processor: it starts nothing, and sends no command.

    Raises:
        LibraryMismatchError: the installed bullmq differs from the one that this package knows.
    """
    given = {**options, "connection": redis, "prefix": prefix}
    if Worker in _known:
        return Worker(name, None, given)
    try:
        worker = Worker(name, None, given)
        difference = next(_differences(worker, given), None)
    except Exception as error:
        # Another version may raise anything.
        raise mismatch("bullmq", f"{type(error).__name__}: {error}") from error
    if difference is not None:
        raise mismatch("bullmq", difference)
    _known.add(Worker)
    return worker


def _differences(worker: Worker, given: Mapping[str, Any]) -> Iterator[str]:
    clients = [worker.scripts.commands[name].registered_client for name in _COMMANDS]
    over_given = all(client is given["connection"] for client in clients)
    if not given.items() <= worker.opts.items() or not over_given:
        yield "Worker takes other arguments"
    for name, expected in _PARAMETERS.items():
        found = tuple(inspect.signature(getattr(worker.scripts, name)).parameters)
        if found != expected:
            yield f"{name} takes {', '.join(found)}"
    for name in sorted(PUSHING):
        if differs(name, worker.scripts.commands[name].script):
            yield f"{name} puts jobs into `wait` in another way"
    for (options, job_options, keep), fetch_next in product(_CASES, (True, False)):
        shaped = copy.copy(worker)
        shaped.opts = {**worker.opts, **options}
        # A worker's name is packed here, as by Node, and left out by bullmq's methods.
        shaped.opts.pop("name", None)
        yield from _differences_of(shaped, job_options, keep, fetch_next=fetch_next)


def _differences_of(
    worker: Worker, job_options: Mapping[str, Any], keep: Any, *, fetch_next: bool
) -> Iterator[str]:
    """Compare the arguments of the script for a made-up job."""
    text = json.dumps(job_options)
    fields = {"name": "a-name", "data": "{}", "opts": text, "timestamp": "1", "atm": "2"}
    claim = read_claim(worker, fields, "an-id", "a-token", 0)
    keys, args = CompletionArguments(worker.keys, worker.opts)(
        claim, '{"a":1}', keep, fetch_next=fetch_next, now_ms=0
    )
    completed = keys, _readable(args)
    about = keep, "a-token", fetch_next
    theirs = worker.scripts.moveToCompletedArgs(claim.job, {"a": 1}, *about)
    if (theirs[0], _readable(theirs[1])) != completed:
        yield "moveToCompletedArgs packs something else than this worker"
    failure = {"failedReason": "a reason"}
    theirs = worker.scripts.moveToFailedArgs(claim.job, "a reason", *about, failure)
    if (theirs[0], _readable(theirs[1])) != _as_failed(worker, *completed):
        yield "moveToFailedArgs packs something else than this worker expects"
    claiming = ClaimArguments(worker.keys, worker.opts)
    ours = claiming("a-token", now_ms=0)
    theirs = _claim_arguments(worker)
    if (theirs[0], _readable(theirs[1])) != (ours[0], _readable(ours[1])):
        yield "moveToActive packs something else than this worker"
    fetching = {"fetchNext": True, "workerOpts": worker.opts}
    *_, packed = worker.scripts.moveToDelayedArgs("an-id", 0, "a-token", 0, fetching)[1]
    if msgpack.unpackb(packed) != msgpack.unpackb(claiming.packed("a-token")):
        yield "moveToDelayedArgs packs something else than this worker"


def _claim_arguments(worker: Worker) -> tuple[list[str], list[Any]]:
    """Return what bullmq's `moveToActive` sends, with a command that sends nothing."""
    sent: dict[str, Any] = {}

    async def command(**given: Any) -> None:
        sent.update(given)

    scripts = copy.copy(worker.scripts)
    scripts.commands = {"moveToActive": command}
    claiming = scripts.moveToActive("a-token", worker.opts)
    with suppress(StopIteration):
        claiming.send(None)
    claiming.close()
    return sent["keys"], sent["args"]


def _as_failed(worker: Worker, keys: list[str], args: list[Any]) -> tuple[list[str], list[Any]]:
    """Turn the keys and arguments of a completed job into those of a failed one."""
    known, metrics = worker.keys, worker.keys[""] + "metrics:"
    others = {known["completed"]: known["failed"], metrics + "completed": metrics + "failed"}
    job_id, _, _, _, *rest = args
    failed = [job_id, "failedReason", "a reason", "failed", *rest, ["failedReason", "a reason"]]
    return [others.get(key, key) for key in keys], failed


def _readable(args: list[Any]) -> list[Any]:
    """Unpack the arguments, and leave out the second, which is the time."""
    rest = [args[0], *args[2:]]
    return [msgpack.unpackb(arg) if isinstance(arg, bytes) else arg for arg in rest]
