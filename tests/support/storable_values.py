"""Values of every kind, and both shapes in which a value is stored."""

import json
from dataclasses import dataclass
from enum import Enum, IntEnum, StrEnum
from typing import Any

from autoflow_worker.encoding.cleaner import Json
from autoflow_worker.encoding.results import dump, fragment, storable


class Colour(Enum):
    RED = "red"
    PAIR = ("a", 1)


class Size(IntEnum):
    LARGE = 3


class Word(StrEnum):
    YES = "yes"


@dataclass(slots=True)
class Slotted:
    value: Any


def nested(depth: int, innermost: object = 1) -> object:
    value = innermost
    for level in range(depth):
        value = [value] if level % 2 else {"in": value}
    return value


def in_both_shapes(value: object) -> tuple[Json, str]:
    """The value as plain JSON types and as JSON text, which must say the same."""
    plain, text = storable(value), dump(fragment(value))
    assert json.loads(text) == plain
    return plain, text
