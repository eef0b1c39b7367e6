"""Random schedules around changes of the clock, and what Node and this worker make of them."""

import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final

from autoflow_worker.broker.cron import next_ms
from autoflow_worker.broker.zones import zone_of
from tests.support.node import Node

Json = dict[str, Any]

LOCAL: Final = "Europe/Berlin"
"""The zone of schedules without `tz`."""

# Both changes within a day, half an hour, over midnight, given up, skipped days, no change at all.
ZONES: Final = [
    *("Europe/Berlin", "Europe/Dublin", "America/New_York", "America/St_Johns", "America/Havana"),
    *("America/Santiago", "America/Sao_Paulo", "America/Scoresbysund", "Antarctica/Troll"),
    *("Atlantic/Azores", "Australia/Lord_Howe", "Africa/Cairo", "Africa/Casablanca", "Asia/Beirut"),
    *("Asia/Gaza", "Asia/Kathmandu", "Pacific/Apia", "UTC", "utc", "UTC+2", "UTC-3:30"),
    *("europe/london", "local", "Nowhere/Town", "", 90, None),
]
MONTHS: Final = ["jan", "feb", "MAR", "apr", "may", "Jun", "jul", "aug", "sep", "oct", "nov", "dec"]
WEEKDAYS: Final = ["sun", "mon", "TUE", "wed", "thu", "Fri", "sat"]
DAY_WORDS: Final = ["L", "31", "30", "29", "L,15", "28-31", "32"]
WEEKDAY_WORDS: Final = [
    *("5L", "FRIL", "1L,5L", "2#2", "MON#1", "0#5", "7", "L", "5-7", "sat-sun", "3L#2", "0,7"),
    *("2#6", "1#1,2"),
]
FAULTS: Final = ["61", "a", "1,,2", "*/0", "5-1", "1-2-3", "-", "/", "1/2/3", "H/3,5x", "1,1", "5L"]
WHOLE: Final = [
    *("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@hourly", "@minutely"),
    *("@secondly", "@weekdays", "@weekends", "@reboot", "0 0 30 2 *", "0 0 31 4,6 *", "0 2 * * *"),
    *("0 0 29 2 *", "* * * * * * *", "   ", "5", "5 5", "30 2 * * *", "0 9 * * *", "0 0 * * *"),
]
FIRST_DAY: Final = datetime(2010, 1, 1, tzinfo=UTC)
LAST_DAY: Final = datetime(2033, 1, 1, tzinfo=UTC)
DAY_MS: Final = 86_400_000
HOUR_MS: Final = 3_600_000


def cases(seed: int, count: int) -> Iterator[Json]:
    """Draw schedules, as `Session.nextMillis` of node.mjs takes them."""
    draw = random.Random(seed)
    for _ in range(count):
        tz = draw.choice(ZONES)
        millis = _base(draw, tz)
        options: Json = {"pattern": _pattern(draw), "hashSeed": draw.choice(["a", "seed", "ü€😀"])}
        if tz is not None:
            options["tz"] = tz
        for name in ("startDate", "endDate"):
            if draw.random() < 0.08:
                options[name] = millis + draw.randint(-DAY_MS, 10 * DAY_MS)
        if draw.random() < 0.05:
            options["strict"] = True
        yield {"millis": millis, "options": options}


def ours(case: Json) -> Json:
    """Answer as node.mjs does."""
    try:
        return {"at": next_ms(case["millis"], case["options"])}
    except ValueError as error:
        return {"error": str(error)}


async def differences(node: Node, drawn: Sequence[Json]) -> list[tuple[Json, Json, Json]]:
    """Return the schedules for which Node has another time, or only one of the two refuses.

    The process's zone has to be `LOCAL`.
    """
    theirs = await node.next_millis(drawn, tz=LOCAL)
    answers = [(case, ours(case), answer) for case, answer in zip(drawn, theirs, strict=True)]
    return [each for each in answers if each[1].get("at", "no") != each[2].get("at", "no")]


def _base(draw: random.Random, tz: str | int | None) -> int:
    changes = _changes(LOCAL if tz is None or tz == "local" else tz)
    if changes and draw.random() < 0.75:
        millis = draw.choice(changes) + 1000 * draw.randint(-36 * 3600, 6 * 3600)
    else:
        millis = draw.randint(_ms(FIRST_DAY), _ms(LAST_DAY))
    return draw.choice([millis, millis // 1000 * 1000, millis // HOUR_MS * HOUR_MS])


@cache
def _changes(tz: str | int) -> list[int]:
    """Return when the zone's clocks are changed, in epoch ms."""
    try:
        zone = zone_of(tz)
    except ValueError:
        return []
    changes = []
    for day in range(_ms(FIRST_DAY), _ms(LAST_DAY), DAY_MS):
        before, after = day, day + DAY_MS
        if zone(before) == zone(after):
            continue
        while after - before > 1000:
            middle = (before + after) // 2000 * 1000
            before, after = (middle, after) if zone(middle) == zone(before) else (before, middle)
        changes.append(after)
    return changes


def _ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def _pattern(draw: random.Random) -> str:
    if draw.random() < 0.1:
        return draw.choice(WHOLE)
    minute, hour = _field(draw, 0, 59), _field(draw, 0, 23)
    if draw.random() < 0.5:
        minute = draw.choice(["0", "30", "15,45", "*/10"])
    if draw.random() < 0.3:
        hour = draw.choice(["0", "1", "2", "3", "0-3", "2,3", "1,2", "23"])
    day, month, weekday = (
        "*" if draw.random() < 0.6 else field
        for field in (
            _field(draw, 1, 31, words=DAY_WORDS),
            _field(draw, 1, 12, names=MONTHS),
            _field(draw, 0, 7, names=WEEKDAYS, words=WEEKDAY_WORDS),
        )
    )
    seconds = [_field(draw, 0, 59)] if draw.random() < 0.3 else []
    return " ".join([*seconds, minute, hour, day, month, weekday])


def _field(
    draw: random.Random,
    low: int,
    high: int,
    *,
    names: Sequence[str] = (),
    words: Sequence[str] = (),
) -> str:
    def value() -> str:
        return draw.choice(names) if names and draw.random() < 0.4 else str(draw.randint(low, high))

    first, last = sorted((draw.randint(low, high), draw.randint(low, high)))
    return draw.choice(
        [
            *("*", "*", "*", "?", value(), value(), f"{first}-{last}"),
            f"{first}-{last}/{draw.randint(1, 9)}",
            f"{value()}/{draw.randint(1, 20)}",
            f"*/{draw.choice([1, 2, 3, 5, 7, 10, 15, 20, 30])}",
            ",".join({value() for _ in range(draw.randint(1, 4))}),
            draw.choice(["H", "H/5", "H(1-3)", "H(2-20)/4", "H/40", "H(90-99)"]),
            draw.choice(words or ["0"]),
            draw.choice(FAULTS) if draw.random() < 0.2 else value(),
        ]
    )
