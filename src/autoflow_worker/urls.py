"""Checks that REDIS_URL and DATABASE_URL share.

No message quotes a URL: the password may be any part of a malformed one.
"""

import re
from collections.abc import Collection
from typing import Final
from urllib.parse import urlsplit

from autoflow_worker.lookalikes import nearest

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,20}(?=://)")
_UNKNOWN_OPTION = re.compile(
    r"(?:unexpected keyword argument|URI query parameter:) ['\"](\w+)['\"]"
)
ENCODED: Final = "in a user name or password, / ? # @ : [ ] have to be written percent-encoded"


def option_fault(error: Exception, url: str, known: Collection[str]) -> str:
    """Say which option the driver does not know, and name the nearest one that it knows."""
    option = _UNKNOWN_OPTION.search(str(error))
    # If a password is among the options, the unknown option may be the password's part behind an &.
    if option is None or "pass" in urlsplit(url).query.lower():
        return "the driver can't read its options"
    like = nearest(option[1], known)
    return f"it has no option {option[1]!r}" + (f"; the nearest is {like!r}" if like else "")


def outline(url: str, schemes: Collection[str]) -> str:
    """Return the URL if it can be split into its parts.

    Raises:
        ValueError: it can't be split, or its scheme is not one of `schemes`.
    """
    if any(character.isspace() or not character.isprintable() for character in url):
        raise ValueError("it contains a blank or a control character")
    scheme = SCHEME.match(url)
    if scheme is None or scheme[0].lower() not in schemes:
        raise ValueError("its scheme is wrong" if scheme else "it has no scheme")
    if re.search(r"%(?![0-9A-Fa-f]{2})", url):
        raise ValueError("a % in a user name or password has to be written as %25")
    try:
        parts = urlsplit(url)
        # PostgreSQL takes several hosts separated by commas, which urlsplit can't take apart.
        _ = "," in parts.netloc or parts.port
    except ValueError:
        raise ValueError(f"its host or port can't be read; {ENCODED}") from None
    # A / ? or # in a password ends it too early. Its beginning would be read as the host, which
    # drivers print, and its rest as a path or an option.
    after = parts.query + parts.fragment + ("" if parts.scheme == "unix" else parts.path)
    if "@" in after:
        raise ValueError(f"it has an @ behind its host; {ENCODED}, @ as %40")
    return url
