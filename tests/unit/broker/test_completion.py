"""The arguments that are made here against those that the official package makes."""

import json
from collections.abc import AsyncIterator
from itertools import product
from typing import Any

import msgpack
import pytest
from bullmq import Job, Worker
from redis.asyncio import Redis

from autoflow_worker.broker.claim import Claim
from autoflow_worker.broker.job_fields import read_claim
from autoflow_worker.broker.scripts import CompletionArguments

JOBS: list[dict[str, Any]] = [
    {},
    {"attempts": 3, "removeOnComplete": 100},
    {"failParentOnFailure": True},
    {"continueParentOnFailure": True},
    {"ignoreDependencyOnFailure": True},
    {"removeDependencyOnFailure": True},
]
KEEP = [None, False, True, 0, 100, {"age": 60}, {"count": 5, "limit": 10}]
WORKERS: list[dict[str, Any]] = [
    {},
    {"limiter": {"max": 1, "duration": 1000}, "lockDuration": 1234},
    {"metrics": {"maxDataPoints": 60}},
    {"metrics": {}},
]


@pytest.fixture
async def redis() -> AsyncIterator[Redis]:
    client = Redis(decode_responses=True)  # which is never connected
    yield client
    await client.aclose()


async def test_the_same_as_the_official_packages(redis: Redis) -> None:
    value = {"success": True, "output": ["ü", 1.5, None]}
    for options in WORKERS:
        worker = Worker("mail:out", None, {**options, "connection": redis, "prefix": "p"})
        arguments = CompletionArguments(worker.keys, worker.opts)
        for job_options, keep, fetch_next in product(JOBS, KEEP, [True, False]):
            job = Job(worker, "mail", {}, job_options, "job-1")
            job.attemptsMade = 2
            theirs = worker.scripts.moveToCompletedArgs(job, value, keep, "a-token", fetch_next)
            text = json.dumps(value)
            claim = _claim_of(job, token="a-token")
            ours = arguments(claim, text, keep, fetch_next=fetch_next, now_ms=0)
            assert ours[0] == theirs[0]
            assert _read(ours[1]) == _read(theirs[1])


async def test_what_can_not_be_packed_leaves_nothing_behind(redis: Redis) -> None:
    worker = Worker("mail", None, {"connection": redis, "prefix": "p"})
    arguments = CompletionArguments(worker.keys, worker.opts)
    claim = _claim_of(Job(worker, "mail", {}, {}, "job-1"), token="t")
    expected = arguments(claim, "1", 100, fetch_next=True, now_ms=0)
    with pytest.raises(OverflowError):
        arguments(claim, "1", {"age": 2**70}, fetch_next=True, now_ms=0)
    assert arguments(claim, "1", 100, fetch_next=True, now_ms=0) == expected


def _claim_of(job: Job, *, token: str) -> Claim:
    fields = {"name": job.name, "opts": json.dumps(job.opts), "atm": str(job.attemptsMade)}
    return read_claim(job.queue, fields, job.id, token, 0)


def _read(arguments: list[Any]) -> list[Any]:
    job_id, _now_ms, field, value, target, fetch, base, packed = arguments
    return [job_id, field, json.loads(value), target, fetch, base, msgpack.unpackb(packed)]
