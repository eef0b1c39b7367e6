"""The rules of the house: imports run one way, and each library has its wing."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import autoflow_worker

SOURCE = Path(autoflow_worker.__file__).parent

# Wings, and modules of the root, from the ground up. Each imports from the floors below it only, so
# those on one floor never import each other.
FLOORS = [
    {"errors", "outage", "lookalikes", "pauses", "clock"},
    {"encoding", "urls"},
    {"logs"},
    {"broker", "recording", "tasks", "process"},
    {"settings"},
    {"worker", "scheduling", "operations"},
    {"service", "supervisor", "autoflow_worker"},
    {"local"},
    {"cli", "testing"},
]
FLOOR = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}

# The wings that may import a library; the others go through these.
LIBRARIES = {
    "psycopg psycopg_pool": {"recording"},
    "bullmq": {"broker", "tasks"},  # tasks passes its exceptions on
    "http aiohttp starlette uvicorn": {"operations"},
    "click": {"cli"},
}


def imports(path: Path) -> Iterator[str]:
    """Each module that a module imports, wherever in its text, as a dotted name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in names if name in MODULES]
            yield from modules or [str(node.module)]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def wing(module: str) -> str:
    return (*module.split("."), "autoflow_worker")[1]


# Not `__main__`, which calls `cli` and nothing else.
MODULES = {dotted(path): path for path in SOURCE.rglob("*.py") if path.name != "__main__.py"}
IMPORTS = {module: set(imports(path)) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    for other in IMPORTS[module] & MODULES.keys():
        same = wing(module) == wing(other)
        assert same or FLOOR[wing(other)] < FLOOR[wing(module)], f"{module} imports {other}"


def test_there_is_no_circle() -> None:
    own = {module: found & MODULES.keys() for module, found in IMPORTS.items()}
    list(TopologicalSorter(own).static_order())


@pytest.mark.parametrize("libraries", LIBRARIES)
def test_a_library_has_its_wings(libraries: str) -> None:
    for module, found in IMPORTS.items():
        if not {name.split(".")[0] for name in found}.isdisjoint(libraries.split()):
            assert wing(module) in LIBRARIES[libraries], f"{module} imports {libraries}"


def test_a_wing_begins_with_a_word_on_what_it_is_for() -> None:
    for path in set(SOURCE.glob("*/**/__init__.py")) - {SOURCE / "testing" / "__init__.py"}:
        [only] = ast.parse(path.read_text()).body
        assert isinstance(only, ast.Expr), f"{path}: one docstring"


def test_the_surface_is_sorted_and_whole() -> None:
    names = autoflow_worker.__all__
    assert names == sorted(names)
    for name in names:
        assert getattr(autoflow_worker, name) is not None
