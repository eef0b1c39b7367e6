"""pytest's fixtures of autoflow-worker; docs/testing.md shows them.

The module stands beside the package, and imports it only for a test that asks: pytest imports this
in each run where the package is installed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from autoflow_worker.testing import EmbeddedServers, RecordingScheduler


@pytest.fixture
def run_task() -> Callable[..., Any]:
    """``autoflow_worker.testing.run_task``."""
    from autoflow_worker import testing

    return testing.run_task


@pytest.fixture
def recording_scheduler() -> "RecordingScheduler":
    """A ``RecordingScheduler`` of the test's own."""
    from autoflow_worker.testing import RecordingScheduler

    return RecordingScheduler()


@pytest.fixture(scope="session")
def autoflow_embedded_servers() -> "Iterator[EmbeddedServers]":
    """An embedded Redis and PostgreSQL server for the whole run."""
    from autoflow_worker.testing import embedded_servers

    with embedded_servers() as servers:
        yield servers


@pytest.fixture
def worker_on_embedded_servers(
    autoflow_embedded_servers: "EmbeddedServers",
) -> Callable[..., Any]:
    """``autoflow_worker.testing.worker_on_embedded_servers``, on the run's servers."""
    from autoflow_worker import testing

    return partial(testing.worker_on_embedded_servers, servers=autoflow_embedded_servers)
