"""A scheduler with `tz` runs twice, or an hour late, when the clocks change.

What happens: `0 9 * * *` in Europe/Berlin runs at 08:00 and at 09:00 on the day when summer time
begins, and at 10:00 on the day when it ends. croniter adds a fixed offset to an aware datetime
(https://github.com/pallets-eco/croniter/issues/91, /70, /25: closed, "not supported").
In Node: cron-parser runs it at 09:00 on each of these days.
Where: `job_scheduler.default_repeat_strategy`.
To mend it: give croniter the wall clock's naive time, and add the zone to its result. A time that
does not exist (02:30 in spring) or exists twice needs a rule of its own.
Beside it: without `tz`, Python takes UTC, and Node the process's own zone.
"""

import sys
from datetime import datetime
from zoneinfo import ZoneInfo

from bullmq.job_scheduler import default_repeat_strategy

BERLIN = ZoneInfo("Europe/Berlin")


def reproduce() -> str:
    wrong = []
    for month, day in ((3, 28), (10, 24)):  # the eves of the two changes in 2026
        noon = datetime(2026, month, day, 12, tzinfo=BERLIN)
        options = {"pattern": "0 9 * * *", "tz": "Europe/Berlin"}
        millis = default_repeat_strategy(int(noon.timestamp() * 1000), options)
        following = datetime.fromtimestamp(millis / 1000, BERLIN)
        if following.hour != 9:
            wrong.append(following.isoformat())
    return f"9 o'clock comes out as {' and '.join(wrong)}" if wrong else ""


found = reproduce()
print(f"fault: {found}" if found else "no fault")
sys.exit(1 if found else 0)
