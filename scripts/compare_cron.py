"""Compares next times of schedules with BullMQ's in Node: `scripts/compare_cron.py [COUNT] [SEED]`.

It prints how many differ, for BullMQ 6.7 (cron-parser 5.10) and for 5.65 (cron-parser 4.9), and the
first ones in full. The exit code is 1 if one differs from BullMQ 6.7.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Final, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["TZ"] = "Europe/Berlin"

from tests.support.node import Node
from tests.support.schedules import cases, differences

SHOWN = 5
VERSIONS: Final[list[tuple[Literal[5, 6], str]]] = [
    (5, "5.65, cron-parser 4.9"),
    (6, "6.7, cron-parser 5.10"),
]


async def main(count: int = 5000, seed: int = 1) -> int:
    """Return the exit code."""
    drawn = list(cases(seed, count))
    differ = 0
    for version, name in VERSIONS:
        # No connection is opened.
        async with Node(version, "redis://127.0.0.1:1", "none") as node:
            found = await differences(node, drawn)
        differ = len(found)
        refused = sum("at" in ours and "at" not in theirs for _, ours, theirs in found)
        taken = sum("at" not in ours and "at" in theirs for _, ours, theirs in found)
        print(
            f"BullMQ {name}: {differ} of {count} differ; only Node refuses {refused}, "
            f"only this worker refuses {taken}"
        )
        for case, ours, theirs in found[:SHOWN]:
            print(f"  {case}\n    here {ours}\n    Node {theirs}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*map(int, sys.argv[1:]))))
