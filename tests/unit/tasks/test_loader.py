import itertools
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoflow_worker.errors import TaskListError
from autoflow_worker.tasks.loader import load_tasks

_numbers = itertools.count(1)

TWO_TASKS = """
from autoflow_worker import define_task

async def handler(payload, ctx): ...

tasks = [define_task("a", handler), define_task("b", handler)]
one = tasks[0]
twice = (tasks[0], tasks[0])
"""


class Project:
    """A working directory with a module of its own name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"user_tasks_{next(_numbers)}"

    def write(self, text: str) -> str:
        (self.folder / f"{self.name}.py").write_text(textwrap.dedent(text))
        return self.name


@pytest.fixture
def project(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("project")
    monkeypatch.chdir(folder)
    path, modules = list(sys.path), set(sys.modules)
    yield Project(folder)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def fault(target: str, queues: list[str] | None = None) -> str:
    with pytest.raises(TaskListError) as caught:
        load_tasks(target, queues)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_the_working_directory_is_where_tasks_are(project: Project) -> None:
    module = project.write(TWO_TASKS)
    assert [task.queue_name for task in load_tasks(f"{module}:tasks")] == ["a", "b"]
    assert [task.queue_name for task in load_tasks(f"{module}:tasks", ["b"])] == ["b"]


def test_an_attribute_may_lie_deeper(project: Project) -> None:
    module = project.write(TWO_TASKS + "\nclass Config:\n    all = tasks\n")
    assert len(load_tasks(f"{module}:Config.all")) == 2


@pytest.mark.parametrize("target", ["tasks", "tasks:", ":tasks", ""])
def test_a_target_without_its_parts(project: Project, target: str) -> None:
    assert "module:attribute" in fault(target)


def test_a_missing_module(project: Project) -> None:
    message = fault("nowhere:tasks")
    assert "no module 'nowhere'" in message
    assert str(project.folder) in message
    assert "TASKS_CONFIG" in message
    assert "no module 'nowhere'" in fault("nowhere.tasks:tasks")


def test_a_module_that_misses_another_one(project: Project) -> None:
    module = project.write("import os\nimport not_there\n")
    message = fault(f"{module}:tasks")
    assert "ModuleNotFoundError: No module named 'not_there'" in message
    assert f"({module}.py, line 2)" in message


def test_a_module_that_raises(project: Project) -> None:
    module = project.write(
        """
        import json

        def parse(text):
            return json.loads(text)

        parse("{")
        """
    )
    message = fault(f"{module}:tasks")
    assert "JSONDecodeError: " in message
    assert message.endswith(f"({module}.py, line 5)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "SyntaxError: '(' was never closed ({module}.py, line 1)"),
        ("import sys\nsys.exit(3)", "SystemExit: 3 ({module}.py, line 2)"),
        ("raise Exception", "raised Exception ({module}.py, line 1)"),
    ],
)
def test_modules_that_can_not_be_imported(project: Project, text: str, message: str) -> None:
    module = project.write(text)
    assert fault(f"{module}:tasks").endswith(message.format(module=module))


def test_a_task_that_can_not_work_is_told_with_its_place(project: Project) -> None:
    module = project.write("from autoflow_worker import define_task\n\ndefine_task('mails', 5)\n")
    message = fault(f"{module}:tasks")
    assert "task 'mails': handler must be a function" in message
    assert message.endswith(f"({module}.py, line 3)")


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("nothing", "has no attribute 'nothing'"),
        ("one", "must be a list of tasks, not a TaskDefinition"),
        ("handler", "must be a list of tasks, not a function"),
        ("twice", "two tasks have the queue 'a'"),
        ("empty", "is empty"),
        ("mixed", "item 1 is a function, not what define_task returns"),
    ],
)
def test_lists_that_can_not_work(project: Project, attribute: str, message: str) -> None:
    module = project.write(TWO_TASKS + "empty = []\nmixed = [one, handler]\n")
    assert message in fault(f"{module}:{attribute}")


def test_queues_that_no_task_has(project: Project) -> None:
    module = project.write(TWO_TASKS)
    message = fault(f"{module}:tasks", ["b", "c", "d"])
    assert "'c', 'd'" in message
    assert "there are 'a', 'b'" in message
