"""`RateLimitError` and `WaitingError` are missing, and so is `Worker.rateLimit`.

What happens: a handler that meets another service's limit can't give its job back. Whatever it
raises fails the job and uses up an attempt. The same is true of a handler that wants its job to
wait again (`moveToWait`).
In Node: `await worker.rateLimit(ms); throw Worker.RateLimitError()` and `WaitingError` leave the
attempt unused. An open pull request for the limit: https://github.com/taskforcesh/bullmq/pull/3321.
Where: `bullmq.custom_errors`, `Worker.processJob`.
To mend it: both classes, `Worker.rateLimit`, and in `processJob` the script
`moveJobFromActiveToWait`. It is among the package's commands, but not in `SCRIPT_DEFINITIONS`.
"""

import sys

import bullmq


def reproduce() -> str:
    missing = [name for name in ("RateLimitError", "WaitingError") if not hasattr(bullmq, name)]
    missing += [] if hasattr(bullmq.Worker, "rateLimit") else ["Worker.rateLimit"]
    return f"missing: {', '.join(missing)}" if missing else ""


found = reproduce()
print(f"fault: {found}" if found else "no fault")
sys.exit(1 if found else 0)
