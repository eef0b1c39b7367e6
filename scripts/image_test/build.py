"""Builds images without Docker: a base by debootstrap, the rest by buildah, all in one folder."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUITE = "bookworm"  # its Python is 3.11, the oldest that is served
MIRROR = "http://deb.debian.org/debian"
TOOLS = ("buildah", "debootstrap")
PACKAGES = (*TOOLS, "debian-archive-keyring")
REPOSITORY = Path(__file__).resolve().parents[2]

BASE = "localhost/image-test-base"
BUILD = "localhost/image-test-build"
WORKER = "localhost/autoflow-worker"
DERIVED = "localhost/image-test-derived"

# pip's settings that also hold in another root; folders don't exist there.
PIP_OPTIONS = ("index-url", "extra-index-url", "trusted-host", "proxy", "cert")
MACHINE_CA = "/etc/ssl/certs/machine-ca.pem"


class BuildError(Exception):
    """The image can't be built; the message says what to do, or ends with the tool's output."""


@dataclass(frozen=True)
class Image:
    """A built image.

    Attributes:
        root: its files.
        config: as Docker reads it: `User`, `Env`, `Cmd`, `WorkingDir`, `StopSignal`, ...
    """

    root: Path
    config: dict[str, Any]


def require_tools() -> None:
    """Install what is missing.

    Raises:
        BuildError: not root, or no Debian.
    """
    if os.geteuid() != 0:
        raise BuildError("debootstrap, buildah and chroot need root: sudo make image-test")
    if all(shutil.which(tool) for tool in TOOLS):
        return
    if not shutil.which("apt-get"):
        raise BuildError(f"{' and '.join(TOOLS)} are missing, and there is no apt-get to get them")
    run("apt-get", "update")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES, env=environment)


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Run a tool to its end and return its stdout."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    except FileNotFoundError:
        raise BuildError(f"there is no {command[0]} on this machine") from None
    if done.returncode:
        tail = "\n".join(f"{done.stdout}\n{done.stderr}".splitlines()[-40:])
        raise BuildError(f"{' '.join(map(str, command))} exited with {done.returncode}:\n{tail}")
    return done.stdout.strip()


class Builder:
    """Images and their roots, in a folder that `close()` removes.

    Args:
        folder: will be made; two gigabytes may go into it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._temporary = folder / "tmp"
        self._temporary.mkdir(parents=True)

    def build_bases(self) -> None:
        """Make two base images: Debian with Python alone, and with pip for the build."""
        root = self._folder / "base"
        include = "--include=python3,ca-certificates"
        run("debootstrap", "--variant=minbase", include, SUITE, root, _mirror())
        for name in ("dev", "var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(root / name)
            (root / name).mkdir()
        container = self._buildah("from", "scratch")
        self._buildah("add", "--quiet", container, root, "/")
        self._commit(container, BASE)
        shutil.rmtree(root)
        self._build_build_base()

    def _build_build_base(self) -> None:
        container = self._buildah("from", BASE)
        install = "apt-get install --yes --no-install-recommends python3-pip"
        in_root = ("run", "--isolation", "chroot", container, "--", "sh", "-c")
        self._buildah(*in_root, f"apt-get update && {install}")
        configuration = self._folder / "pip.conf"
        options = pip_options()
        if certificates := options.get("cert"):
            self._buildah("copy", "--quiet", container, certificates, MACHINE_CA)
            options["cert"] = MACHINE_CA
        lines = (f"{name} = {value}\n" for name, value in options.items())
        configuration.write_text("[global]\n" + "".join(lines))
        self._buildah("copy", "--quiet", container, configuration, "/etc/pip.conf")
        self._commit(container, BUILD)

    def build_worker(self) -> Image:
        """Build the Dockerfile on these bases."""
        arguments = (f"--build-arg=BASE_IMAGE={BASE}", f"--build-arg=BUILD_IMAGE={BUILD}")
        return self._build(WORKER, REPOSITORY, *arguments)

    def build_derived(self, tasks: Path) -> Image:
        """Build an image FROM the worker's, with a task list in it."""
        dockerfile = self._folder / "Dockerfile"
        dockerfile.write_text(f"FROM {WORKER}\nCOPY tasks_config.py .\n")
        return self._build(DERIVED, tasks, f"--file={dockerfile}")

    def _build(self, name: str, context: Path, *arguments: str) -> Image:
        options = ("--isolation=chroot", "--format=docker", f"--tag={name}")
        self._buildah("build", *options, *arguments, context)
        described = json.loads(self._buildah("inspect", "--type=image", name))
        root = self._buildah("mount", self._buildah("from", name))
        return Image(Path(root), described["Docker"]["config"])

    def _commit(self, container: str, name: str) -> None:
        self._buildah("commit", "--quiet", container, name)
        self._buildah("rm", container)

    def _buildah(self, *arguments: str | Path) -> str:
        storage = (f"--root={self._folder}/store", f"--runroot={self._folder}/run")
        environment = {**os.environ, "TMPDIR": str(self._temporary)}
        return run("buildah", "--storage-driver=vfs", *storage, *arguments, env=environment)

    def close(self) -> None:
        """Remove the containers, the images and the folder."""
        # A killed tool may have left /proc mounted; never remove what is in it.
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for mount in reversed(mounts):
            if Path(mount).is_relative_to(self._folder):
                run("umount", mount)
        shutil.rmtree(self._folder)


def pip_options() -> dict[str, str]:
    """Return this machine's pip settings, for the pip in the build's root."""
    options: dict[str, str] = {}
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in PIP_OPTIONS:
            words = ast.literal_eval(value).split()
            options[name] = " ".join(word for word in words if not word.startswith("file:"))
    if "cert" not in options:
        options["cert"] = os.environ.get("REQUESTS_CA_BUNDLE", "")
    return {name: value for name, value in options.items() if value}


def _mirror() -> str:
    """Return the Debian mirror that this machine uses."""
    if not shutil.which("apt-get"):
        return MIRROR
    filters = (f"Codename: {SUITE}", "Component: main")
    found = run("apt-get", "indextargets", "--format=$(REPO_URI)", *filters).splitlines()
    return next((uri for uri in found if uri.startswith("http")), MIRROR)
