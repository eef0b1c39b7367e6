"""What a handler is promised of its job, against what it gets: no type checker knows bullmq."""

import inspect
import typing
from collections.abc import AsyncIterator

import pytest
from bullmq import Job, Worker
from redis.asyncio import Redis

from autoflow_worker import JobHandle
from autoflow_worker.broker.handler_job import HandlerJob, job_from

METHODS = {
    name: member
    for name, member in vars(JobHandle).items()
    if inspect.isfunction(member) and not name.startswith("_")
}
PROPERTIES = {name for name, member in vars(JobHandle).items() if isinstance(member, property)}


@pytest.fixture
async def job() -> AsyncIterator[HandlerJob]:
    redis = Redis(decode_responses=True)  # which is never connected
    worker = Worker("mail", None, {"connection": redis, "prefix": "p"})
    fields = {"name": "mail", "data": "{}", "opts": '{"de":{"id":"once"}}', "timestamp": "1"}
    yield job_from(worker, fields, "j1")
    await redis.aclose()


async def test_it_has_what_a_handle_promises(job: HandlerJob) -> None:
    assert isinstance(job, HandlerJob)
    for name in (*typing.get_type_hints(JobHandle), *PROPERTIES):
        assert hasattr(job, name), name
    assert (job.queueName, job.prefix, job.queueQualifiedName) == ("mail", "p", "p:mail")
    assert job.deduplicationId == "once"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_what_the_handle_says(name: str) -> None:
    promised = inspect.signature(METHODS[name]).parameters.values()
    taken = inspect.signature(getattr(HandlerJob, name)).parameters.values()
    assert [p.name for p in taken] == [p.name for p in promised]
    assert [p.default is p.empty for p in taken] == [p.default is p.empty for p in promised]


async def test_the_worker_that_claimed_it_has_its_name_there(job: HandlerJob) -> None:
    assert job.processedBy is None
    assert job_from(job.queue, {"name": "mail", "pb": "mail-1"}, "j2").processedBy == "mail-1"


async def test_a_job_that_is_made_by_itself_has_the_same_attributes(job: HandlerJob) -> None:
    alone = HandlerJob(job.queue, "mail", {}, {}, "j1")
    assert vars(alone).keys() == vars(job).keys()
    assert isinstance(alone, Job)
