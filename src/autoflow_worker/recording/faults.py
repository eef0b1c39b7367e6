"""What an error of PostgreSQL means: whose fault it is, whether it may pass, what is said of it."""

import enum
from typing import Final

import psycopg

from autoflow_worker.encoding.masking import mask_secrets

REFUSED: Final = (
    psycopg.errors.InvalidPassword,
    psycopg.errors.InvalidAuthorizationSpecification,
    psycopg.errors.InvalidCatalogName,
)
CONFLICTS: Final = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
# libpq's errors while connecting carry no SQLSTATE, only the server's words.
WORDS_OF_REFUSAL: Final = (
    "authentication failed",
    "does not exist",
    "is not permitted to log in",
    "no password supplied",
    "pg_hba.conf",  # has no entry, or one that rejects
    "permission denied for database",
)


def is_refusal(error: BaseException) -> bool:
    """Whether PostgreSQL refuses the user, the password or the database's name: not an outage."""
    words = str(error)
    return isinstance(error, REFUSED) or (
        isinstance(error, psycopg.OperationalError)
        and error.sqlstate is None
        and any(refusal in words for refusal in WORDS_OF_REFUSAL)
    )


def may_be_for_good(error: BaseException) -> bool:
    """Whether an error may last for ever: a missing right, a missing table, a new constraint.

    One row may also be refused for a reason of its own, so a check as at the start has to decide.
    """
    return is_refusal(error) or (
        isinstance(error, psycopg.Error)
        and not isinstance(
            error,
            psycopg.OperationalError
            | psycopg.InterfaceError
            | psycopg.errors.ReadOnlySqlTransaction,
        )
    )


class Blame(enum.Enum):
    """Whose fault it is that a statement failed."""

    CONTENT = "content"  # a patch holds a value that PostgreSQL can never store
    ROW = "row"  # PostgreSQL refuses one row now; its patch may be taken later
    SERVER = "server"  # no row can be written now
    CODE = "code"  # this package's code breaks over one write, or over all


# By classes of SQLSTATE: data that can't be stored, and limits of the program.
_CONTENT_CLASSES: Final = frozenset({"22", "54"})
# Constraints (23), what triggers and their functions raise, a view's check, and damage.
_ROW_CLASSES: Final = frozenset({"09", "20", "21", "23", "2F", "38", "39", "44", "P0", "XX"})
# A policy or a missing right, and a statement that took too long.
_ROW_CODES: Final = frozenset({"42501", "57014"})


def blame(error: Exception) -> Blame:
    """Return whose fault an error is that was raised while a batch was written."""
    if isinstance(error, UnicodeError):  # half a surrogate pair
        return Blame.CONTENT
    if isinstance(error, psycopg.Error):
        code = error.sqlstate or ""
        if code[:2] in _CONTENT_CLASSES:
            return Blame.CONTENT
        if code[:2] in _ROW_CLASSES or code in _ROW_CODES:
            return Blame.ROW
        # An invalid statement is ours (the table has changed), unless a trigger contains it.
        return Blame.ROW if code[:2] == "42" and error.diag.context else Blame.SERVER
    return Blame.SERVER if isinstance(error, OSError) else Blame.CODE


def reason_of(error: Exception) -> str:
    """Return an error in words, without what the server quotes from the row.

    The text of a psycopg error holds DETAIL, which lists all columns of the row, and CONTEXT, which
    quotes JSON. libpq repeats its words for each address that a host's name has.
    """
    if isinstance(error, psycopg.Error):
        reason = error.diag.message_primary or str(error)
        if (error.sqlstate or "").startswith("22"):
            reason = reason.partition(': "')[0]  # what follows is the value
    elif isinstance(error, UnicodeError):
        reason = str(error)
    else:
        reason = f"{type(error).__name__}: {error}"
    lines = dict.fromkeys(line.strip() for line in reason.splitlines())
    return mask_secrets(" ".join(filter(None, lines))) or type(error).__name__
