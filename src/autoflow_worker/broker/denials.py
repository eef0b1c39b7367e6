"""How Redis words that a user lacks a right, in a reply and in what a script ran into."""

import re
from typing import Final

# From Redis 6.2 on, and as Valkey does.
NO_KEY: Final = re.compile(r"(?:permissions to|can't) access", re.IGNORECASE)
NO_COMMAND: Final = re.compile(
    r"no permissions to run|can't run this command|unknown (?:redis )?command|unknown subcommand",
    re.IGNORECASE,
)


def is_denial(error: BaseException | str) -> bool:
    """Whether this error says that the user lacks a right, or the server a command."""
    text = str(error)
    return bool(NO_KEY.search(text) or NO_COMMAND.search(text))
