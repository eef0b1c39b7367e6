"""How many slots of one TaskWorker may wait with outcomes that PostgreSQL does not take."""


class HeldOutcomes:
    """A limit, so that rows which PostgreSQL refuses don't take every slot from the other jobs.

    Args:
        limit: outcomes that may be held at once.
    """

    def __init__(self, limit: int) -> None:
        self._room = limit

    def enter(self) -> bool:
        """Take one place, if there is one."""
        if self._room <= 0:
            return False
        self._room -= 1
        return True

    def leave(self) -> None:
        """Give a place back."""
        self._room += 1
