"""What a scenario is, and the list of all of them."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from parity.side import Side

Json = dict[str, Any]
Version = Literal[5, 6]
VERSIONS: Final[tuple[Version, ...]] = (5, 6)
VERSION_NAMES: Final[Mapping[Version, str]] = {5: "5.65", 6: "6.7"}

Story = Callable[["Side"], Awaitable[None]]


@dataclass(frozen=True, eq=False)
class Scenario:
    """A story that is told twice: once with Node's Worker, once with this one.

    Attributes:
        name: its module and its function, `flows/deep`.
        story: adds jobs, lets the workers start, and waits for the end.
        workers: the options of the worker of each queue, by the queue's suffix; "" is the main one.
        versions: those of BullMQ that know what it is about.
        varies: patterns of paths whose values no two runs share, such as a random delay.
        kills: the story has the workers killed, so it needs a batch with its like.
        short: part of the short run in the tests.
    """

    name: str
    story: Story
    workers: Mapping[str, Json]
    versions: tuple[Version, ...] = VERSIONS
    varies: tuple[str, ...] = ()
    kills: bool = False
    short: bool = False

    @property
    def queue(self) -> str:
        """The name of the main queue."""
        return self.name.replace("/", "-").replace("_", "-")

    def queue_of(self, suffix: str) -> str:
        return f"{self.queue}-{suffix}" if suffix else self.queue

    @property
    def queues(self) -> dict[str, Json]:
        """The options of each queue's worker, by the queue's name."""
        return {self.queue_of(suffix): options for suffix, options in self.workers.items()}


ALL: dict[str, Scenario] = {}


def scenario(
    *,
    queues: Mapping[str, Json] | Sequence[str] = (),
    versions: tuple[Version, ...] = VERSIONS,
    varies: tuple[str, ...] = (),
    kills: bool = False,
    short: bool = False,
    **worker: Any,
) -> Callable[[Story], Story]:
    """Enter the decorated story into `ALL`.

    Args:
        queues: suffixes of further queues, with the options of their workers.
        worker: options of the main queue's worker by BullMQ's names, and `backoff`, which names one
            of the strategies in `parity/script.py`.
    """

    def enter(story: Story) -> Story:
        name = f"{story.__module__.rpartition('.')[2]}/{story.__name__}"
        others = dict(queues) if isinstance(queues, Mapping) else {suffix: {} for suffix in queues}
        ALL[name] = Scenario(name, story, {"": worker, **others}, versions, varies, kills, short)
        return story

    return enter
