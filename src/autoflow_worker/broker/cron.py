"""The next time of a cron pattern, as BullMQ's Node worker computes it: to the millisecond.

A rendering of `CronExpression` and `CronDate` of cron-parser 5.10.3, forwards only
(https://github.com/harrisiirak/cron-parser, MIT licence, Copyright (c) 2014-2023 Harri Siirak),
with the wall-clock arithmetic of luxon 3.7 (https://github.com/moment/luxon, MIT licence,
Copyright 2019 JS Foundation and other contributors).

At a change to summer time the hour that is skipped runs at the first hour that exists; at the
change back the hour that comes twice runs once.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final

from autoflow_worker.broker.cron_fields import CronFields, Value, parse
from autoflow_worker.broker.zones import MS_PER_MINUTE, Zone, zone_of
from autoflow_worker.clock import now_ms

MAX_STEPS: Final = 10_000
"""Steps of the search, after which a pattern is taken to have no further date."""

_EPOCH: Final = datetime(1970, 1, 1)  # noqa: DTZ001 - local time, whose zone is apart
_MILLISECOND: Final = timedelta(milliseconds=1)
_MS_PER_SECOND: Final = 1000
_MS_PER_HOUR: Final = 60 * MS_PER_MINUTE


def next_ms(after_ms: int, options: Mapping[str, Any]) -> int | None:
    """Return a schedule's next time in epoch ms: BullMQ's `defaultRepeatStrategy`.

    Args:
        after_ms: the time is later than this one, in epoch ms.
        options: BullMQ's repeat options: `pattern`, and perhaps `tz`, `startDate`, `endDate`,
            `immediately`, `strict` and `hashSeed`.

    Returns:
        None if there is no further time.

    Raises:
        ValueError: Node refuses the pattern, the zone or a date.
    """
    fields = parse(
        options.get("pattern"),
        strict=bool(options.get("strict")),
        hash_seed=options.get("hashSeed"),
    )
    zone = zone_of(options.get("tz"))
    start, end = (date_ms(options.get(name), name, zone) for name in ("startDate", "endDate"))
    if options.get("immediately"):
        return now_ms()
    if start is not None and start > after_ms:
        after_ms = start
    elif end is not None and end < after_ms:
        after_ms = end
    try:
        return _search(fields, _WallClock(after_ms, zone), end)
    except OverflowError:  # after the year 9999
        return None


def _search(fields: CronFields, clock: "_WallClock", end: int | None) -> int | None:
    few_hours = len(fields.hour.values) != 24  # noqa: PLR2004 - hours of a day
    after_ms = clock.ms
    if clock.local.microsecond:
        clock.set(microsecond=0)
        clock.step(_WallClock.add_second, few_hours)
    day_of_change = _DayOfChange()
    for _ in range(MAX_STEPS - 1):
        if end is not None and clock.ms > end:
            return None
        if clock.local.month not in fields.month.values:
            clock.add_month()
        elif not _matches_day(fields, clock.local):
            clock.add_day()
        elif not _matches_hour(fields, clock, day_of_change, few_hours):
            pass  # It has moved the clock on.
        elif clock.local.minute not in fields.minute.values:
            _move_to_minute(fields, clock, few_hours)
        elif clock.local.second not in fields.second.values:
            _move_to_second(fields, clock, few_hours)
        elif clock.ms == after_ms:
            clock.step(_WallClock.add_second, few_hours)
        else:
            return clock.ms
    return None


def _matches_day(fields: CronFields, local: datetime) -> bool:
    day, weekday = fields.day, fields.weekday
    number = (local.weekday() + 1) % 7  # Sunday is 0.
    days_left = _days_in_month(local) - local.day
    matches_day = local.day in day.values or (day.has_last and days_left == 0)
    matches_weekday = (number in weekday.values and fields.nth in (0, (local.day + 6) // 7)) or (
        weekday.has_last
        and days_left < 7  # noqa: PLR2004 - days of a week
        and any(_first_digit(value) == number for value in weekday.values)
    )
    if day.is_wildcard and not weekday.is_wildcard:
        return matches_weekday
    if weekday.is_wildcard:
        return matches_day
    return matches_day or matches_weekday


def _matches_hour(
    fields: CronFields, clock: "_WallClock", day_of_change: "_DayOfChange", few_hours: bool
) -> bool:
    """Whether the hour is one of the pattern's; if not, move the clock on."""
    hours, hour = fields.hour.values, clock.local.hour
    if clock.skipped_from is not None and clock.landed_at == hour:
        skipped = clock.skipped_from
        while skipped != hour:
            if skipped in hours:
                return True
            skipped = (skipped + 1) % 24
    if clock.repeated == hour:
        clock.repeated = None
        clock.step(_WallClock.add_hour, few_hours)
        return False
    if hour in hours:
        return True
    clock.skipped_from = clock.landed_at = None
    following = fields.hour.after(hour)
    if following is None:
        clock.add_day()
        return False
    if day_of_change(clock):
        # Only steps of one hour notice what is skipped or comes twice.
        for _ in range(following - hour):
            clock.step(_WallClock.add_hour, few_hours)
            if clock.local.hour >= following:
                break
    else:
        clock.set(hour=following)
    clock.set(minute=fields.minute.first())
    clock.set(second=fields.second.first())
    return False


