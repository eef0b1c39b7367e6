"""Whether the installed bullmq and redis-py are the ones that this package knows.

It uses parts of both that are not their public interface, so another minor version may break it,
or do something else without a word. `official_worker` has the check of bullmq.
"""
# ruff: noqa: PLC0415 - what another version may lack is imported where that can be told

import re
from functools import cache
from typing import Any

from autoflow_worker.errors import LibraryMismatchError

_CONNECTION = ("_writer", "_reader", "_close", "client_name", "connect", "send_command")
_SCRIPT = ("registered_client", "script", "sha")


def mismatch(library: str, difference: object) -> LibraryMismatchError:
    """The error that names the installed version, the one that is needed, and what differs."""
    from importlib.metadata import PackageNotFoundError, requires, version

    try:
        installed, lines = version(library), requires("autoflow-worker") or []
    except PackageNotFoundError:
        installed, lines = "of an unknown version", []
    is_it = re.compile(rf"{library}[^\w.-]")
    needed = next((line for line in lines if is_it.match(line)), library)
    return LibraryMismatchError(
        f"{library} {installed} is installed, and this worker needs {needed}: {difference}\n"
        f"To mend it: pip install '{needed}'"
    )


def mismatch_of_import(error: ImportError) -> LibraryMismatchError | None:
    """The error that tells which name one of the two libraries lacks; None: it is not theirs."""
    library = (error.name or "").partition(".")[0]
    return mismatch(library, error) if library in {"bullmq", "redis"} else None


@cache
def require_known_redis() -> None:
    """Check once that redis-py has what `link`, `replies` and `client` use of it.

    Raises:
        LibraryMismatchError: it lacks something.
    """
    try:
        _check_redis()
    except Exception as error:
        # Whatever another version breaks on.
        raise mismatch("redis", f"{type(error).__name__}: {error}") from error


def _check_redis() -> None:
    from redis._parsers.base import BaseParser
    from redis.asyncio import ConnectionPool, Redis
    from redis.commands.core import AsyncScript
    from redis.exceptions import NoScriptError

    pool: Any = ConnectionPool()
    parser: Any = BaseParser
    connection = pool.make_connection()
    for name in _CONNECTION:
        getattr(connection, name)
    script = AsyncScript(Redis(connection_pool=pool), "return 1")
    for name in _SCRIPT:
        getattr(script, name)
    if not isinstance(parser.parse_error("NOSCRIPT No matching script"), NoScriptError):
        raise TypeError("the reply NOSCRIPT is another error")
