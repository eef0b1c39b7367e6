"""The arguments of the script by which BullMQ completes a job.

`Scripts.moveToCompletedArgs` of the official package makes all of them anew for each job, which is
the largest part of what it does for one. Here only what differs from job to job is made; a test
holds the two against each other.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, Final

import msgpack

from autoflow_worker.broker.claim import Claim

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
_LOOKED_FOR: Final = frozenset(_WHERE_PARENTS_LOOK.values())

MAX_PACKED: Final = 1_000
"""Packed options that are kept for further jobs."""


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
        self._packed_alike = lru_cache(MAX_PACKED)(partial(self._packed, {}))

    def __call__(
        self, claim: Claim, value: str, keep: Any, *, fetch_next: bool, now_ms: int
    ) -> tuple[list[str], list[Any]]:
        """Return the script's keys and arguments.

        Args:
            claim: the job.
            value: the return value's JSON.
            keep: the option `removeOnComplete` that counts.
            fetch_next: whether the script is to claim another job.
            now_ms: epoch ms.
        """
        about = claim.token, keep, claim.max_attempts, claim.attempts_made
        # The jobs of a slot have all of this in common, as a rule.
        if type(keep) is int and claim.options.keys().isdisjoint(_LOOKED_FOR):
            packed = self._packed_alike(*about)
        else:
            packed = self._packed(claim.options, *about)
        keys = [*self._first_keys, self._base + claim.id, *self._last_keys]
        fetch = "1" if fetch_next else ""
        args = [claim.id, now_ms, "returnvalue", value, "completed", fetch, self._base, packed]
        return keys, args

    def _packed(
        self, job_options: Mapping[str, Any], token: str, keep: Any, attempts: int, made: int
    ) -> bytes:
        options = {
            **self._options,
            "token": token,
            "keepJobs": _jobs_to_keep(keep),
            "attempts": attempts,
            "attemptsMade": made,
        }
        for short, name in _WHERE_PARENTS_LOOK.items():
            options[short] = job_options.get(name, False)
        return bytes(msgpack.packb(options, use_bin_type=True))


def _jobs_to_keep(keep: Any) -> Mapping[str, Any]:
    if type(keep) is int:  # a bool is none here
        return {"count": keep}
    if isinstance(keep, dict):
        return keep
    return {"count": 0 if keep else -1}
