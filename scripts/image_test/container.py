"""Runs an image as Docker does, with its user, environment and command, as process 1."""

import json
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from scripts.image_test.build import Image
from tests.support.until import until

# Runs in namespaces of its own for mounts and processes, so that all of it ends with the worker.
# The root is read-only, as compose.yaml has it; what `exec` starts is process 1.
_SETUP = """
root=$1 tasks=$2 user=$3; shift 3
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 dev "$root/dev"
for device in null zero random urandom; do
  : > "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
[ -z "$tasks" ] || mount --bind "$tasks" "$root/app"
mount -o remount,bind,ro "$root"
exec setpriv --no-new-privs chroot --userspec="$user" --groups="${user#*:}" "$root" "$@"
"""
_NAMESPACES = ("--mount", "--pid", "--fork", "--kill-child", "--propagation=private")


class Container:
    """A process in an image.

    Args:
        image: its root and its configuration.
        log: gets what the process prints.
        env: variables on top of the image's own.
        tasks: a folder to mount at /app; nothing is mounted if None.
        command: instead of the image's own.
    """

    def __init__(
        self,
        image: Image,
        log: Path,
        env: Mapping[str, str],
        *,
        tasks: Path | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        config = image.config
        environment = [*config["Env"], *(f"{name}={value}" for name, value in env.items())]
        self._stop_signal = signal.Signals[config["StopSignal"]]
        self._log = log
        setup = ("sh", "-euc", _SETUP, "sh", image.root, str(tasks or ""), config["User"])
        inside = ("env", "-i", f"--chdir={config['WorkingDir']}", *environment)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["unshare", *_NAMESPACES, *setup, *inside, *(command or config["Cmd"])],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A Ctrl-C in the terminal is for the test, which then ends this.
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """The output so far."""
        return self._log.read_text(errors="replace")

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines of an event; a line that is not JSON fails the test."""
        lines = [json.loads(line) for line in self.output.splitlines(keepends=True) if "\n" in line]
        return [line for line in lines if line["event"] == event]

    async def until_logged(self, event: str) -> None:
        def seen() -> bool:
            assert self._process.poll() is None, f"it ended:\n{self.output}"
            return bool(self.logged(event))

        await until(seen, message=lambda: f"{event}:\n{self.output}")

    def stop(self) -> None:
        """Send process 1 the image's stop signal, as `docker stop` does."""
        [process] = self._inside()
        process.send_signal(self._stop_signal)

    async def ended(self) -> int:
        """Wait until the container ends, and return its exit code."""
        await until(lambda: self._process.poll() is not None, 40.0, message=lambda: self.output)
        return self._process.returncode

    def close(self) -> None:
        """Kill process 1, and so every process of the container."""
        # --kill-child is not enough: a change of user clears its death signal.
        for process in self._inside():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.kill()
        self._process.wait()

    def _inside(self) -> list[psutil.Process]:
        """Return process 1 as seen from outside; an empty list once it has ended."""
        if self._process.poll() is not None:
            return []
        return psutil.Process(self._process.pid).children()
