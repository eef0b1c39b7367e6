"""Say that the installed bullmq or redis-py is not the one that this package knows.

This package uses private parts of both. Another minor version may break it, or change its behaviour
in silence. `official_worker` checks bullmq, and `client` checks redis-py.
"""

import re

from autoflow_worker.errors import LibraryMismatchError


def mismatch(library: str, difference: object) -> LibraryMismatchError:
    """Return the error that names the installed version, the needed one, and the difference."""
    from importlib import metadata  # noqa: PLC0415 - slow, and needed for this error only

    try:
        installed, lines = metadata.version(library), metadata.requires("autoflow-worker") or []
    except metadata.PackageNotFoundError:
        installed, lines = "of an unknown version", []
    is_it = re.compile(rf"{library}[^\w.-]")
    needed = next((line for line in lines if is_it.match(line)), library)
    return LibraryMismatchError(
        f"{library} {installed} is installed, and this worker needs {needed}: {difference}\n"
        f"To mend it: pip install '{needed}'"
    )


def mismatch_of_import(error: ImportError) -> LibraryMismatchError | None:
    """Return the error that names what one of the two libraries lacks; None for other imports."""
    library = (error.name or "").partition(".")[0]
    return mismatch(library, error) if library in {"bullmq", "redis"} else None
