"""Converts any Python value to plain JSON types; `results` has the rules.

The code of users' classes runs here (`model_dump`, `items`, `__lt__`, …). Whatever it raises
refuses the value, and whatever it yields counts against the limits.
"""

import base64
import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal, localcontext
from enum import Enum
from itertools import islice
from pathlib import PurePath
from typing import TypeAlias
from uuid import UUID

import orjson
from pydantic import BaseModel

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | orjson.Fragment | None"

# Arrays and objects around one value. orjson stops at 254, and the row adds some of its own.
MAX_DEPTH = 200
# Values and keys in one result; bounds the time for which one result blocks the event loop.
MAX_VALUES = 1_000_000
MAX_SIZE = 16 * 1024 * 1024  # bytes of JSON text in one result
MAX_DIGITS = 131_072  # of one integer

EXACT_FLOATS = 2.0**53  # floats from here on are integers, and stored as such

TOO_LARGE = f"it is larger than {MAX_SIZE // 1024**2} MiB of JSON"
TOO_MANY = f"it holds more than {MAX_VALUES:,} values"
TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} levels, or holds itself"

_MAX_DOUBLE = int(1.7976931348623157e308)
_LOG10_2 = math.log10(2)
_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)
# Up to so many bits, Decimal converts an integer as fast as by halves.
_FEW_BITS = 2_000
_SHOWN_PATH = 8
_MAX_NAME = 200


class Refusal(Exception):  # noqa: N818 - passed between two modules, not an error of the package
    """Why a value can't be stored; each level that it passes adds its key or index to `path`."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.path: list[str] = []

    def __str__(self) -> str:
        if not self.path:
            return self.reason
        more = "…" if len(self.path) > _SHOWN_PATH else ""
        return f"at {''.join(self.path[: -_SHOWN_PATH - 1 : -1])}{more}: {self.reason}"


class Cleaner:
    """One walk over one value, within the limits or within twice the limits."""

    def __init__(self, *, twice: bool = False) -> None:
        factor = 2 if twice else 1
        self._depth = factor * MAX_DEPTH
        self._values = factor * MAX_VALUES
        self._room = factor * MAX_SIZE
        # Only `dump` doubles the limits, and its fragments are ours. A handler's own fragment
        # could hold anything.
        self._takes_fragments = twice

    def clean(self, value: object, depth: int = 0) -> Json:  # noqa: PLR0911 - one for each type
        """Return the value as plain JSON types.

        Raises:
            Refusal: it can't be stored.
            RecursionError: it converts to other values without end.
        """
        # Exact types only: a subclass may override whatever is read here.
        if type(value) is str:
            return self._text(value)
        if type(value) is int:
            return self._integer(value)
        if type(value) is float:
            return _float(value)
        if value is None or type(value) is bool:
            return value
        if type(value) is dict:
            return self._object(value, depth + 1)
        if type(value) is list or type(value) is tuple:
            return self._array(value, depth + 1)
        if self._takes_fragments and type(value) is orjson.Fragment:
            return value
        try:
            simpler = _simplify(value)
        except Refusal:
            raise
        # SystemExit too: a property that raises it must cost this job, not the worker.
        except BaseException as error:
            reason = f"{type_name(value)} raised {type_name(error)} while it was read"
            raise Refusal(reason) from error
        return self.clean(simpler, depth)

    def _object(self, pairs: dict[object, object], depth: int) -> Json:
        self._enter(2 * len(pairs), depth)
        cleaned: dict[str, Json] = {}
        # Iterate over a copy: users' code that runs meanwhile may change the original.
        for key, item in list(pairs.items()):
            name = self._text(key) if type(key) is str else self._key(key, depth)
            try:
                cleaned[name] = self.clean(item, depth)
            except Refusal as refusal:
                refusal.path.append(f"[{name[:40]!r}]")
                raise
        return cleaned

    def _array(self, items: list[object] | tuple[object, ...], depth: int) -> Json:
        self._enter(len(items), depth)
        cleaned: list[Json] = []
        for item in tuple(items):
            try:
                cleaned.append(self.clean(item, depth))
            except Refusal as refusal:
                refusal.path.append(f"[{len(cleaned)}]")
                raise
        return cleaned

    def _enter(self, length: int, depth: int) -> None:
        self._values -= length
        if self._values < 0:
            raise Refusal(TOO_MANY)
        if length and depth > self._depth:
            raise Refusal(TOO_DEEP)

    def _key(self, key: object, depth: int) -> str:
        if type(key) is float and not math.isfinite(key):
            return json.dumps(key)
        plain = self.clean(key, depth)
        if isinstance(plain, str):
            return plain
        if isinstance(plain, dict | list):
            raise Refusal(f"{type_name(key)} can't be a key in JSON")
        return json.dumps(plain)

    def _text(self, text: str) -> str:
        self._take(len(text))
        return clean_text(text)

    def _integer(self, number: int) -> int | str:
        if -_MAX_DOUBLE <= number <= _MAX_DOUBLE:
            return number
        digits = int(number.bit_length() * _LOG10_2)
        if digits > MAX_DIGITS:
            raise Refusal(f"an integer has more than {MAX_DIGITS:,} digits")
        # Conversion takes more than linear time, so a long integer takes more than its share of
        # the room.
        self._take(digits * digits >> 11)
        with localcontext(_EXACT):
            return str(_as_decimal(number, number.bit_length()))

    def _take(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise Refusal(TOO_LARGE)


def _as_decimal(number: int, bits: int) -> Decimal:
    """Convert an integer by halves; `str` refuses more than 4,300 digits and takes quadratic time.

    Decimal multiplies large numbers fast and converts them slowly.
    """
    if bits <= _FEW_BITS:
        return Decimal(number)
    low = bits // 2
    high = number >> low
    upper = _as_decimal(high, bits - low) * Decimal(2) ** low
    return upper + _as_decimal(number - (high << low), low)


def clean_text(text: str) -> str:
    """Return the text with U+FFFD for what jsonb refuses: U+0000 and lone surrogates."""
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        # By way of UTF-16, where surrogates come from: pairs join, lone ones are replaced.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def type_name(value: object) -> str:
    """Return the name of the value's type."""
    # Not type(value).__qualname__, which a metaclass may override.
    return clean_text(str(type.__dict__["__qualname__"].__get__(type(value)))[:_MAX_NAME])


