"""Runs the tests on each Python from 3.11 on that this machine has: `make test-matrix`.

Looked for: `python3.11` and later ones in PATH, and what pyenv has installed. Each has a virtual
environment of its own, `.venv-3.12` and so on.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
VERSIONS = tuple(f"3.{minor}" for minor in range(11, 15))

# Debian's Python may lack ensurepip, and pyenv's shims run only the chosen version.
_PROBE = "import ensurepip, json, ssl, sys; print(json.dumps([sys.executable, sys.version_info]))"


def main() -> int:
    """Return the exit code."""
    found = pythons()
    results = dict.fromkeys(VERSIONS, "skipped, as there is no such Python here")
    failed = not found
    for version, python in found.items():
        print(f"test-matrix: Python {version}, {python}", flush=True)
        settings = (f"PYTHON={python}", f"VENV=.venv-{version}")
        done = subprocess.run(["make", *settings, "test"], cwd=REPOSITORY, check=False)
        results[version] = "failed" if done.returncode else "passed"
        failed = failed or done.returncode != 0
    for version, result in results.items():
        print(f"test-matrix: Python {version} {result}")
    return int(failed)


def pythons() -> dict[str, Path]:
    """Return one Python of each installed version that can make a virtual environment."""
    found: dict[str, Path] = {}
    for candidate in _candidates():
        done = subprocess.run(
            [candidate, "-c", _PROBE], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            executable, (major, minor, *_) = json.loads(done.stdout)
            found.setdefault(f"{major}.{minor}", Path(executable))
    return {version: found[version] for version in VERSIONS if version in found}


def _candidates() -> Iterator[Path]:
    for version in VERSIONS:
        if program := shutil.which(f"python{version}"):
            yield Path(program)
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for version in VERSIONS:
        yield from sorted(root.glob(f"versions/{version}.*/bin/python{version}"), reverse=True)


if __name__ == "__main__":
    sys.exit(main())
