"""The time zone of a schedule, by the names that Node's luxon takes."""

import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

Zone = Callable[[int], int]
"""Tells how far local time is ahead of UTC, in ms, at an epoch time in ms."""

MS_PER_MINUTE: Final = 60_000

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_UTC_AND_OFFSET: Final = re.compile(r"utc(?:([+-])([0-9]{1,2})(?::([0-9]{2}))?)?", re.IGNORECASE)
# Node knows these from version 22 on.
_OFFSET: Final = re.compile(r"([+-])([01][0-9]|2[0-3])(?::?([0-5][0-9]))?")


def zone_of(tz: object) -> Zone:
    """Return a zone by what an option `tz` may hold in Node.

    Args:
        tz: an IANA name in any case, `utc`, `UTC+2`, `+02:00`, minutes ahead of UTC, or `local`;
            None stands for the process's own zone.

    Raises:
        ValueError: there is no such zone.
    """
    if tz is None:
        return _local()
    if isinstance(tz, int) and not isinstance(tz, bool):
        return _fixed(tz)
    if not isinstance(tz, str):
        raise ValueError(f"{tz!r} is not a time zone")  # noqa: TRY004 - one kind of refusal
    if tz.lower() in ("local", "system", "default"):
        return _local()
    if tz.lower() == "gmt":
        return _fixed(0)
    if found := _UTC_AND_OFFSET.fullmatch(tz) or _OFFSET.fullmatch(tz):
        sign, hours, minutes = found.groups()
        ahead = int(hours or 0) * 60 + int(minutes or 0)
        return _fixed(-ahead if sign == "-" else ahead)
    zone = _iana(tz)
    if zone is None:
        raise ValueError(f"there is no time zone {tz[:80]!r}")
    return zone


def _fixed(minutes: int) -> Zone:
    return lambda _: minutes * MS_PER_MINUTE


# Names that Node's ICU has beside those of the tz database.
_ICU: Final = {
    "act": "Australia/Darwin",
    "aet": "Australia/Sydney",
    "agt": "America/Argentina/Buenos_Aires",
    "art": "Africa/Cairo",
    "ast": "America/Anchorage",
    "bet": "America/Sao_Paulo",
    "bst": "Asia/Dhaka",
    "cat": "Africa/Maputo",
    "cnt": "America/St_Johns",
    "cst": "America/Chicago",
    "ctt": "Asia/Shanghai",
    "eat": "Africa/Nairobi",
    "ect": "Europe/Paris",
    "iet": "America/Indiana/Indianapolis",
    "ist": "Asia/Kolkata",
    "jst": "Asia/Tokyo",
    "mit": "Pacific/Apia",
    "net": "Asia/Yerevan",
    "nst": "Pacific/Auckland",
    "plt": "Asia/Karachi",
    "pnt": "America/Phoenix",
    "prt": "America/Puerto_Rico",
    "pst": "America/Los_Angeles",
    "sst": "Pacific/Guadalcanal",
    "vst": "Asia/Ho_Chi_Minh",
}


@cache
def _iana(name: str) -> Zone | None:
    try:
        info = ZoneInfo(name)
    except (OSError, ValueError, LookupError):
        # The files have names in one case only.
        names = {each.lower(): each for each in available_timezones()}
        known = names.get(name.lower(), _ICU.get(name.lower()))
        if known is None:
            return None
        info = ZoneInfo(known)

    def ahead(ms: int) -> int:
        offset = (_EPOCH + timedelta(milliseconds=ms)).astimezone(info).utcoffset()
        return round(offset.total_seconds() * 1000) if offset else 0

    return ahead


def _local() -> Zone:
    # By its name, as Node does: the C library needs the system's files, and without them it takes
    # UTC in silence.
    name = os.environ.get("TZ", "").removeprefix(":")
    return (_iana(name) if name else None) or _system


def _system(ms: int) -> int:
    return time.localtime(ms // 1000).tm_gmtoff * 1000