def _simplify(value: object) -> object:  # noqa: PLR0911, PLR0912 - one for each type
    """Take one step towards plain JSON types."""
    match value:
        case Enum():
            return value.value
        case str():
            return str.__str__(value)
        case int():
            return int.__pos__(value)
        case float():
            return float.__pos__(value)
        case BaseModel():
            return value.model_dump(mode="json", warnings=False)
        case Mapping():
            return dict(islice(value.items(), MAX_VALUES + 1))
        case list() | tuple() | deque():
            return list(islice(value, MAX_VALUES + 1))
        case set() | frozenset():
            return _sorted(value)
        case _ if is_dataclass(value) and not isinstance(value, type):
            return {field.name: getattr(value, field.name) for field in fields(value)}
        case datetime():
            zone = "Z" if value.utcoffset() == timedelta(0) else ""
            return value.isoformat().removesuffix("+00:00") + zone
        case date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case Decimal():
            return _decimal(value)
        case UUID() | PurePath():
            return str(value)
        case bytes() | bytearray() | memoryview():
            return base64.b64encode(value).decode()
        case _:
            raise Refusal(f"{type_name(value)} has no form in JSON")


def _sorted(members: set[object] | frozenset[object]) -> list[object]:
    members = set(islice(members, MAX_VALUES + 1))
    try:
        return sorted(members)  # type: ignore[type-var]
    except Exception:  # a member's comparison may raise anything
        return list(members)


def _float(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    # jsonb would keep the few digits that orjson writes, not the float's exact value.
    return int(value) if abs(value) >= EXACT_FLOATS else value


def _decimal(value: Decimal) -> str | float | None:
    if not value.is_finite():
        return None
    number = float(value)
    if not math.isfinite(number):
        return str(value)
    number = int(number) if number.is_integer() else number
    return number if Decimal(repr(number)) == value else str(value)
