r"""Converts any Python value to JSON that both PostgreSQL's jsonb and JavaScript take.

Not all of what Python's `json` writes is JSON to others. jsonb refuses `\u0000` and lone
surrogates, JavaScript has no NaN and no number beyond a double, and each limits nesting. The rules:

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

A key that is a number, true, false or null becomes text, as `json.dumps` writes it. Of two keys
with the same text the later one's value stays. `NotStorableError` refuses everything else
(generators, files, functions, objects of unknown classes, tuples as keys), and any value beyond
the limits in `cleaner`. A result is stored whole or not at all.
"""

import json
from dataclasses import dataclass

import orjson

from autoflow_worker.encoding.cleaner import (
    EXACT_FLOATS,
    MAX_DEPTH,
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


@dataclass(frozen=True, slots=True)
class EncodedValue:
    """A value that another process made storable and encoded.

    Attributes:
        text: the JSON that `encoded` returned there; its size is at most `cleaner.MAX_SIZE`.
    """

    text: str


_LEAVES = frozenset({int, bool, type(None)})


def storable(value: object) -> Json:
    """Return the value as plain JSON types that share nothing with it.

    Raises:
        NotStorableError: the value can't be stored; the message says where and why.
    """
    raw = _encode_plain(value)
    # Decode the text again: the handler's own code may go on changing what it returned.
    return _clean(value)[0] if raw is None else orjson.loads(raw)


def fragment(value: object) -> orjson.Fragment:
    """Return the value as JSON text, for `dump` to insert into the text of a larger value.

    Raises:
        NotStorableError: the value can't be stored; the message says where and why.
    """
    return orjson.Fragment(value.text if type(value) is EncodedValue else encoded(value))


def encoded(value: object) -> bytes:
    """Return the value as JSON text.

    Raises:
        NotStorableError: the value can't be stored; the message says where and why.
    """
    raw = _encode_plain(value)
    return _clean(value)[1].encode() if raw is None else raw


def dump(value: object) -> str:
    """Return the compact JSON text of a value that is built of storable values, as a row is.

    Only a value that orjson refuses is cleaned again. The limits are twice as wide, to leave room
    for what was built around the storable values.
    """
    try:
        raw = orjson.dumps(value)
        # The search for one byte is thirty times as fast, and most texts end it.
        if b"\\" not in raw or b"\\u0000" not in raw:
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
    """Encode a value of JSON's own types; return None for a value that has to be cleaned."""
    if not _is_plain(value):
        return None
    try:
        raw = orjson.dumps(value)
    except TypeError:  # a lone surrogate, an integer beyond 64 bits, a key that is not text
        return None
    if len(raw) > MAX_SIZE:
        raise _not_storable(TOO_LARGE)
    # A text that holds a backslash and "u0000" looks the same; cleaning leaves it as it is.
    return None if b"\\u0000" in raw else raw


def _is_plain(value: object) -> bool:
    """Tell whether the value consists of JSON's own types; refuse a value beyond the limits.

    orjson must not see it earlier: it would write for ever on lists that hold each other several
    times.
    """
    values, room = MAX_VALUES, MAX_SIZE
    layer: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        deeper: list[object] = []
        for item in layer:
            kind = type(item)  # The frequent types come first: these tests are most of the cost.
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


def _clean(value: object) -> tuple[Json, str]:
    try:
        plain = Cleaner().clean(value)
        text = _text(plain)
    except Refusal as refusal:
        raise _not_storable(str(refusal)) from refusal.__cause__
    except RecursionError:
        raise _not_storable(TOO_DEEP) from None
    if len(text) > MAX_SIZE // 4 and len(text.encode()) > MAX_SIZE:
        raise _not_storable(TOO_LARGE)
    return plain, text


def _not_storable(reason: str) -> NotStorableError:
    return NotStorableError(f"a value can't be stored: {reason}")
