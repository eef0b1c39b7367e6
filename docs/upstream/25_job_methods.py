"""Methods of Node's `Job` that handlers use are missing.

What happens: a handler that is ported from Node finds no such attribute.
In Node: all of these in 5.65 and 6.7, see https://api.docs.bullmq.io/classes/v5.Job.html. 5.65 has
`discard` besides.
Where: `bullmq.job.Job`.
To mend it: most of them are one command or one script (`extendLock` is in `Scripts` already).
"""

import sys

from bullmq import Job

METHODS = (
    "moveToWait",
    "extendLock",
    "changeDelay",
    "clearLogs",
    "getDependencies",
    "getDependenciesCount",
    "getFailedChildrenValues",
    "getIgnoredChildrenFailures",
    "removeChildDependency",
    "removeDeduplicationKey",
    "removeUnprocessedChildren",
    "waitUntilFinished",
)


def reproduce() -> str:
    missing = [name for name in METHODS if not hasattr(Job, name)]
    return f"missing: {', '.join(missing)}" if missing else ""


found = reproduce()
print(f"fault: {found}" if found else "no fault")
sys.exit(1 if found else 0)
