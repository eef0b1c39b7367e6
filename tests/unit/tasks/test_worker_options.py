from typing import Any

import pytest

from autoflow_worker.errors import TaskListError
from autoflow_worker.tasks.worker_options import check_worker_options


def strategy(attempts_made: int, kind: str, error: BaseException, job: object) -> int:
    return 0


async def async_strategy(attempts_made: int, kind: str, error: BaseException, job: object) -> int:
    return 0


async def too_short(attempts_made: int) -> int:
    return 0


@pytest.mark.parametrize(
    "options",
    [
        {"name": "mailer-1"},
        {"lockDuration": 100, "lockRenewTime": 99},
        {"stalledInterval": 1000},
        {"maxStalledCount": 0},
        {"drainDelay": 0.5},
        {"maximumRateLimitDelay": 200},
        {"limiter": {"max": 1, "duration": 1000}},
        {"removeOnComplete": True},
        {"removeOnComplete": 100, "removeOnFail": -1},
        {"removeOnFail": {"age": 3600, "count": 10, "limit": 5}},
        {"metrics": {"maxDataPoints": 20160}},
        {"maxStartedAttempts": 3},
        {"settings": {"backoffStrategy": strategy}},
        {"settings": {"backoffStrategy": async_strategy}},
        {"settings": {"repeatStrategy": lambda millis, options, name: None}},
        {},
    ],
)
def test_options_with_an_effect_pass(options: dict[str, Any]) -> None:
    checked = check_worker_options("q", options)
    assert checked == options
    assert checked is not options


def test_none_is_none() -> None:
    assert check_worker_options("q", None) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 5}, r"concurrency has no effect here: set TaskOptions\(concurrency="),
        ({"concurrency": 5}, "WORKER_CONCURRENCY, and restart .*setGlobalConcurrency"),
        ({"maxStartedAttempts": 0}, "maxStartedAttempts must be a whole number from 1"),
        ({"blockingConnection": True}, "a connection of its own"),
        ({"workerForkOptions": {}}, "for Node only"),
        ({"connection": {}}, "REDIS_URL"),
        ({"prefix": "x"}, "BULLMQ_PREFIX"),
        ({"autorun": False}, "autorun has no effect"),
        ({"skipVersionCheck": True}, "check"),
        ({"lockDuratoin": 1000}, "did you mean lockDuration"),
        ({"zzz": 1}, "there are drainDelay, limiter"),
        ({1: 1}, "1 is not a BullMQ worker option"),
        ({"name": "two words"}, "without blanks"),
        ({"name": ""}, "name must be"),
        ({"lockDuration": 99}, "from 100 to"),
        ({"lockDuration": 1000.0}, "whole number"),
        ({"lockDuration": True}, "whole number"),
        ({"lockDuration": "30000"}, "whole number"),
        ({"lockDuration": 500, "lockRenewTime": 500}, "shorter than lockDuration"),
        ({"lockRenewTime": 30_000}, "shorter than lockDuration"),
        ({"drainDelay": 0}, "drainDelay must be"),
        ({"drainDelay": float("nan")}, "drainDelay must be"),
        ({"drainDelay": True}, "drainDelay must be"),
        ({"maximumRateLimitDelay": 0}, "maximumRateLimitDelay must be a whole number from 1"),
        ({"maxStalledCount": -1}, "maxStalledCount must be"),
        ({"limiter": {"max": 1}}, r"limiter must be a dict with max \(jobs\) and duration \(ms\)"),
        ({"limiter": {"max": 0, "duration": 1}}, r"limiter must be .*, from 1, not \{'max': 0"),
        ({"limiter": {"max": 1, "duration": 1, "groupKey": "x"}}, r"limiter must be .*'groupKey'"),
        ({"limiter": 5}, "limiter must be a dict"),
        ({"removeOnComplete": "100"}, "removeOnComplete must be"),
        ({"removeOnFail": {}}, r"a dict with age \(seconds\) or count"),
        ({"removeOnFail": {"limit": 1}}, "not {'limit': 1}"),
        ({"removeOnFail": {"age": -1}}, "removeOnFail must be .* not {'age': -1}"),
        ({"metrics": {}}, "metrics must be a dict with maxDataPoints"),
        ({"settings": {"backoffStrategy": 5}}, "a dict with backoffStrategy, a function of"),
        (
            {"settings": {"backoffStrategy": lambda attempts: 0}},
            r"of \(attempts_made, type, error, job\)",
        ),
        ({"settings": {"backoffStrategy": too_short}}, r"of \(attempts_made, type, error, job\)"),
        ({"settings": {"repeatStrategy": lambda millis: 0}}, "or repeatStrategy, one of"),
        ({"settings": {}}, "a dict with backoffStrategy"),
        ({"settings": {"strategy": strategy}}, "settings must be .*'strategy'"),
        ("lockDuration", "must be a dict"),
    ],
)
def test_options_without_effect_or_sense_are_refused(options: Any, message: str) -> None:
    with pytest.raises(TaskListError, match=message) as caught:
        check_worker_options("mails", options)
    assert "task 'mails'" in str(caught.value)
