"""Runs scenarios in batches, and sorts what differs."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import parity.scenarios  # noqa: F401 - its modules enter their scenarios into ALL
from parity.batch import Batch, Found, Servers
from parity.compare import Difference, Named, named_differences
from parity.scenario import Scenario, Version

BATCH: Final = 24
"""Scenarios at once. Each has four workers' or queues' connections per side and version."""


@dataclass
class Result:
    """A scenario with one version: what differs, without and with a name."""

    scenario: str
    version: Version
    unnamed: list[Difference] = field(default_factory=list)
    named: list[tuple[Difference, Named]] = field(default_factory=list)


@dataclass
class Report:
    """What a run came to.

    Attributes:
        stale: entries of the file that match nothing any more, in words.
        seconds: the run's length.
    """

    results: list[Result]
    stale: list[str]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.stale and not any(result.unnamed for result in self.results)


async def run(
    scenarios: Sequence[Scenario], versions: Sequence[Version], servers: Servers, folder: Path
) -> Report:
    """Tell each scenario on both sides with each version, and compare.

    Args:
        folder: for the output of worker processes.
    """
    began = time.monotonic()
    entries = named_differences()
    found: list[Found] = []
    for number, some in enumerate(_batches(scenarios), 1):
        batch = Batch(some, versions, servers, folder, f"{servers.prefix}{number}")
        found += await batch.run()
    results = [_sorted(one, entries) for one in found]
    ran = [(result.scenario, result.version) for result in results]
    stale = [
        f"{scenario} with {version}: nothing matches {entry.paths} ({entry.why})"
        for entry in entries
        for scenario, version in entry.stale(ran)
    ]
    return Report(results, stale, time.monotonic() - began)


def _batches(scenarios: Sequence[Scenario]) -> Iterator[Sequence[Scenario]]:
    """Split scenarios into batches; those that have workers killed stay among themselves."""
    for kills in (False, True):
        some = [scenario for scenario in scenarios if scenario.kills == kills]
        for start in range(0, len(some), BATCH):
            yield some[start : start + BATCH]


def _sorted(found: Found, entries: Sequence[Named]) -> Result:
    result = Result(found.scenario, found.version)
    for difference in found.differences:
        for entry in entries:
            if entry.covers(found.scenario, found.version, difference.path):
                entry.matched.add((found.scenario, found.version))
                result.named.append((difference, entry))
                break
        else:
            result.unnamed.append(difference)
    return result
