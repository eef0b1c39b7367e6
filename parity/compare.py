"""The differences between the two sides, and those of them that are by design."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from parity.scenario import ALL, VERSIONS, Json, Scenario, Version

FILE: Final = Path(__file__).with_name("differences.toml")
SHOWN: Final = 300
"""Characters of a value in the report."""

_MISSING: Final = "(nothing)"


@dataclass(frozen=True)
class Difference:
    """One value that is not the same on both sides."""

    path: str
    node: Any
    ours: Any

    def __str__(self) -> str:
        node, ours = str(self.node), str(self.ours)
        # Long values are alike at their beginnings.
        same = next((n for n, (a, b) in enumerate(zip(node, ours, strict=False)) if a != b), 0)
        start = max(0, same - SHOWN // 3)
        node, ours = node[start : start + SHOWN], ours[start : start + SHOWN]
        dots = "… " if start else ""
        return f"{self.path}\n      node: {dots}{node}\n      ours: {dots}{ours}"


@dataclass
class Named:
    """An entry of the file: differences that are by design.

    Attributes:
        scenarios: their names; in each of them something has to match.
        paths: patterns of the differences' paths.
        why: the reason.
        versions: of BullMQ.
        matched: where something matched.
    """

    scenarios: list[str]
    paths: list[str]
    why: str
    versions: list[int] = field(default_factory=lambda: list(VERSIONS))
    matched: set[tuple[str, Version]] = field(default_factory=set)

    def covers(self, scenario: str, version: Version, path: str) -> bool:
        return (
            scenario in self.scenarios
            and version in self.versions
            and any(fnmatchcase(path, pattern) for pattern in self.paths)
        )

    def stale(self, ran: Sequence[tuple[str, Version]]) -> list[tuple[str, Version]]:
        """Return where, of what ran, nothing matched."""
        return [
            (scenario, version)
            for scenario, version in ran
            if scenario in self.scenarios
            and version in self.versions
            and (scenario, version) not in self.matched
        ]


def named_differences() -> list[Named]:
    """Read the file.

    Raises:
        ValueError: an entry names a scenario that is not there.
    """
    entries = [Named(**entry) for entry in tomllib.loads(FILE.read_text()).get("difference", [])]
    for entry in entries:
        if unknown := set(entry.scenarios) - ALL.keys():
            raise ValueError(f"{FILE.name} names scenarios that are not there: {unknown}")
    return entries


def differences(scenario: Scenario, node: Json, ours: Json) -> list[Difference]:
    """Return how two snapshots differ, without what varies from run to run."""
    return [
        found
        for found in _differences("", node, ours)
        if not any(fnmatchcase(found.path, pattern) for pattern in scenario.varies)
    ]


def _differences(path: str, node: Any, ours: Any) -> Iterator[Difference]:
    if isinstance(node, Mapping) and isinstance(ours, Mapping):
        for key in sorted(node.keys() | ours.keys()):
            below = f"{path}/{key}" if path else str(key)
            yield from _differences(below, node.get(key, _MISSING), ours.get(key, _MISSING))
    elif node != ours:
        yield Difference(path, node, ours)
