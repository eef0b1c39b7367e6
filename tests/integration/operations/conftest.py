"""The fixtures of the tests of `reconcile`."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.operations import reconcile
from autoflow_worker.operations.reconcile import Difference
from tests.support.reconciling import Compare


@pytest.fixture
async def compare(
    redis_url: str, database_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Compare]:
    """`await compare(fix=..., lost=...)`: the differences, by row id."""
    # Nothing runs beside it, unless a test says so.
    monkeypatch.setattr("autoflow_worker.operations.reconcile.SETTLING", 0.0)
    client = PipelinedRedis(redis_url)
    await client.open(30)

    async def run(**options: Any) -> dict[str, Difference]:
        found = reconcile.reconcile(client, database_url, prefix, **options)
        async with aclosing(found):
            return {difference.row_id: difference async for difference in found}

    yield run
    await client.aclose()
