"""The rights of the Redis user that `docs/permissions.md` makes."""

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "permissions.md"


def documented_rules() -> list[str]:
    """Return the rules of the document's ACL SETUSER."""
    found = re.search(r"\nACL SETUSER autoflow on >PASSWORD (.+)\n", DOCUMENT.read_text())
    assert found is not None
    return found[1].split()
