"""Translates REDIS_URL from ioredis' form to redis-py's, and checks it.

redis-py's own parser decides at the end, so that a URL that passes here can't fail at the start.
"""

import inspect
import re
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from autoflow_worker.urls import ENCODED, SCHEME, option_fault, outline

_DATABASE_NUMBER = re.compile(r"/?[0-9]*/?")

# Options of ioredis that have no effect here: how the worker retries, queues, parses and names
# connections is not configurable.
_MEANINGLESS: Final = frozenset(
    """
    autoPipeliningIgnoredCommands autoResendUnfulfilledCommands autoResubscribe blockingTimeout
    blockingTimeoutGrace clientInfoTag commandTimeout connectionName disableClientInfo
    disconnectTimeout enableAutoPipelining enableOfflineQueue enableReadyCheck keepAlive lazyConnect
    maxLoadingRetryTime maxRetriesPerRequest monitor name noDelay offlineQueue readOnly
    reconnectOnError retryStrategy role showFriendlyErrorStack socketTimeout stringNumbers
    """.split()  # noqa: SIM905 - a list of words
)
_TRANSLATED: Final = frozenset({"connectTimeout", "family", "keyPrefix", "sentinels", "tls"})


def redis_url(url: str) -> str:
    """Return the URL as redis-py reads it; the option `family` (4 or 6) stays for `broker.client`.

    Takes ioredis' forms too: no scheme, a port alone, a socket's path, and its options. A URL that
    this function returned is returned unchanged.

    Raises:
        ValueError: the URL can't be used; the message says why and shows no part of it.
    """
    url = _with_redis_scheme(url.strip())
    if _names_several(url):
        raise ValueError("Sentinel and Cluster are not supported; name one server")
    url = outline(url, {"redis", "rediss", "unix"})
    parts = urlsplit(url)
    socket_file = parts.scheme == "unix"
    if socket_file and not parts.path:
        raise ValueError("it names no socket file")
    if socket_file and parts.netloc and "@" not in parts.netloc:
        raise ValueError("a socket's path begins with a slash, as in unix:///run/...")
    if not socket_file and not _DATABASE_NUMBER.fullmatch(parts.path):
        raise ValueError(f"the path after its host is not a database's number; {ENCODED}")
    url = _translated(url, parts.query, has_number=not socket_file and len(parts.path) > 1)
    _try_redis(url)
    return url


def _with_redis_scheme(url: str) -> str:
    if SCHEME.match(url):
        return url
    if url.isdecimal():
        return f"redis://localhost:{url}"
    if url.startswith("//"):
        return f"redis:{url}"
    if url.startswith("/"):
        return f"unix://{url}"
    return f"redis://{url}" if url and "://" not in url else url


def _names_several(url: str) -> bool:
    scheme, _, rest = url.partition("://")
    if "sentinel" in scheme.lower() or "cluster" in scheme.lower():
        return True
    # A comma in a password or in an option does not separate hosts.
    return "," in re.split(r"[/?#]", rest.rpartition("@")[2], maxsplit=1)[0]


def _translated(url: str, query: str, *, has_number: bool) -> str:
    scheme, _, rest = url.partition("?")[0].partition("#")[0].partition("://")
    scheme = scheme.lower()
    options = []
    for name, value in parse_qsl(query):
        if name in _MEANINGLESS or (name == "db" and has_number):  # ioredis uses the path's
            continue
        if name == "tls" and scheme != "unix" and value.lower() in {"true", "1"}:
            scheme = "rediss"
            continue
        options += _translated_option(name, value)
    if scheme == "unix":
        options = [(name, value) for name, value in options if name != "family"]
    encoded = urlencode(options, quote_via=quote)
    return f"{scheme}://{rest}" + (f"?{encoded}" if encoded else "")


def _translated_option(name: str, value: str) -> list[tuple[str, str]]:
    if name == "tls":
        raise ValueError("its option tls can only be true; write the scheme rediss:// instead")
    if name == "keyPrefix":
        raise ValueError("BullMQ supports no keyPrefix; set BULLMQ_PREFIX to the queues' prefix")
    if name == "sentinels":
        raise ValueError("Sentinel is not supported; name one server")
    if name == "family":
        if value not in {"0", "4", "6"}:
            raise ValueError("its option family must be 4 or 6")
        return [] if value == "0" else [(name, value)]
    if name == "connectTimeout":
        if not value.isdecimal():
            raise ValueError("its option connectTimeout must be a number of milliseconds")
        # 0 means no limit in ioredis; here the worker's own limit stays.
        return [("socket_connect_timeout", f"{int(value) / 1000:g}")] if int(value) else []
    return [(name, value)]


def _try_redis(url: str) -> None:
    from redis.asyncio import ConnectionPool  # noqa: PLC0415 - heavy, and needed for a start only

    pool: Any = None
    try:
        pool = ConnectionPool.from_url(url)
        pool.connection_kwargs.pop("family", None)  # `broker.client` reads it
        pool.make_connection()
    except Exception as error:
        classes = pool.connection_class.__mro__ if pool is not None else ()
        known = {name for each in classes for name in inspect.signature(each.__init__).parameters}
        known -= {"self", "args", "kwargs"}
        raise ValueError(option_fault(error, url, known | _MEANINGLESS | _TRANSLATED)) from None
