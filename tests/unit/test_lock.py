"""The lock files against pyproject.toml, and against what is installed here."""

import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.lock import FOLDER, REPOSITORY, lists
from scripts.test_matrix import VERSIONS

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
LISTS = lists(PROJECT)
REMEDY = "run `make lock`"


def locked(name: str, environment: dict[str, str]) -> dict[str, str]:
    """The packages of a lock file that such a Python gets, and their versions."""
    found: dict[str, str] = {}
    for line in (FOLDER / f"{name}.lock").read_text().splitlines():
        if line.startswith((" ", "#")):
            continue
        requirement = Requirement(line.removesuffix("\\"))
        if requirement.marker is None or requirement.marker.evaluate(environment):
            [specifier] = requirement.specifier
            assert specifier.operator == "=="
            package = canonicalize_name(requirement.name)
            assert package not in found, f"{package} twice in {name}.lock"
            found[package] = specifier.version
    return found


def wanted(lines: Iterable[str], environment: dict[str, str]) -> Iterator[Requirement]:
    """The requirements that count for such a Python."""
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield requirement


def python(version: str) -> dict[str, str]:
    here: dict[str, Any] = dict(default_environment())
    return {**here, "python_version": version, "python_full_version": f"{version}.20"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", LISTS)
def test_every_requirement_is_locked_as_pyproject_allows(name: str, version: str) -> None:
    packages = locked(name, python(version))
    for requirement in wanted(LISTS[name], python(version)):
        found = packages.get(canonicalize_name(requirement.name), "nothing")
        assert found != "nothing", f"{requirement} is not in {name}.lock: {REMEDY}"
        assert requirement.specifier.contains(found, prereleases=True), (
            f"{name}.lock has {requirement.name} {found}, not {requirement.specifier}: {REMEDY}"
        )


@pytest.mark.parametrize("name", ["dev", "worker", "build"])
def test_a_lock_has_what_its_requirements_need_and_nothing_else(name: str) -> None:
    here: dict[str, Any] = dict(default_environment())
    packages = locked(name, here)
    needed: set[str] = set()
    seen: set[str] = set()
    todo = [*wanted(LISTS[name], here)]
    while todo:
        requirement = todo.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        package = canonicalize_name(requirement.name)
        needed.add(package)
        try:
            installed = distribution(package)
        except PackageNotFoundError:
            pytest.fail(f"{package} is not installed: run `make setup`, or {REMEDY}")
        assert installed.version == packages.get(package), f"{package}: `make setup`, or {REMEDY}"
        for extra in {"", *requirement.extras}:
            todo += wanted(installed.requires or (), {**here, "extra": extra})
    assert packages.keys() == needed, REMEDY


def test_a_package_has_one_version_in_all_lock_files() -> None:
    for version in VERSIONS:
        everything = locked("dev", python(version))
        for name in ("worker", "build"):
            assert locked(name, python(version)).items() <= everything.items()


@pytest.mark.parametrize("name", LISTS)
def test_a_lock_names_hashes_and_no_index(name: str) -> None:
    text = (FOLDER / f"{name}.lock").read_text()
    assert "://" not in text
    assert "-url" not in text
    entries = re.split(r"\n(?=\w)", text)[1:]
    assert entries
    assert all(" --hash=sha256:" in entry for entry in entries)


def test_the_images_python_is_one_that_is_tested() -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    [version] = re.findall(r"^ARG BASE_IMAGE=python:(3\.\d+)-slim$", dockerfile, re.MULTILINE)
    assert version in VERSIONS
    assert f"Programming Language :: Python :: {version}" in PROJECT["project"]["classifiers"]