def _move_to_minute(fields: CronFields, clock: "_WallClock", few_hours: bool) -> None:
    following = fields.minute.after(clock.local.minute)
    if following is None:
        clock.step(_WallClock.add_hour, few_hours)
        following = fields.minute.first()
    clock.set(minute=following)
    clock.set(second=fields.second.first())


def _move_to_second(fields: CronFields, clock: "_WallClock", few_hours: bool) -> None:
    following = fields.second.after(clock.local.second)
    if following is None:
        clock.step(_WallClock.add_minute, few_hours)
        following = fields.second.first()
    clock.set(second=following)


def _days_in_month(local: datetime) -> int:
    following = local.replace(day=28) + timedelta(days=4)
    return (following - timedelta(days=following.day)).day


def _first_digit(value: Value) -> int | None:
    digit = str(value)[0]
    return int(digit) % 7 if digit.isdigit() else None


class _DayOfChange:
    """Whether the zone's offset changes on a day; it remembers the last day that it looked at."""

    def __init__(self) -> None:
        self._date: object = None
        self._changes = False

    def __call__(self, clock: "_WallClock") -> bool:
        if self._date != clock.local.date():
            self._date = clock.local.date()
            start = _WallClock(clock.ms, clock.zone)
            start.set(hour=0, minute=0, second=0, microsecond=0)
            end = _WallClock(clock.ms, clock.zone)
            end.add_day()
            self._changes = start.offset != clock.zone(end.ms - 1)
        return self._changes


class _WallClock:
    """A time of a zone that moves forwards, as luxon moves it.

    Attributes:
        ms: epoch ms.
        local: what a clock on the wall shows.
        offset: how far that is ahead of UTC, in ms.
        skipped_from: the first of the hours that the last step skipped.
        landed_at: the hour that the step came to instead.
        repeated: an hour that comes for the second time.
    """

    def __init__(self, ms: int, zone: Zone) -> None:
        self.zone = zone
        self.skipped_from: int | None = None
        self.landed_at: int | None = None
        self.repeated: int | None = None
        self._at(ms)

    def _at(self, ms: int) -> None:
        self.ms = ms
        self.offset = self.zone(ms)
        self.local = _EPOCH + timedelta(milliseconds=ms + self.offset)

    def set(self, **parts: Any) -> None:
        """Change parts of the local time."""
        self._at_local(self.local.replace(**parts))

    def _at_local(self, local: datetime) -> None:
        """Find a local time's moment: luxon's `fixOffset`."""
        local_ms = (local - _EPOCH) // _MILLISECOND
        guess = self.offset
        found = self.zone(local_ms - guess)
        if found != guess:
            again = self.zone(local_ms - found)
            # They differ for a time that is skipped: it is as far behind the gap as into it.
            found = min(found, again)
        self._at(local_ms - found)

    def add_month(self) -> None:
        local = self.local.replace(day=28) + timedelta(days=4)
        day = min(self.local.day, _days_in_month(local))
        self._at_local(local.replace(day=day))
        self.set(day=1, hour=0, minute=0, second=0, microsecond=0)

    def add_day(self) -> None:
        self._at_local(self.local + timedelta(days=1))
        self.set(hour=0, minute=0, second=0, microsecond=0)

    def add_hour(self) -> None:
        self._at(self.ms + _MS_PER_HOUR)
        self.set(minute=0, second=0, microsecond=0)

    def add_minute(self) -> None:
        self._at(self.ms + MS_PER_MINUTE)
        self.set(second=0, microsecond=0)

    def add_second(self) -> None:
        self._at(self.ms + _MS_PER_SECOND)

    def step(self, add: Callable[["_WallClock"], None], few_hours: bool) -> None:
        """Add a second, a minute or an hour, and note which hours it skipped or repeats.

        Args:
            few_hours: whether the pattern leaves hours out; if not, nothing is noted.
        """
        hour, offset = self.local.hour, self.offset
        add(self)
        if not few_hours:
            return
        passed = (self.local.hour - hour) % 24
        if self.offset > offset and passed >= 2:  # noqa: PLR2004 - one hour or more is skipped
            self.skipped_from, self.landed_at = (hour + 1) % 24, self.local.hour
        elif passed == 0 and self.local.minute == 0 and self.local.second == 0:
            self.repeated = self.local.hour


def date_ms(value: object, name: str, zone: Zone) -> int | None:
    """Read a date of the repeat options; Node writes epoch ms, or an ISO date.

    Args:
        zone: whose local time a date without an offset is.

    Raises:
        ValueError: it is not a date.
    """
    if not value:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return int(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a date: {value!r}")  # noqa: TRY004 - one kind of refusal
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            raise ValueError(f"{name} is not a date: {value[:80]!r}") from None
    if moment.tzinfo is None:
        clock = _WallClock(0, zone)
        clock._at_local(moment)  # noqa: SLF001 - its own class
        return clock.ms
    return (moment.astimezone(UTC) - _EPOCH.replace(tzinfo=UTC)) // _MILLISECOND
