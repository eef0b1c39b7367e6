"""Writes the lock files from pyproject.toml: `make lock`.

Each names every package that an installation gets, at one version, with the hashes of its files,
for every Python and platform that is served. pip reads them; only this script needs uv. A version
that is locked stays, as long as pyproject.toml allows it; `--upgrade` takes the newest ones.
"""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "requirements"
HEADER = "# Made from pyproject.toml by `make lock`; not to be edited.\n"
OPTIONS = (
    "--universal",
    "--generate-hashes",
    "--no-header",
    "--no-annotate",
    # Each installation chooses its own index.
    "--no-emit-index-url",
    "--no-emit-find-links",
    "--quiet",
)


def main() -> int:
    """Return the exit code."""
    described = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    oldest = described["project"]["requires-python"].removeprefix(">=")
    for name, requirements in lists(described).items():
        options = [*OPTIONS, f"--python-version={oldest}", *sys.argv[1:]]
        if name != "dev":
            # All lock files have the same version of a package.
            options.append(f"--constraints={FOLDER / 'dev.lock'}")
        _compile(FOLDER / f"{name}.lock", requirements, options)
    return 0


def lists(described: dict[str, Any]) -> dict[str, list[str]]:
    """Return each lock file's requirements by its name; `dev` comes first.

    Args:
        described: what pyproject.toml holds.
    """
    worker = described["project"]["dependencies"]
    extras = described["project"]["optional-dependencies"]
    build = described["build-system"]["requires"]
    development = [*extras["dev"], *extras["embedded"]]
    itself = f"{described['project']['name']}["
    return {
        "dev": [*worker, *build, *(line for line in development if not line.startswith(itself))],
        "worker": worker,
        "build": build,
        "node": extras["node"],
    }


def _compile(lock: Path, requirements: list[str], options: list[str]) -> None:
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", f"--output-file={lock}"]
    text = "\n".join(requirements)
    subprocess.run([*command, *options], input=text, text=True, check=True, cwd=FOLDER)
    lock.write_text(HEADER + lock.read_text())


if __name__ == "__main__":
    sys.exit(main())
