"""The table of tasks that `check` prints, and what is to be said of their payloads."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from pydantic import TypeAdapter

from autoflow_worker.tasks import payload as payloads
from autoflow_worker.tasks.batches import check_batch
from autoflow_worker.tasks.definition import TaskDefinition

WIDTH: Final = 80

_HEADER: Final = ("queue", "kind", "slots", "limit", "attempts", "payload")
_NUMBERS: Final = {2, 3, 4}  # columns that are aligned to the right
_QUEUE_WIDTH: Final = 24  # a longer name has a line of its own
_GAP: Final = "  "


def task_table(tasks: Sequence[TaskDefinition[Any]], concurrency: int) -> list[str]:
    """Return a line for each task, below a header; none has more than `WIDTH` columns.

    Only a queue's name is never cut: one that is too long for its column has a line before.

    Args:
        concurrency: of a task that does not say it (WORKER_CONCURRENCY).

    Raises:
        TaskListError: a task would have too many slots.
    """
    rows = [_HEADER, *(_row(task, concurrency) for task in tasks)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    widths[0] = min(widths[0], _QUEUE_WIDTH)
    lines = []
    for row in rows:
        cells = row
        if len(row[0]) > widths[0]:
            lines.append(row[0])
            cells = ("", *row[1:])
        columns = enumerate(zip(cells, widths, strict=True))
        line = _GAP.join(
            cell.rjust(width) if number in _NUMBERS else cell.ljust(width)
            for number, (cell, width) in columns
        ).rstrip()
        lines.append(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…")
    return lines


def hidden_payloads(tasks: Sequence[TaskDefinition[Any]]) -> Iterator[str]:
    """Warn of each task whose handler gets a dict because a decorator hides its payload's type."""
    for task in tasks:
        typed = task.payload_adapter is not None or task.payload_source == "argument"
        if typed or task.batch is not None:
            continue
        hidden = payloads.hidden_annotation(task.handler)
        if hidden is not payloads.NO_ANNOTATION:
            name = getattr(hidden, "__name__", str(hidden))
            yield (
                f"{task.queue_name}: a decorator hides the handler's payload type {name}, so the "
                "handler gets a dict that nothing validates. Let the decorator use "
                f"functools.wraps, or give define_task payload={name}"
            )


def _row(task: TaskDefinition[Any], concurrency: int) -> tuple[str, ...]:
    options = task.options
    kind = "batch" if task.batch else options.run_in or ("async" if task.is_async else "thread")
    return (
        task.queue_name,
        kind,
        str(check_batch(task.queue_name, task.batch, options.concurrency or concurrency)),
        _duration(options.timeout_ms),
        str(options.max_attempts),
        _payload(task),
    )


def _duration(ms: int | None) -> str:
    if ms is None:
        return "none"
    return f"{ms / 1000:.10g} s" if ms // 1000 else f"{ms} ms"


def _payload(task: TaskDefinition[Any]) -> str:
    adapter: TypeAdapter[Any] | None = task.payload_adapter
    if adapter is None:
        return "dict" if task.payload_source else "dict (no annotation)"
    return repr(adapter).removeprefix("TypeAdapter(").removesuffix(")")
