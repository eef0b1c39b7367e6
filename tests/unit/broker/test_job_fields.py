"""What a claim reads by itself, against what bullmq's `Job` makes of the same fields."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from bullmq import Job, Worker
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from autoflow_worker.broker.claim import Claim
from autoflow_worker.broker.job_fields import read_by_job, read_claim

# What Node 5.65 writes for a job of the API, as a worker finds it.
FIELDS = {
    "name": "mail",
    "data": '{"to":"a@b.c","correlationId":"c1"}',
    "opts": '{"attempts":3,"backoff":{"type":"exponential","delay":1000},"removeOnComplete":100,'
    '"removeOnFail":500,"priority":3,"jobId":"j1"}',
    "timestamp": "1790000000000",
    "delay": "0",
    "priority": "3",
    "processedOn": "1790000000123",
    "ats": "1",
}

texts = st.text(max_size=4) | st.sampled_from(
    ["", "0", "-1", "1.5", "1e3", "٣", "null", "{}", "[]"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=3,
)
options = st.dictionaries(
    st.sampled_from(
        [
            *("attempts", "backoff", "removeOnComplete", "removeOnFail", "jobId", "fpof", "parent"),
            *("kl", "tm", "omc"),
        ]
    ),
    values,
    max_size=3,
)
changes = st.dictionaries(
    st.sampled_from(
        [
            *(*FIELDS, "atm", "defa", "failedReason", "parent", "progress", "rjk", "stacktrace"),
            *("pb", "stc"),
        ]
    ),
    texts | values.map(json.dumps),
    max_size=2,
)


@pytest.fixture
async def queue() -> AsyncIterator[Worker]:
    redis = Redis(decode_responses=True)  # which is never connected
    yield Worker("mail", None, {"connection": redis, "prefix": "p"})
    await redis.aclose()


@pytest.mark.parametrize(
    ("changes", "attempt"),
    [
        ({}, 1),
        ({"progress": "50"}, 1),
        ({"progress": '{"at":[1,2]}'}, 1),
        ({"opts": f'{FIELDS["opts"][:-1]},"tm":"{{}}","omc":true}}'}, 1),
        ({"atm": "1", "ats": "2", "failedReason": "no", "stacktrace": '["no"]'}, 2),
    ],
    ids=["as it comes", "with progress", "with an object as progress", "with telemetry", "retried"],
)
async def test_a_job_of_the_api_needs_no_job_object(
    queue: Worker, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], attempt: int
) -> None:
    fields = {**FIELDS, **changes}
    with monkeypatch.context() as patch:
        patch.setattr(Job, "fromJSON", lambda *given: pytest.fail("a Job is made"))
        claim = read_claim(queue, fields, "j1", "t", 0)
    data = json.loads(FIELDS["data"])
    assert (claim.data, claim.attempt, claim.max_attempts) == (data, attempt, 3)
    assert claim.job is claim.job
    assert (claim.job.id, claim.job.token, claim.job.data) == ("j1", "t", claim.data)


@given(changes=changes, more=options, left_out=st.sampled_from([*FIELDS, "nothing"]))
@example(changes={"data": " {}"}, more={}, left_out="nothing")
@example(changes={"data": "{} {}"}, more={}, left_out="nothing")
@example(changes={"progress": " 1"}, more={}, left_out="nothing")
@example(changes={"progress": "["}, more={}, left_out="nothing")
@example(changes={"stacktrace": "null"}, more={}, left_out="nothing")
@example(changes={"atm": ""}, more={}, left_out="nothing")
@example(changes={"atm": "-1"}, more={}, left_out="nothing")
@example(changes={"atm": str(2**53)}, more={}, left_out="nothing")
@example(changes={}, more={"tm": None, "omc": "?"}, left_out="nothing")
@example(changes={}, more={"attempts": True}, left_out="nothing")
@example(changes={}, more={"removeOnComplete": True}, left_out="nothing")
@example(changes={}, more={"backoff": 10**400}, left_out="nothing")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_it_reads_what_a_job_would(
    queue: Worker, changes: dict[str, str], more: dict[str, Any], left_out: str
) -> None:
    fields = {**FIELDS, "opts": json.dumps({**json.loads(FIELDS["opts"]), **more}), **changes}
    fields.pop(left_out, None)
    claim, expected = read_claim(queue, fields, "j1", "t", 0), Claim(queue, fields, "j1", "t", 0)
    read_by_job(expected)
    for name in (
        "attempt",
        "attempts_made",
        "attempts_started",
        "claimed_ms",
        "max_attempts",
        "scheduler",
        "timestamp",
        *(() if fields.get("defa") else ("malformed", "never")),
    ):
        assert getattr(claim, name) == getattr(expected, name), name
    # The data of a job that is to fail is not parsed, be it as broken as it may.
    if not fields.get("defa"):
        # NaN does not equal itself.
        assert json.dumps(claim.data) == json.dumps(expected.data)
    for name in ("removeOnComplete", "removeOnFail", "failParentOnFailure", "tm", "omc"):
        assert repr(claim.options.get(name)) == repr(expected.options.get(name)), name
    assert vars(claim.job).keys() == vars(expected.job).keys()
    for name in ("progress", "stacktrace", "failedReason", "attemptsMade"):
        assert repr(getattr(claim.job, name)) == repr(getattr(expected.job, name)), name


async def test_a_job_that_was_started_too_often_is_not_parsed(queue: Worker) -> None:
    fields = {**FIELDS, "data": "[", "ats": "3"}
    assert read_claim(queue, FIELDS, "j1", "t", 0, max_started=1).never is None
    claim = read_claim(queue, fields, "j1", "t", 0, max_started=2)
    assert claim.never == "job started more than allowable limit"
    claim = read_claim(queue, {**fields, "defa": "a child failed"}, "j1", "t", 0, max_started=2)
    assert claim.never == "a child failed"
