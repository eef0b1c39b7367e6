"""A worker whose Redis a test may break."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.support.configured import ConfiguredRedis
from tests.support.database import Database
from tests.support.proxy import Proxy
from tests.support.redis_scene import Scene
from tests.support.servers import OwnServer


@pytest.fixture
async def scene(
    make_redis: Callable[..., Awaitable[OwnServer]], db: Database, prefix: str
) -> AsyncIterator[Scene]:
    configured, other = OwnServer(ConfiguredRedis()), await make_redis()
    try:
        await configured.start()
        async with Proxy(configured.url) as proxy:
            scene = Scene(configured, other, proxy, db, prefix)
            await scene.load_scripts()
            yield scene
    finally:
        await configured.close()
