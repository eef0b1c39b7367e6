"""Whether a URL is one that its driver can read.

The drivers' own parsers have the last word, so that a start can't fail on what this let pass. No
fault quotes the URL: where one is malformed, nobody can say which part was meant as the password.
"""

import re
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,20}(?=://)")
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_UNKNOWN_OPTION = re.compile(
    r"(?:unexpected keyword argument|URI query parameter:) ['\"](\w+)['\"]"
)


def redis_url(url: str) -> str:
    """Return the URL without outer blanks.

    Raises:
        ValueError: redis-py can't use it.
    """
    url = _outline(url, {"redis", "rediss", "unix"})
    if url.lower().startswith("unix:") and not urlsplit(url).path:
        raise ValueError("it names no socket file")
    from redis.asyncio import ConnectionPool  # noqa: PLC0415 - heavy, and needed for a start only

    try:
        pool: Any = ConnectionPool.from_url(url)
        pool.make_connection()
    except Exception as error:
        raise ValueError(_option_fault(error)) from None
    return url


def database_url(url: str) -> str:
    """Return the URL without outer blanks.

    Raises:
        ValueError: libpq can't use it.
    """
    url = _outline(url, {"postgres", "postgresql"})
    from psycopg import Error, conninfo  # noqa: PLC0415 - as above

    try:
        conninfo.conninfo_to_dict(url)
    except Error as error:
        raise ValueError(_option_fault(error)) from None
    return url


def _option_fault(error: Exception) -> str:
    option = _UNKNOWN_OPTION.search(str(error))
    return f"it has no option {option[1]!r}" if option else "the driver can't read its options"


def _outline(url: str, schemes: Collection[str]) -> str:
    url = url.strip()
    if any(character.isspace() or not character.isprintable() for character in url):
        raise ValueError("it contains a blank or a control character")
    scheme = SCHEME.match(url)
    if scheme is None or scheme[0].lower() not in schemes:
        raise ValueError("its scheme is another one" if scheme else "it has no scheme")
    if _BARE_PERCENT.search(url):
        raise ValueError("a % in a user name or password has to be written as %25")
    try:
        parts = urlsplit(url)
        # PostgreSQL takes several hosts separated by commas, which urlsplit can't take apart.
        _ = "," in parts.netloc or parts.port
    except ValueError:
        raise ValueError(
            "its host or port can't be read; in a user name or password, / ? # @ : [ ] have to be "
            "written percent-encoded"
        ) from None
    return url
