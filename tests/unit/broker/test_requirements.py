import pytest

from autoflow_worker.broker.requirements import assess_redis
from autoflow_worker.errors import RedisUnfitError

GOOD = {
    "redis_version": "7.2.4",
    "role": "master",
    "redis_mode": "standalone",
    "cluster_enabled": 0,
    "maxmemory_policy": "noeviction",
}


def test_a_server_that_will_do() -> None:
    report = assess_redis(GOOD)
    assert report.server == "Redis 7.2.4"
    assert report.warnings == ()
    assert assess_redis(GOOD | {"redis_version": "6.2.0"}).warnings == ()


def test_valkey_tells_both_versions() -> None:
    report = assess_redis(GOOD | {"valkey_version": "8.1.1", "server_name": "valkey"})
    assert report.server == "Valkey 8.1.1 (Redis 7.2.4)"


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"redis_version": "6.0.16"}, "6.2.0 or later is recommended"),
        ({"redis_version": "unstable"}, "does not tell its version"),
        ({"maxmemory_policy": "allkeys-lru"}, "maxmemory-policy is allkeys-lru"),
    ],
)
def test_what_should_be_changed(change: dict[str, object], warning: str) -> None:
    [found] = assess_redis(GOOD | change).warnings
    assert warning in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"redis_version": "4.0.14"}, "too old"),
        ({"role": "slave"}, "replica"),
        ({"redis_mode": "cluster"}, "cluster"),
        ({"cluster_enabled": 1}, "cluster"),
    ],
)
def test_what_can_not_work(change: dict[str, object], reason: str) -> None:
    with pytest.raises(RedisUnfitError, match=reason):
        assess_redis(GOOD | change)


def test_a_server_that_says_nothing_will_do() -> None:
    assert len(assess_redis({}).warnings) == 1
