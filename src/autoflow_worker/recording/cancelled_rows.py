"""Asks PostgreSQL which of the running tasks were cancelled meanwhile."""

import json
from collections.abc import Collection
from typing import Final

import psycopg

from autoflow_worker.outage import Silence
from autoflow_worker.recording.pool import Checkout, Pool

_CANCELLED: Final = """
SELECT id FROM tasks
WHERE id = ANY (ARRAY (SELECT json_array_elements_text($1::json)))
  AND data->>'status' = 'cancelled'
"""


class CancelledRows:
    """Looks for cancelled rows over a connection of its own, which it keeps.

    Args:
        pool: has a connection to spare beside the recorder's lanes.
        silence: is told when the server hangs.
    """

    def __init__(self, pool: Pool, silence: Silence) -> None:
        self._checkout = Checkout(pool, silence)

    async def among(self, row_ids: Collection[str]) -> set[str]:
        """Return the ids of those rows whose status is `cancelled`.

        Return none while PostgreSQL is away or refuses: the next question finds them.
        """
        try:
            link = await self._checkout.link()
            found = await link.execute(_CANCELLED, json.dumps(list(row_ids)).encode())
        except (psycopg.Error, OSError):
            await self._checkout.replace()
            return set()
        return {row_id for (row_id,) in found if row_id is not None}

    async def close(self) -> None:
        """Disconnect. May be called twice."""
        await self._checkout.close()
