"""Names that are nearly one of ours: what somebody meant, where a typo would do nothing."""

from collections.abc import Collection, Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches
from typing import NamedTuple

#: Letters that may be added, missing or replaced in a variable's name; a replaced one counts twice.
_DIFFERENCE = 2
#: The values of NODE_ENV that mean something here or choose a .env file.
_NODE_ENVS = ("production", "development", "test")
_SHORTEST_PREFIX = 3


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most like this one, or None; the case does not count."""
    by_lower = {each.lower(): each for each in known}
    found = get_close_matches(word.lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


class Lookalike(NamedTuple):
    """A variable that is set, and the one that was probably meant."""

    variable: str
    nearest: str

    def __str__(self) -> str:
        return f"{self.variable} is not known; the nearest is {self.nearest}"


def lookalikes(environ: Mapping[str, str], known: Collection[str]) -> list[Lookalike]:
    """Find the variables whose names are nearly one of ours, and a NODE_ENV that is nearly one.

    Our names are in capitals. No value but NODE_ENV's is read.
    """
    found = []
    for name in sorted(environ):
        meant = next((each for each in known if _is_near(name.upper(), each)), None)
        if meant is not None and name.upper() not in known:
            found.append(Lookalike(name, meant))
    value = environ.get("NODE_ENV", "").strip().lower()
    if value and value not in _NODE_ENVS:
        meant = next((each for each in _NODE_ENVS if _is_near_value(value, each)), None)
        if meant is not None:
            found.append(Lookalike(f"NODE_ENV={value}", f"NODE_ENV={meant}"))
    return found


def _is_near(name: str, known: str) -> bool:
    # Stricter than `nearest`, since other programs' variables are not ours: many programs have a
    # LOGLEVEL of their own, and REDIS_URL_2 is a name that somebody chose.
    return "_" in name and not name.startswith(known) and _difference(name, known) <= _DIFFERENCE


def _is_near_value(value: str, known: str) -> bool:
    abbreviated = len(value) >= _SHORTEST_PREFIX and known.startswith(value)
    return abbreviated or _difference(value, known) <= _DIFFERENCE


def _difference(word: str, other: str) -> int:
    length = len(word) + len(other)
    if abs(len(word) - len(other)) > _DIFFERENCE:
        return length
    return length - round(SequenceMatcher(None, word, other, autojunk=False).ratio() * length)
