"""What README and docs/ name is there, and their lines are short enough to read anywhere."""

import re
from pathlib import Path

import pytest

import autoflow_worker
from tests.support.readme import REPOSITORY, modules

SOURCE = Path(autoflow_worker.__file__).parent
WINGS = "|".join(sorted(path.parent.name for path in SOURCE.glob("*/__init__.py")))
PAGES = [
    *REPOSITORY.glob("*.md"),
    *REPOSITORY.glob("docs/*.md"),
    *(REPOSITORY / f / "README.md" for f in ("tests", "chaos", "parity", "docs/upstream")),
]

# `service.py`, `broker/claim`, `tests/unit/test_imports.py`
NAMED = re.compile(rf"[\w./-]+\.py\b|(?<![\w./-])(?:{WINGS})/\w+")
#: A reader's own files, which the pages show.
THEIRS = {*modules(), "tasks_config.py"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def is_there(name: str, page: Path) -> bool:
    """Whether a file or a module has this name, seen from the page, the repository or its code."""
    paths = [root / name for root in (page.parent, REPOSITORY, SOURCE)]
    return any(path.exists() or path.with_suffix(".py").exists() for path in paths)


@pages
def test_each_module_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    theirs = THEIRS | modules(text).keys()
    names = {name for name in NAMED.findall(text) if Path(name).name not in theirs}
    assert {name for name in names if not is_there(name, page)} == set()


@pages
def test_each_link_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    files = {target for target in targets if "://" not in target}
    assert {target for target in files if not (page.parent / target).exists()} == set()


@pages
def test_lines_wrap_at_100(page: Path) -> None:
    prose = re.sub(r"^```.+?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 100] == []
