"""Checks DATABASE_URL.

libpq's own parser decides at the end, so that a URL that passes here can't fail at the start.
"""

import re
from urllib.parse import urlsplit

from autoflow_worker.urls import ENCODED, option_fault, outline


def database_url(url: str) -> str:
    """Return the URL without surrounding blanks.

    Raises:
        ValueError: libpq can't use it; the message says why and shows no part of it.
    """
    url = url.strip()
    if re.match(r"\w+\s*=", url):
        raise ValueError("it is a list of key=value, not a URL")
    url = outline(url, {"postgres", "postgresql"})
    # libpq ends the password at the first @ and would print the rest as the host's name.
    if urlsplit(url).netloc.count("@") > 1:
        raise ValueError(f"it has more than one @; {ENCODED}, @ as %40")
    from psycopg import Error, conninfo, pq  # noqa: PLC0415 - heavy, and needed for a start only

    try:
        conninfo.conninfo_to_dict(url)
    except Error as error:
        known = [option.keyword.decode() for option in pq.Conninfo.get_defaults()]
        raise ValueError(option_fault(error, url, known)) from None
    return url
