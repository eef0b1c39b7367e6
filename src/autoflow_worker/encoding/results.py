r"""Any Python value as JSON that PostgreSQL's jsonb and JavaScript both take, whatever it holds.

JSON as Python writes it is not always JSON to others: jsonb refuses `\u0000` and lone surrogates,
JavaScript knows no NaN and no number beyond a double, and each has its own limit of nesting.
The rules, in one place:

| value | stored as |
|---|---|
| dict, any other Mapping | object; for its keys see below |
| list, tuple, deque | array |
| set, frozenset | array, sorted if its members can be compared, else in its own order |
| str | text; U+0000 and lone surrogates become U+FFFD, a surrogate pair its character |
| int | number with all its digits (JavaScript rounds beyond 2^53); beyond 1.8e308 text |
| float | number, from 2^53 on as the integer it is; NaN and ±Infinity are null, as in JavaScript |
| Decimal | number if a float holds it without loss, else text; NaN and ±Infinity are null |
| datetime, date, time | text in ISO 8601, with `Z` for UTC |
| timedelta | number of seconds |
| UUID, Path | text |
| bytes, bytearray, memoryview | text in base64 |
| Enum | what its value is stored as |
| pydantic model | what its `model_dump(mode="json")` is stored as |
| dataclass | object of all its fields |

A key that is stored as number, true, false or null becomes that as text, as `json.dumps` writes it.
Of two keys with the same text the later one's value stays. Everything else (generators, files,
functions, objects of unknown classes, tuples as keys) is refused with `NotStorableError`, and so is
what goes beyond `MAX_DEPTH`, `MAX_VALUES`, `MAX_SIZE` or `MAX_DIGITS`. Nothing is cut: a result is
stored whole or not at all.
"""

import json
from typing import NamedTuple

import orjson

from autoflow_worker.encoding.cleaner import (
    EXACT_FLOATS,
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_SIZE,
    MAX_VALUES,
    TOO_DEEP,
    TOO_LARGE,
    TOO_MANY,
    Cleaner,
    Json,
    Refusal,
)
from autoflow_worker.errors import NotStorableError

__all__ = [
    "MAX_DEPTH",
    "MAX_DIGITS",
    "MAX_SIZE",
    "MAX_VALUES",
    "Json",
    "Stored",
    "dump",
    "encode",
    "fragment",
    "storable",
    "stored",
]

_LEAVES = frozenset({int, bool, type(None)})


class Stored(NamedTuple):
    """A value as it is stored, in both shapes.

    Attributes:
        value: plain JSON types; shares nothing with the value it was made from.
        text: the same as compact JSON.
    """

    value: Json
    text: str


def storable(value: object) -> Json:
    """Return the value as plain JSON types that share nothing with it.

    Raises:
        NotStorableError: the value can't be stored; the message says where and why.
    """
    return stored(value).value


def encode(value: object) -> str:
    """Return the value as compact JSON text.

    Raises:
        NotStorableError: the value can't be stored; the message says where and why.
    """
    raw = _encode_plain(value)
    return _clean(value).text if raw is None else raw.decode()


def fragment(value: object) -> orjson.Fragment:
    """Return the value as JSON text that becomes a part of another's, in `dump`.

    Raises:
        NotStorableError: the value can't be stored; the message says where and why.
    """
    raw = _encode_plain(value)
    return orjson.Fragment(_clean(value).text if raw is None else raw)


def stored(value: object) -> Stored:
    """Return the value in both shapes, for two stores that must hold the same.

    Raises:
        NotStorableError: the value can't be stored; the message says where and why.
    """
    raw = _encode_plain(value)
    # Read back, not passed on: the handler's own code may go on changing what it returned.
    return _clean(value) if raw is None else Stored(orjson.loads(raw), raw.decode())


def dump(value: object) -> str:
    """Return the compact JSON text of what is built of storable values, as a row is.

    Quicker than `encode`, as only what orjson objects to is looked at again. The limits are twice
    as wide, for what was built around the values.
    """
    try:
        raw = orjson.dumps(value)
        if b"\\u0000" not in raw:
            return raw.decode()
    except TypeError:  # an integer beyond 64 bits, or a text that is not storable after all
        pass
    return _text(Cleaner(twice=True).clean(value))


def _text(value: Json) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # an integer beyond 64 bits
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _encode_plain(value: object) -> bytes | None:
    """Encode what needs no care; return None for the rest."""
    if not _is_plain(value):
        return None
    try:
        raw = orjson.dumps(value)
    except TypeError:  # a lone surrogate, an integer beyond 64 bits, a key that is not text
        return None
    if len(raw) > MAX_SIZE:
        raise _not_storable(TOO_LARGE)
    # A backslash and "u0000" in a text look the same, and come to no harm on the careful way.
    return None if b"\\u0000" in raw else raw


def _is_plain(value: object) -> bool:
    """Tell whether JSON's own types are all there is; refuse what goes beyond the limits.

    Before orjson sees it: some lists that hold each other several times over would have it write
    for ever.
    """
    values, room = MAX_VALUES, MAX_SIZE
    layer: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        deeper: list[object] = []
        for item in layer:
            kind = type(item)  # Once, and the frequent ones first: this is most of what it costs.
            if kind is str:
                room -= len(item)  # type: ignore[arg-type]
            elif kind in _LEAVES:
                continue
            elif kind is dict:
                deeper += item  # type: ignore[arg-type]
                deeper += item.values()  # type: ignore[attr-defined]
            elif kind is list or kind is tuple:
                deeper += item  # type: ignore[arg-type]
            elif kind is not float or not -EXACT_FLOATS < item < EXACT_FLOATS:  # type: ignore[operator]
                return False
            if len(deeper) > values:
                raise _not_storable(TOO_MANY)
        if room < 0:
            raise _not_storable(TOO_LARGE)
        if not deeper:
            return True
        values -= len(deeper)
        layer = deeper
    raise _not_storable(TOO_DEEP)


def _clean(value: object) -> Stored:
    try:
        plain = Cleaner().clean(value)
        text = _text(plain)
    except Refusal as refusal:
        raise _not_storable(str(refusal)) from refusal.__cause__
    except RecursionError:
        raise _not_storable(TOO_DEEP) from None
    if len(text) > MAX_SIZE // 4 and len(text.encode()) > MAX_SIZE:
        raise _not_storable(TOO_LARGE)
    return Stored(plain, text)


def _not_storable(reason: str) -> NotStorableError:
    return NotStorableError(f"a value can't be stored: {reason}")
