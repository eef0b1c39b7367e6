"""Patterns that Node takes are refused by croniter, and end the scheduler.

What happens: a scheduler that a Node producer made with such a pattern runs once. The worker can't
compute its next time, emits an error, and has no next job (see 21).
In Node: bullmq 6 uses cron-parser 5, which takes all of these; bullmq 5 uses cron-parser 4, which
takes those with `L`.
Where: `job_scheduler.default_repeat_strategy`.
To mend it: translate what croniter spells differently (`5L` is `L5`), write the named ones out
(`@minutely` is `* * * * *`), and draw `H` from a hash as cron-parser does.
"""

import sys

from bullmq.job_scheduler import default_repeat_strategy

PATTERNS = ("0 0 * * 5L", "0 0 * * 1L,5L", "@weekdays", "@weekends", "@minutely", "H * * * *")


def reproduce() -> str:
    refused = []
    for pattern in PATTERNS:
        try:
            default_repeat_strategy(0, {"pattern": pattern})
        except ValueError:
            refused.append(pattern)
    return f"refused: {', '.join(refused)}" if refused else ""


found = reproduce()
print(f"fault: {found}" if found else "no fault")
sys.exit(1 if found else 0)
