"""Check that the installed bullmq and redis-py are the ones that this package knows.

This package uses private parts of both. Another minor version may break it, or change its behaviour
in silence. `official_worker` has the check of bullmq.
"""
# ruff: noqa: PLC0415 - an import that fails in another version is caught and reported

import re
from functools import cache
from typing import Any

from autoflow_worker.errors import LibraryMismatchError

_CONNECTION = ("_writer", "_reader", "_close", "client_name", "connect", "send_command")
_SCRIPT = ("registered_client", "script", "sha")


def mismatch(library: str, difference: object) -> LibraryMismatchError:
    """Return the error that names the installed version, the needed one, and the difference."""
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
    """Return the error that names what one of the two libraries lacks; None for other imports."""
    library = (error.name or "").partition(".")[0]
    return mismatch(library, error) if library in {"bullmq", "redis"} else None


@cache
def require_known_redis() -> None:
    """Check once that redis-py has what `link`, `replies` and `client` use of it.

    Raises:
        LibraryMismatchError: redis-py lacks something.
    """
    try:
        _check_redis()
    except Exception as error:
        # Another version may raise anything.
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
