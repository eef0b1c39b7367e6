"""Variables that look like ours and are not: a name with a typo changes nothing, in silence."""

from collections.abc import Collection, Mapping
from difflib import SequenceMatcher
from typing import NamedTuple

#: Letters that may be too many, missing or other ones, where another one counts twice.
_DIFFERENCE = 2
#: The values of NODE_ENV that mean something here or choose a .env file.
_NODE_ENVS = ("production", "development", "test")
_SHORTEST_PREFIX = 3


class Lookalike(NamedTuple):
    """What was set, and what was probably meant."""

    variable: str
    nearest: str

    def __str__(self) -> str:
        return f"{self.variable} is not known; the nearest is {self.nearest}"


def lookalikes(environ: Mapping[str, str], known: Collection[str]) -> list[Lookalike]:
    """Find the variables whose names are nearly one of ours, and a NODE_ENV that is nearly one.

    Args:
        environ: the environment; values other than NODE_ENV's are not looked at.
        known: the names of ours, in capitals.
    """
    found = []
    for name in sorted(environ):
        nearest = next((each for each in known if _is_near(name.upper(), each)), None)
        if nearest is not None and name.upper() not in known:
            found.append(Lookalike(name, nearest))
    value = environ.get("NODE_ENV", "").strip().lower()
    if value and value not in _NODE_ENVS:
        nearest = next((each for each in _NODE_ENVS if _is_near_value(value, each)), None)
        if nearest is not None:
            found.append(Lookalike(f"NODE_ENV={value}", f"NODE_ENV={nearest}"))
    return found


def _is_near(name: str, known: str) -> bool:
    # Many programs have a LOGLEVEL of their own, and REDIS_URL_2 is none of ours.
    return "_" in name and not name.startswith(known) and _difference(name, known) <= _DIFFERENCE


def _is_near_value(value: str, known: str) -> bool:
    abbreviated = len(value) >= _SHORTEST_PREFIX and known.startswith(value)
    return abbreviated or _difference(value, known) <= _DIFFERENCE


def _difference(word: str, other: str) -> int:
    length = len(word) + len(other)
    if abs(len(word) - len(other)) > _DIFFERENCE:
        return length
    return length - round(SequenceMatcher(None, word, other, autojunk=False).ratio() * length)
