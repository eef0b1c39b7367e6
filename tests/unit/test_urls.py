"""REDIS_URL and DATABASE_URL: what is taken, what is refused, and that no password is shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflow_worker.broker.redis_urls import redis_url
from tests.support.environment import faults, load


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "rediss://user:p%40ss@h:6380/1?ssl_cert_reqs=none",
        "unix:///run/redis.sock?db=2",
        "unix://user:pass@/run/redis.sock",
        " redis://[::1]:6379/0\n",
    ],
)
def test_redis_urls(url: str) -> None:
    assert load(REDIS_URL=url).redis_url.get_secret_value() == url.strip()


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("localhost", "redis://localhost"),
        ("h:6379", "redis://h:6379"),
        ("h:6379/2", "redis://h:6379/2"),
        (":pass@h:6379", "redis://:pass@h:6379"),
        ("6380", "redis://localhost:6380"),
        (":p,w@h?client_name=a,b", "redis://:p,w@h?client_name=a%2Cb"),
        ("//h:6379", "redis://h:6379"),
        ("/run/redis.sock?db=2", "unix:///run/redis.sock?db=2"),
        ("REDIS://h", "redis://h"),
        ("redis://h/1?db=2", "redis://h/1"),
        ("redis://h?db=2", "redis://h?db=2"),
        ("redis://h?family=4", "redis://h?family=4"),
        ("rediss://h?family=6", "rediss://h?family=6"),
        ("h?family=0", "redis://h"),
        ("/run/redis.sock?family=4", "unix:///run/redis.sock"),
        ("redis://h?tls=true", "rediss://h"),
        ("redis://h?connectTimeout=2500", "redis://h?socket_connect_timeout=2.5"),
        ("redis://h?connectTimeout=0", "redis://h"),
        ("redis://h?username=u&password=p%26", "redis://h?username=u&password=p%26"),
        (
            (
                "redis://h/3?lazyConnect=true&maxRetriesPerRequest=null&enableReadyCheck=false"
                "&keepAlive=30000&connectionName=api&noDelay=true&enableOfflineQueue=false"
                "&showFriendlyErrorStack=true&socket_timeout=3"
            ),
            "redis://h/3?socket_timeout=3",
        ),
    ],
)
def test_redis_urls_as_ioredis_takes_them(url: str, meant: str) -> None:
    assert load(REDIS_URL=url).redis_url.get_secret_value() == meant
    assert load(REDIS_URL=meant).redis_url.get_secret_value() == meant


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("://h", "no scheme"),
        ("postgresql://h/db", "scheme"),
        ("unix://", "socket"),
        ("unix://run/redis.sock", "unix:///run"),
        ("redis://h/cache", "database's number"),
        ("redis://:12/34@h:1", "%40"),
        ("redis://:12?34@h:1", "%40"),
        ("redis://:12#34@h:1", "%40"),
        ("redis://h:port", "host or port"),
        ("redis://:pa#ss@h:1", "host or port"),
        ("redis://:pa%ss@h:1", "%25"),
        ("redis://h:99999", "host or port"),
        ("redis://h h", "blank"),
        ("redis://h?unheard_of=1", "no option 'unheard_of'"),
        ("redis://h?lazyconnect=1", "the nearest is 'lazyConnect'"),
        ("redis://h?socket_timeot=1", "the nearest is 'socket_timeout'"),
        ("redis://h?password=a&b=c", "options"),
        ("redis://h?socket_timeout=soon", "options"),
        ("redis://h?family=5", "4 or 6"),
        ("redis://h?connectTimeout=1s", "milliseconds"),
        ("redis://h?keyPrefix=app:", "BULLMQ_PREFIX"),
        ("redis://h?tls=RedisCloudFixed", "rediss://"),
        ("redis://h?sentinels=h:26379", "Sentinel"),
        ("redis-sentinel://h:26379/mymaster", "Sentinel"),
        ("redis+cluster://h:6379", "Cluster"),
        ("redis://u:p@h1:26379,h2:26379/0", "name one server"),
        ("h1:6379,h2:6379", "name one server"),
    ],
)
def test_redis_urls_that_can_not_work(url: str, reason: str) -> None:
    [fault] = faults(REDIS_URL=url)
    assert fault.startswith("REDIS_URL=")
    assert reason in fault
    assert "rediss://" in fault


@pytest.mark.parametrize(
    "url",
    [
        "postgres://u:p@h:5432/db?sslmode=require&connect_timeout=5",
        "postgresql://h1:5432,h2:5433/db?target_session_attrs=read-write",
        "postgresql:///db?host=/run/postgresql",
    ],
)
def test_database_urls(url: str) -> None:
    assert load(DATABASE_URL=url).database_url.get_secret_value() == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("host=h password=S3cr3t dbname=db", "key=value"),
        ("mysql://h/db", "scheme"),
        ("postgresql://u:p@h:port/db", "host or port"),
        ("postgresql://u:100%@h/db", "%25"),
        ("postgresql://h/db?unheard_of=1", "no option 'unheard_of'"),
        ("postgresql://h/db?ssl_mode=require", "the nearest is 'sslmode'"),
        ("postgresql://h/db?password=a&b=c", "options"),
        ("postgresql://[h/db", "host or port"),
    ],
)
def test_database_urls_that_can_not_work(url: str, reason: str) -> None:
    [fault] = faults(DATABASE_URL=url)
    assert fault.startswith("DATABASE_URL=")
    assert reason in fault


@pytest.mark.parametrize("separator", ["@", "/", "?", "#", "[", "/@", "?a=", "#?"])
@pytest.mark.parametrize("name", ["REDIS_URL", "DATABASE_URL"])
def test_a_password_that_is_not_encoded_is_refused_and_not_shown(name: str, separator: str) -> None:
    scheme = "redis" if name == "REDIS_URL" else "postgresql"
    if (name, separator) == ("REDIS_URL", "@"):
        return  # ioredis and redis-py both read it as it is meant
    # Digits, which could be a port.
    for head, tail in (("1234", "5678"), ("S3cr3t", "S3cr3t")):
        [fault] = faults(**{name: f"{scheme}://user:{head}{separator}{tail}@h:1/0"})
        assert "percent-encoded" in fault
        assert head not in fault.replace("5432", "")
        assert tail not in fault


_PARTS = (
    *("redis://", "rediss://", "unix://", "//", "/", ":", "@", "?", "&", "=", "#", "h", "u", "1"),
    *("family=4", "db=2", "connectTimeout=9", "tls=1", "lazyConnect=1", "%20", "[::1]", ",", "é"),
)


@given(st.lists(st.sampled_from(_PARTS), max_size=12).map("".join))
def test_what_a_redis_url_means_is_a_url_that_means_the_same(url: str) -> None:
    try:
        meant = redis_url(url)
    except ValueError:
        return
    assert redis_url(meant) == meant
