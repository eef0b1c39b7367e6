"""BullMQ's marker, by which an idle queue wakes one worker at a time."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from redis.exceptions import RedisError

from autoflow_worker.broker.channel import REPLY_PATIENCE, Channel
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.script_guard import guarded
from autoflow_worker.broker.scripts import PUT_MARKER

UNBLOCK_INTERVAL: Final = 0.02  # seconds after which CLIENT UNBLOCK is repeated
MAX_SCORE: Final = 2**53  # Redis allows an infinite score, too.


class Marker:
    """The marker of one queue, read over a connection of its own, which the client closes."""

    def __init__(self, redis: PipelinedRedis, keys: Mapping[str, str]) -> None:
        self._redis = redis
        self._key = keys["marker"]
        self._keys = [keys[name] for name in ("marker", "wait", "prioritized", "delayed")]
        self._put = redis.register_script(guarded(PUT_MARKER))
        self._channel: Channel | None = None

    async def open(self, client_name: str, timeout: float) -> None:
        """Open the connection; see `Channel.open`."""
        self._channel = await self._redis.open_blocking_channel(client_name, timeout)

    async def wait(
        self, seconds: float, wake: asyncio.Event, *, look_after: float | None = None
    ) -> int | None:
        """Block until there is a marker, which says that there are jobs.

        Args:
            seconds: how long, at most.
            wake: ends the wait early. CLIENT UNBLOCK lets the server say whether it had given the
                marker away by then. Closing the connection could lose that marker.
            look_after: seconds after which a marker is put if the queue has jobs without one.

        Returns:
            The marker's score, or None if there was no marker. Who took a score of 0 has to fetch,
            or to put the marker back. Another score is the epoch ms of the next delayed job.

        Raises:
            redis.exceptions.ConnectionError: a marker may have been taken all the same.
        """
        assert self._channel is not None, "open() comes first"
        command = ("BZPOPMIN", self._key, round(seconds, 3))
        patience = seconds + REPLY_PATIENCE
        reading = asyncio.ensure_future(self._channel.execute(command, patience=patience))
        waking = asyncio.ensure_future(wake.wait())
        looking: asyncio.Future[None] | None = None
        ends = {reading, waking}
        try:
            await asyncio.wait(ends, timeout=look_after, return_when=asyncio.FIRST_COMPLETED)
            if not (reading.done() or waking.done()):
                looking = asyncio.ensure_future(self._look())
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            while not reading.done():
                client_id = self._channel.link.client_id if self._channel.link is not None else 0
                # It may overtake the blocking command on its way to the server, so it is repeated.
                await self._redis.execute_command("CLIENT UNBLOCK", client_id)
                await asyncio.wait({reading}, timeout=UNBLOCK_INTERVAL)
            found = reading.result()
            return None if found is None else int(min(max(float(found[2]), 0), MAX_SCORE))
        finally:
            waking.cancel()
            reading.cancel()
            if looking is not None:
                looking.cancel()

    async def _look(self) -> None:
        with suppress(RedisError):  # The fetch after the wait says what is wrong.
            await self.put_back()

    async def put_back(self) -> None:
        """Wake another worker, if there are jobs for which a marker taken here was put."""
        await self._put(keys=self._keys)
