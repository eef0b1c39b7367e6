"""Whether a pooler between this worker and PostgreSQL gives each connection a session of its own.

The recorder prepares statements and sets planner options, which belong to a session. PgBouncer in
transaction or statement mode assigns a session anew for each transaction. So the options would
reach other programs, and the prepared statements would be missing.
"""

import asyncio
import os
import socket
from contextlib import suppress
from typing import Final

import psycopg

from autoflow_worker.recording.pool import Connection, conninfo

# How often two connections are compared; once is enough, unless other clients use the pooler.
ROUNDS: Final = 5

# Seconds for a second connection, which waits for ever if the pooler has a single session.
SECOND_PATIENCE: Final = 2.0


async def shares_sessions(first: Connection, url: str) -> bool:
    """Whether two connections get the same session in turn, as in PgBouncer's transaction mode.

    Args:
        first: in autocommit mode.
        url: where a second connection is made.

    Raises:
        psycopg.Error: a connection is lost.
    """
    if await _session(first) == first.info.backend_pid:
        return False  # The number is PostgreSQL's own, so there is no pooler.
    try:
        async with asyncio.timeout(SECOND_PATIENCE):
            second = await psycopg.AsyncConnection.connect(conninfo(url), autocommit=True)
    except TimeoutError:
        return False  # It waits for the session that the first connection holds.
    hung_up = False

    def hang_up() -> None:
        nonlocal hung_up
        hung_up = True
        _shut(second)

    # Don't cancel the task: psycopg would ask the pooler for seconds to cancel the statement.
    timer = asyncio.get_running_loop().call_later(SECOND_PATIENCE, hang_up)
    try:
        return await _are_dealt_out(first, second)
    except psycopg.OperationalError:
        if hung_up:
            return False  # as above
        raise
    finally:
        timer.cancel()
        await second.close()


async def _are_dealt_out(first: Connection, second: Connection) -> bool:
    own = await _session(first)
    for _ in range(ROUNDS):
        try:
            await second.execute("BEGIN")
        except psycopg.errors.ProtocolViolation:
            return True  # which is how PgBouncer refuses it in statement mode
        if await _session(second) == own or await _session(first) != own:
            return True
        await second.execute("ROLLBACK")
    return False


def _shut(connection: Connection) -> None:
    with (
        suppress(OSError, psycopg.Error),
        socket.socket(fileno=os.dup(connection.pgconn.socket)) as duplicate,
    ):
        duplicate.shutdown(socket.SHUT_RDWR)


async def _session(connection: Connection) -> int:
    row = await (await connection.execute("SELECT pg_backend_pid()")).fetchone()
    return int(row[0]) if row else 0
