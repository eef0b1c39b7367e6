"""The arguments of the script by which BullMQ completes a job.

`Scripts.moveToCompletedArgs` of the official package makes all of them anew for each job, which is
the largest part of what it does for one. Here only what differs from job to job is made; a test
holds the two against each other.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgpack

_KEYS: Final = (
    "wait",
    "active",
    "prioritized",
    "events",
    "stalled",
    "limiter",
    "delayed",
    "paused",
    "meta",
    "pc",
    "completed",
)
_WHERE_PARENTS_LOOK: Final = {
    "fpof": "failParentOnFailure",
    "cpof": "continueParentOnFailure",
    "idof": "ignoreDependencyOnFailure",
    "rdof": "removeDependencyOnFailure",
}


class CompletionArguments:
    """Makes keys and arguments of `moveToFinished` for completed jobs of one queue.

    Args:
        keys: the queue's, by BullMQ's names for them; "" is the base of all.
        options: the worker's, with BullMQ's defaults.
    """

    def __init__(self, keys: Mapping[str, str], options: Mapping[str, Any]) -> None:
        self._base = keys[""]
        self._first_keys = [keys[name] for name in _KEYS]
        self._last_keys = [keys[""] + "metrics:completed", keys["marker"]]
        metrics = options.get("metrics")
        self._options = {
            "limiter": options.get("limiter"),
            "lockDuration": options.get("lockDuration"),
            "maxMetricsSize": metrics.get("maxDataPoints", "") if metrics is not None else "",
        }
        self._pack = msgpack.Packer(use_bin_type=True).pack

    def __call__(
        self, job: Any, value: str, keep: Any, *, token: str, fetch_next: bool, now_ms: int
    ) -> tuple[list[str], list[Any]]:
        """Return the script's keys and arguments.

        Args:
            job: bullmq's `Job`.
            value: the return value's JSON.
            keep: the option `removeOnComplete` that counts.
            token: what the job's lock holds.
            fetch_next: whether the script is to claim another job.
            now_ms: epoch ms.
        """
        options = {
            **self._options,
            "token": token,
            "keepJobs": _jobs_to_keep(keep),
            "attempts": job.attempts,
            "attemptsMade": job.attemptsMade,
        }
        for short, name in _WHERE_PARENTS_LOOK.items():
            options[short] = job.opts.get(name, False)
        keys = [*self._first_keys, self._base + job.id, *self._last_keys]
        fetch = "1" if fetch_next else ""
        packed = self._pack(options)
        return keys, [
            job.id,
            now_ms,
            "returnvalue",
            value,
            "completed",
            fetch,
            self._base,
            packed,
        ]


def _jobs_to_keep(keep: Any) -> Mapping[str, Any]:
    if type(keep) is int:  # a bool is none here
        return {"count": keep}
    if isinstance(keep, dict):
        return keep
    return {"count": 0 if keep else -1}
