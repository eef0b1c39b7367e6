"""A limit to the slots of one TaskWorker that wait with outcomes which PostgreSQL refuses."""


class HeldOutcomes:
    """Keeps slots free for other jobs, whatever rows PostgreSQL refuses.

    Args:
        limit: slots that may wait with a refused outcome at once.
    """

    def __init__(self, limit: int) -> None:
        self._room = limit

    def enter(self) -> bool:
        """Take one place; return whether there was one."""
        if self._room <= 0:
            return False
        self._room -= 1
        return True

    def leave(self) -> None:
        """Give a place back."""
        self._room += 1
