"""Parse a cron pattern as Node's cron-parser does: the same patterns, the same refusals.

A rendering of `CronExpressionParser`, `CronFieldCollection` and the fields of cron-parser 5.10.3
(https://github.com/harrisiirak/cron-parser, MIT licence, Copyright (c) 2014-2023 Harri Siirak).
BullMQ's producers check a pattern with it, so whatever it takes may stand in Redis.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

Value = int | float | str
"""One allowed value of a field; a text is `L` or a weekday with it."""

PREDEFINED: Final = {
    "@yearly": "0 0 0 1 1 *",
    "@annually": "0 0 0 1 1 *",
    "@monthly": "0 0 0 1 * *",
    "@weekly": "0 0 0 * * 0",
    "@daily": "0 0 0 * * *",
    "@hourly": "0 0 * * * *",
    "@minutely": "0 * * * * *",
    "@secondly": "* * * * * *",
    "@weekdays": "0 0 0 * * 1-5",
    "@weekends": "0 0 0 * * 0,6",
}

MAX_LENGTH: Final = 1024
"""Characters of a pattern at most, as in cron-parser."""

MAX_FIELD_VALUES: Final = 256

_WEEKDAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_MONTHS: Final = (
    *("jan", "feb", "mar", "apr", "may", "jun"),
    *("jul", "aug", "sep", "oct", "nov", "dec"),
)
_ALIASES: Final = {
    **{name: number for number, name in enumerate(_WEEKDAYS)},
    **{name: number for number, name in enumerate(_MONTHS, 1)},
}
_DAYS_IN_MONTH: Final = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

# What JavaScript's `\s` matches.
_SPACES: Final = (
    "\t\n\v\f\r \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
_SPACE: Final = re.compile(f"[{_SPACES}]+")
_HASHED: Final = re.compile(r"H(?:\(([0-9]+)-([0-9]+)\))?(?:/([0-9]+))?")
# cron-parser lets any characters pass beside one of these.
_LOOSE: Final = r"|.*H\([0-9]+-[0-9]+\).*|.*H/[0-9]+.*"
_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_PREFIXED: Final = re.compile(r"0(x[0-9a-f]+|o[0-7]+|b[01]+)", re.IGNORECASE)
# Larger numbers mean the same, and JavaScript would make them infinite.
_HUGE: Final = 10**15


@dataclass(frozen=True, slots=True)
class _Kind:
    """One of the six fields: its bounds, and the characters that only some fields have."""

    name: str
    low: int
    high: int
    extra: str = ""
    has_last: bool = False

    def allows(self, text: str) -> bool:
        """Whether a field has only characters that cron-parser lets pass."""
        return re.fullmatch(rf"[?,*0-9{self.extra}H/-]+{_LOOSE}", text) is not None


_SECOND: Final = _Kind("second", 0, 59)
_MINUTE: Final = _Kind("minute", 0, 59)
_HOUR: Final = _Kind("hour", 0, 23)
_DAY: Final = _Kind("dayOfMonth", 1, 31, "L", has_last=True)
_MONTH: Final = _Kind("month", 1, 12)
_WEEKDAY: Final = _Kind("dayOfWeek", 0, 7, "L#", has_last=True)


@dataclass(frozen=True, slots=True)
class Field:
    """The values of one field, in ascending order.

    Attributes:
        is_wildcard: whether it is `*` or `?`.
        has_last: whether it has an `L`.
    """

    values: tuple[Value, ...]
    is_wildcard: bool
    has_last: bool

    def first(self) -> int:
        """Return the least value."""
        return int(self.values[0])

    def after(self, value: int) -> int | None:
        """Return the least value above this one."""
        return next((int(v) for v in self.values if not isinstance(v, str) and v > value), None)


@dataclass(frozen=True, slots=True)
class CronFields:
    """A parsed pattern.

    Attributes:
        nth: the occurrence of the weekday in its month that `#` asks for; 0 for any.
    """

    second: Field
    minute: Field
    hour: Field
    day: Field
    month: Field
    weekday: Field
    nth: int


def parse(pattern: object, *, strict: bool = False, hash_seed: object = None) -> CronFields:
    """Parse a pattern of up to six fields; the ones that are missing are the first ones.

    Args:
        strict: six fields are needed, and not both days are restricted.
        hash_seed: what `H` is drawn from; without it, each call draws anew.

    Raises:
        ValueError: cron-parser refuses the pattern.
    """
    if not isinstance(pattern, str):
        raise ValueError("a cron pattern is a text")  # noqa: TRY004 - one kind of refusal
    draw = _draws(hash_seed)
    texts = _split(PREDEFINED.get(pattern, pattern), strict=strict)
    second, minute, hour, day, month, weekday = texts
    if strict and day != "*" and weekday != "*":
        raise ValueError("Cannot use both dayOfMonth and dayOfWeek together in strict mode!")
    # `H` takes its draws in this order.
    seconds = _values(_SECOND, second, draw(), strict=strict)
    minutes = _values(_MINUTE, minute, draw(), strict=strict)
    hours = _values(_HOUR, hour, draw(), strict=strict)
    months = _values(_MONTH, month, draw(), strict=strict)
    days = _values(_DAY, day, draw(), strict=strict)
    weekday_text, nth = _split_nth(weekday)
    weekdays = _values(_WEEKDAY, weekday_text, draw(), strict=strict)
    months_field = _field(_MONTH, months, month)
    if len(months) == 1:
        days = [d for d in days if isinstance(d, str) or _is_in_month(d, months[0])] or days
    fields = CronFields(
        second=_field(_SECOND, seconds, second),
        minute=_field(_MINUTE, minutes, minute),
        hour=_field(_HOUR, hours, hour),
        day=_field(_DAY, days, day),
        month=months_field,
        weekday=_field(_WEEKDAY, weekdays, weekday),
        nth=nth,
    )
    if "L" in fields.weekday.values:
        raise ValueError("CronDayOfWeek Validation error, unexpected standalone L")
    if (
        len(months) == 1
        and not fields.day.has_last
        and fields.weekday.is_wildcard
        and not _is_in_month(_to_int(str(fields.day.values[0])), months[0])
    ):
        raise ValueError("Invalid explicit day of month definition")
    return fields


def _split(pattern: str, *, strict: bool) -> list[str]:
    if strict and not pattern:
        raise ValueError("Invalid cron expression")
    if len(pattern.encode("utf-16-le", "surrogatepass")) > 2 * MAX_LENGTH:
        raise ValueError(
            f"Invalid cron expression, too long, expected at most {MAX_LENGTH} characters"
        )
    texts = _SPACE.split((pattern or "0 * * * * *").strip(_SPACES))
    if strict and len(texts) < 6:  # noqa: PLR2004 - the fields of a pattern
        raise ValueError("Invalid cron expression, expected 6 fields")
    if len(texts) > 6:  # noqa: PLR2004
        raise ValueError("Invalid cron expression, too many fields")
    return ["0", "*", "*", "*", "*", "*"][: 6 - len(texts)] + texts


def _split_nth(text: str) -> tuple[str, int]:
    """Take the `#` and what follows it off a weekday."""
    weekday, *rest = text.split("#")
    if not rest:
        return weekday, 0
    if special := re.search("[,/-]", text):
        raise ValueError(
            f"Constraint error, invalid dayOfWeek `#` and `{special[0]}` special characters are "
            "incompatible"
        )
    nth = _to_number(rest[-1])
    if len(rest) > 1 or nth is None or not 1 <= nth <= 5:  # noqa: PLR2004 - weeks of a month
        raise ValueError("Constraint error, invalid dayOfWeek occurrence number (#)")
    # A fraction never equals the number of a week.
    return weekday, nth if isinstance(nth, int) else -1


def _field(kind: _Kind, values: list[Value], text: str) -> Field:
    for value in values:
        if isinstance(value, str):
            is_valid = kind.has_last and re.fullmatch("[0-9]{0,2}L", value) is not None
        else:
            is_valid = kind.low <= value <= kind.high
        if not is_valid:
            raise ValueError(
                f"{kind.name}: got value {value} expected range {kind.low}-{kind.high}"
                + (" or chars L" if kind.has_last else "")
            )
    if len(set(values)) < len(values):
        raise ValueError(f"{kind.name}: duplicate values found in {text}")
    numbers = sorted(value for value in values if not isinstance(value, str))
    texts = sorted(value for value in values if isinstance(value, str))
    return Field((*numbers, *texts), text in ("*", "?"), "L" in text or "L" in texts)


def _is_in_month(day: float | None, month: Value) -> bool:
    if day is None or not isinstance(month, int) or not 1 <= month <= len(_DAYS_IN_MONTH):
        return False
    return day <= _DAYS_IN_MONTH[month - 1]


# -- one field -------------------------------------------------------------------------------------


def _values(kind: _Kind, text: str, drawn: float, *, strict: bool) -> list[Value]:
    if kind in (_MONTH, _WEEKDAY):
        text = re.sub("[a-zA-Z]{3}", _resolve_alias, text)
    if not kind.allows(text):
        raise ValueError(f"Invalid characters, got value: {text}")
    text = re.sub(r"[*?]", f"{kind.low}-{kind.high}", text)
    text = _with_hashes(kind, text, drawn, strict=strict)
    values: list[Value] = []
    for part in text.split(","):
        _check_number_of_values(kind, len(values))
        if not part:
            raise ValueError("Invalid list value format")
        values.extend(_part(kind, part))
    return values


def _resolve_alias(found: re.Match[str]) -> str:
    try:
        return str(_ALIASES[found[0].lower()])
    except KeyError:
        raise ValueError(f'Validation error, cannot resolve alias "{found[0]}"') from None


def _part(kind: _Kind, text: str) -> Iterable[Value]:
    """Return the values of one part between commas."""
    span, *steps = text.split("/")
    if len(steps) > 1:
        raise ValueError(f"Invalid repeat: {text}")
    step: int | None = 1
    if steps:
        step = _to_int(steps[0])
        if "-" not in span:
            span = f"{span}-{kind.high}"
    ends = span.split("-")
    if len(ends) == 1:
        return [_single(kind, span)]
    low, high = _to_int(ends[0]), _to_int(ends[1])
    if low is None or high is None or low < kind.low or high > kind.high:
        raise ValueError(
            f"Constraint error, got range {span} expected range {kind.low}-{kind.high}"
        )
    if low > high:
        raise ValueError(f"Invalid range: {low}-{high}, min({low}) > max({high})")
    if step is None or step <= 0:
        raise ValueError(f"Constraint error, cannot repeat at every {steps[0]} time.")
    values = list(range(low, high + 1, step))
    if kind is _WEEKDAY and high % 7 == 0 and (high - low) % step == 0 and 0 not in values:
        values.insert(0, 0)  # Sunday has two numbers.
    return values


def _single(kind: _Kind, text: str) -> Value:
    number = _to_number(text)
    value: Value = text if number is None else number
    if kind.has_last and "L" in str(value):
        return value
    whole = _to_int(str(value))
    if whole is None or not kind.low <= whole <= kind.high:
        raise ValueError(
            f"Constraint error, got value {value} expected range {kind.low}-{kind.high}"
        )
    return whole % 7 if kind is _WEEKDAY else value


def _check_number_of_values(kind: _Kind, count: int) -> None:
    if count > MAX_FIELD_VALUES:
        raise ValueError(
            f"Constraint error, too many values in {kind.name} field, "
            f"expected at most {MAX_FIELD_VALUES}"
        )


# -- H ---------------------------------------------------------------------------------------------


def _with_hashes(kind: _Kind, text: str, drawn: float, *, strict: bool) -> str:
    """Replace each `H` by the values that are drawn for it."""
    count = 0

    def replace(found: re.Match[str]) -> str:
        nonlocal count
        low, high, step_text = kind.low, kind.high, found[3]
        step = _to_int(step_text) if step_text else None
        if step == 0:
            raise ValueError("Invalid step: 0, must be positive")
        if found[1]:
            low, high = _hash_range(kind, _to_int(found[1]), _to_int(found[2]), strict=strict)
        if step is None:
            return str(_hash_value(drawn, low, high))
        count += -(-(high - low + 1) // step)
        _check_number_of_values(kind, count)
        if strict and step > high - low + 1:
            raise ValueError(f"Invalid step: {step}, wider than the {low}-{high} range")
        first = low // step * step + int(drawn * step)
        values = [str(value) for value in range(first, high + 1, step) if value >= low]
        return ",".join(values) or str(_hash_value(drawn, low, high))

    return _HASHED.sub(replace, text)


def _hash_range(kind: _Kind, low: int | None, high: int | None, *, strict: bool) -> tuple[int, int]:
    assert low is not None  # The expression has found digits.
    assert high is not None
    if low > high:
        raise ValueError(f"Invalid range: {low}-{high}, min > max")
    if strict and (low < kind.low or high > kind.high):
        raise ValueError(f"Invalid range: {low}-{high}, outside of {kind.low}-{kind.high}")
    inside = max(low, kind.low), min(high, kind.high)
    if inside[0] > inside[1]:
        raise ValueError(f"Invalid range: {low}-{high}, no usable value in the {kind.name} field")
    return inside


def _hash_value(drawn: float, low: int, high: int) -> int:
    return int(drawn * (high - low + 1)) + low


def _draws(hash_seed: object) -> Callable[[], float]:
    """Return cron-parser's generator (mulberry32) for a seed (hashed by FNV-1a)."""
    if hash_seed:
        state = 2166136261
        text = hash_seed if isinstance(hash_seed, str) else ""
        units = text.encode("utf-16-le", "surrogatepass")
        for index in range(0, len(units), 2):
            state ^= units[index] | units[index + 1] << 8
            state = state * 16777619 & 0xFFFFFFFF
    else:
        state = random.randrange(10**10)  # noqa: S311 - as cron-parser, which hides nothing

    def draw() -> float:
        nonlocal state
        state += 0x6D2B79F5
        mixed = state & 0xFFFFFFFF
        mixed = (mixed ^ mixed >> 15) * (mixed | 1) & 0xFFFFFFFF
        mixed ^= mixed + (mixed ^ mixed >> 7) * (mixed | 61) & 0xFFFFFFFF
        return (mixed ^ mixed >> 14) / 4294967296

    return draw


# -- JavaScript's numbers --------------------------------------------------------------------------


def _to_int(text: str) -> int | None:
    """Read the digits that a text begins with, as `parseInt`; None for NaN."""
    found = re.match(rf"[{_SPACES}]*([+-]?[0-9]+)", text)
    return min(int(found[1]), _HUGE) if found else None


def _to_number(text: str) -> int | float | None:
    """Read a text that is a number as a whole, as `Number`; None for NaN."""
    text = text.strip(_SPACES)
    if not text:
        return 0
    if _PREFIXED.fullmatch(text):
        return min(int(text, 0), _HUGE)
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < _HUGE else value
