"""docs/bullmq.md has a line for everything that BullMQ's Worker has, and its lines are true."""

import re
import typing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import bullmq
import pytest
from bullmq.types import WorkerOptions as PythonOptions

from autoflow_worker import JobHandle
from autoflow_worker.errors import TaskListError
from autoflow_worker.tasks import exceptions
from autoflow_worker.tasks.worker_options import (
    AdvancedSettings,
    WorkerOptions,
    check_worker_options,
)
from tests.support.node import FOLDER
from tests.support.readme import REPOSITORY

PAGE = REPOSITORY / "docs/bullmq.md"
NODE_5, NODE_6 = (FOLDER / f"node_modules/bullmq{n}/dist/esm" for n in (5, 6))
PYTHON = Path(bullmq.__file__).parent
# Options that `WorkerOptions` inherits.
OPTIONS = ("worker-options", "sandboxed-options", "queue-options")
INHERITED = {"WorkerOptions", "SandboxedOptions", "QueueBaseOptions", "KeyPrefixOptions"}


@dataclass(frozen=True)
class Line:
    """A line of the page's tables."""

    what: str
    node_5: str
    node_6: str
    python: str
    here: str
    test: str

    @property
    def names(self) -> list[str]:
        """BullMQ's names, if the line is about names: `job.log`, `"drained"`, `lockDuration`."""
        named = re.fullmatch(r"`[^`() ]+`(, `[^`() ]+`)*", self.what)
        return re.findall("`(.+?)`", self.what) if named else []


LINES = [
    Line(*(cell.strip() for cell in row.strip("|").split(" | ")))
    for row in re.findall(r"^\|.+\|$", PAGE.read_text(), re.MULTILINE)
    if not row.startswith(("| BullMQ |", "|---"))
]
LINE_OF = {name: line for line in LINES for name in line.names}


def bodies(source: Path) -> dict[str, str]:
    """The bodies of a declaration file's classes and interfaces, without comments."""
    text = re.sub(r"/\*.+?\*/", "", source.read_text(), flags=re.DOTALL)
    found = re.findall(
        r"^export (?:declare )?(?:class|interface) (\w+).+?\{\n(.*?)^\}",
        text,
        re.MULTILINE | re.DOTALL,
    )
    return dict(found)


def members(body: str) -> set[str]:
    """The public members of a body; of static ones the class's name is to be added."""
    return {
        ("static " if "static" in words else "") + name
        for words, name in re.findall(
            r"^ {4}((?:static |readonly |[gs]et )*)(\w+)\??[(<:]", body, re.MULTILINE
        )
        if name != "constructor" and words + name not in ("protected", "private")
    }


def names_of_node(folder: Path) -> set[str]:
    """The names that a version of BullMQ for Node has, as the page writes them."""
    found: set[str] = set()
    for name in ("worker", "job"):
        declared = bodies(folder / f"classes/{name}.d.ts")
        for member in members(declared[name.title()]):
            static = member.startswith("static ")
            bare = member.removeprefix("static ")
            found.add(f"{name.title() if static else name}.{bare}")
    events = bodies(folder / "classes/worker.d.ts")["WorkerListener"]
    found |= {f'"{event}"' for event in members(events)}
    for name in OPTIONS:
        for interface, body in bodies(folder / f"interfaces/{name}.d.ts").items():
            if interface in INHERITED:
                found |= members(body)
    exported = (folder / "classes/errors/index.d.ts").read_text()
    words = re.findall(r"'\./([\w-]+)-error'", exported)
    return found | {"".join(map(str.title, word.split("-"))) + "Error" for word in words}


def names_of_python() -> set[str]:
    """The names that the Python package has, as far as the page has lines for them."""
    source = "".join(path.read_text() for path in PYTHON.glob("*.py"))
    quoted = set(re.findall(r"[\"'](\w+)[\"']", source))
    alive = bullmq.Job(SimpleNamespace(backend=None, qualifiedName=""), "name", {})
    emitted = {f'"{name}"' for name in re.findall(r"emit\(\s*[\"'](\w+)[\"']", source)}
    worker_source = (PYTHON / "worker.py").read_text()
    found = set()
    for name in LINE_OF:
        owner, _, member = name.rpartition(".")
        if owner == "job":
            there = hasattr(alive, member)
        elif owner == "Job":
            there = hasattr(bullmq.Job, member)
        elif owner in ("worker", "Worker"):
            there = hasattr(bullmq.Worker, member) or f"self.{member} = " in worker_source
        elif name.endswith("Error"):
            there = hasattr(bullmq, name)
        else:
            there = name in emitted or name in quoted | PythonOptions.__annotations__.keys()
        if there:
            found.add(name)
    return found


def names_of_handle() -> set[str]:
    public = {name for name in vars(JobHandle) if not name.startswith("_")}
    return public | typing.get_type_hints(JobHandle).keys()


def test_everything_that_a_bullmq_has_is_there() -> None:
    wanted = names_of_node(NODE_5) | names_of_node(NODE_6)
    wanted |= PythonOptions.__annotations__.keys() | WorkerOptions.__annotations__.keys()
    wanted |= {f"job.{name}" for name in names_of_handle()} | set(exceptions.__all__)
    assert sorted(wanted - LINE_OF.keys()) == []
    assert len(wanted) > 130


def test_each_line_says_which_bullmq_has_it() -> None:
    def wrong(column: str, has: set[str]) -> list[str]:
        return [
            f"{name}: {getattr(line, column)}"
            for name, line in LINE_OF.items()
            if getattr(line, column).startswith("no") == (name in has)
        ]

    assert wrong("node_5", names_of_node(NODE_5)) == []
    assert wrong("node_6", names_of_node(NODE_6)) == []
    assert wrong("python", names_of_python()) == []


@pytest.mark.parametrize("name", [n for n in LINE_OF if re.fullmatch(r"[a-z]\w+", n)])
def test_an_option_has_an_effect_or_is_refused_with_the_way_out(name: str) -> None:
    taken = name in WorkerOptions.__annotations__
    assert LINE_OF[name].here.startswith("yes" if taken else "refused: ")
    if not taken:
        options = {name: 1}
        with pytest.raises(TaskListError, match=f"{name} has no effect here: "):
            check_worker_options("mail", options)


@pytest.mark.parametrize("name", [n for n in LINE_OF if n.startswith("job.")])
def test_a_handler_may_use_what_is_said_to_be_here(name: str) -> None:
    here = name.removeprefix("job.") in names_of_handle()
    assert LINE_OF[name].here.startswith("yes" if here else "no: ")


def test_the_line_on_settings_names_each_of_them() -> None:
    for name in AdvancedSettings.__annotations__:
        assert f"`{name}`" in LINE_OF["settings"].here


def test_each_line_has_a_test() -> None:
    missing = []
    for line in LINES:
        [(path, name)] = re.findall(r"^\[.+\]\(\.\./(.+?)#(test_\w+)\)$", line.test)
        if not re.search(rf"^(async )?def {name}\(", (REPOSITORY / path).read_text(), re.MULTILINE):
            missing.append(line.test)
    assert missing == []
    assert len(LINES) > 100
