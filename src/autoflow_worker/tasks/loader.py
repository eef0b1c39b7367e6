"""Imports the task list that ``module:attribute`` names, and checks it."""

import importlib
import os
import sys
import traceback
from collections.abc import Collection
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from textwrap import indent
from typing import Any, Final

from autoflow_worker.errors import TaskListError
from autoflow_worker.tasks.definition import TaskDefinition

# A first `tasks_config.py`.
EXAMPLE: Final = """\
from autoflow_worker import define_task

async def greet(payload, ctx):
    return f"Hello, {payload['name']}!"

tasks = [define_task("greetings", greet)]"""


def load_tasks(target: str, queues: Collection[str] | None = None) -> list[TaskDefinition[Any]]:
    """Import the task list, check it, and return the tasks of the queues; ``None``: of all.

    The module of ``module:attribute`` is looked up in the working directory first.

    Raises:
        TaskListError: the list does not exist, or an item of it is invalid.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise TaskListError(f"task list {target!r} must be written as module:attribute")
    module = _import(target, module_name)
    try:
        value = attrgetter(attribute)(module)
    except AttributeError:
        raise TaskListError(
            f"task list {target!r}: {module.__name__} has no attribute {attribute!r}"
        ) from None
    tasks = _checked(target, value)
    if queues is None:
        return tasks
    known = {task.queue_name for task in tasks}
    if unknown := [queue for queue in queues if queue not in known]:
        raise TaskListError(
            f"no task in {target!r} has the queue {', '.join(map(repr, unknown))}; "
            f"there are {', '.join(map(repr, sorted(known)))}"
        )
    return [task for task in tasks if task.queue_name in queues]


def check_importable(target: str, task: TaskDefinition[Any]) -> None:
    """Check that another process finds this very task by importing the task list.

    Raises:
        TaskListError: it would not.
    """
    module_name, _, attribute = target.partition(":")
    listed: Any = None
    if module_name != "__main__":
        with suppress(KeyError, AttributeError):
            listed = attrgetter(attribute)(sys.modules[module_name])
    if not isinstance(listed, list | tuple) or not any(each is task for each in listed):
        raise TaskListError(
            f"task {task.queue_name!r}: run_in='process' imports the task list {target!r} in "
            "another process, and this task is not in it; put the task into a list in a module, "
            "and name that with --tasks or TASKS_CONFIG"
        )


def _import(target: str, module_name: str) -> Any:
    # For a console script, sys.path begins with the script's directory, not the working directory.
    cwd = str(Path.cwd())
    if cwd not in sys.path:
        sys.path.insert(0, cwd)
    try:
        return importlib.import_module(module_name)
    except TaskListError as error:
        raise TaskListError(f"task list {target!r}: {error}{_place(error)}") from error
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise TaskListError(_import_fault(target, error)) from error
        message = (
            f"task list {target!r}: there is no module {error.name!r} in {cwd} or on the "
            "Python path; name another one with --tasks or TASKS_CONFIG"
        )
        if module_name == "tasks_config":
            message += f", or write tasks_config.py:\n\n{indent(EXAMPLE, '  ')}"
        raise TaskListError(message) from error
    except (Exception, SystemExit) as error:
        raise TaskListError(_import_fault(target, error)) from error


def _import_fault(target: str, error: BaseException) -> str:
    # str() of a SyntaxError adds the place, but without the folder.
    text = str(error.msg if isinstance(error, SyntaxError) else error)
    lines = text.strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"task list {target!r}: importing it raised {what}{_place(error)}"


def _place(error: BaseException) -> str:
    """Return " (file, line n)" of the last line of the user's code."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({_short(error.filename)}, line {error.lineno})"
    package = str(Path(__file__).parents[1]) + os.sep
    libraries = str(Path(os.__file__).parent)
    # The user's module may have called a library. Its own last line tells more.
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        name = frame.filename
        if not name.startswith((package, libraries, "<")) and "site-packages" not in name:
            return f" ({_short(name)}, line {frame.lineno})"
    return ""


def _short(filename: str) -> str:
    path = Path(filename)
    cwd = Path.cwd()
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else filename


def _checked(target: str, value: object) -> list[TaskDefinition[Any]]:
    if not isinstance(value, list | tuple):
        raise TaskListError(
            f"task list {target!r} must be a list of tasks, not a {type(value).__name__}"
        )
    if not value:
        raise TaskListError(f"task list {target!r} is empty: there is nothing to run")
    seen: set[str] = set()
    for index, task in enumerate(value):
        if not isinstance(task, TaskDefinition):
            raise TaskListError(
                f"task list {target!r}: item {index} is a {type(task).__name__}, "
                "not what define_task returns"
            )
        if task.queue_name in seen:
            raise TaskListError(
                f"task list {target!r}: two tasks have the queue {task.queue_name!r}; "
                "a queue has one task"
            )
        seen.add(task.queue_name)
    return list(value)
