"""The backoff's `jitter` is ignored.

What happens: a job that a Node producer adds with `backoff: {type, delay, jitter}` is retried after
exactly `delay`. A thousand jobs that fail together are retried together.
In Node: `jitter: 0.5` draws from the upper half of the delay
(https://github.com/taskforcesh/bullmq/pull/3291).
Where: `Backoffs.builtin_strategies`, `lookup_strategy`.
To mend it: `delay * (1 - jitter) + random() * delay * jitter` for both built-in types.
Beside it: an unknown type raises in `Job.moveToFailed`, and the job stays active until it stalls.
So it does in Node.
"""

import asyncio
import sys
from typing import Any

from bullmq.backoffs import Backoffs


async def draw() -> set[Any]:
    half = {"type": "fixed", "delay": 1000, "jitter": 0.5}
    return {await Backoffs.calculate(half, 1, None, None, None) for _ in range(50)}


def reproduce() -> str:
    drawn = asyncio.run(draw())
    return f"with a jitter of 0.5, 50 delays are all {drawn} ms" if drawn == {1000} else ""


found = reproduce()
print(f"fault: {found}" if found else "no fault")
sys.exit(1 if found else 0)
