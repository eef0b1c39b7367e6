"""Builds the image without Docker, runs jobs through it and stops it: `make image-test`."""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from autoflow_worker.local.embedded import EmbeddedPostgres, EmbeddedRedis, running
from scripts.image_test.build import REPOSITORY, Builder, BuildError, require_tools
from scripts.image_test.contents import check_configuration, check_contents
from scripts.image_test.jobs import Runs, check_faults, check_jobs

TASK_LIST = Path(__file__).parent / "tasks" / "tasks_config.py"
EXAMPLES = REPOSITORY / "examples"


def main() -> int:
    """Return the exit code."""
    # Raise at SIGTERM, so that everything is closed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        require_tools()
        # /tmp is often small and in memory.
        with tempfile.TemporaryDirectory(prefix="autoflow-image-test-", dir="/var/tmp") as folder:
            _test(Path(folder), _readable_copy(Path(folder)))
    except KeyboardInterrupt:
        print("image-test: interrupted", file=sys.stderr)
    except BuildError as error:
        print(f"image-test: {error}", file=sys.stderr)
    except AssertionError as error:
        print(f"image-test: failed: {error}", file=sys.stderr)
    else:
        print("image-test: passed")
        return 0
    return 1


def _readable_copy(folder: Path) -> Path:
    """Copy the task lists, so that the image's user can read them under any umask."""
    os.umask(0o022)
    tasks = folder / "tasks"
    tasks.mkdir()
    shutil.copyfile(TASK_LIST, tasks / TASK_LIST.name)
    for module in EXAMPLES.glob("*.py"):
        (tasks / "examples").mkdir(exist_ok=True)
        shutil.copyfile(module, tasks / "examples" / module.name)
    return tasks


def _test(folder: Path, tasks: Path) -> None:
    builder = Builder(folder / "images")
    try:
        _say("making a base image of Debian with Python")
        builder.build_bases()
        _say("building the Dockerfile")
        image = builder.build_worker()
        _say("building an image FROM it, with a task list")
        derived = builder.build_derived(tasks)
        _say("checking what is in it")
        check_configuration(image)
        check_configuration(derived)
        check_contents(image)
        with running(EmbeddedRedis()) as redis_url, running(EmbeddedPostgres()) as database_url:
            urls = {"REDIS_URL": redis_url, "DATABASE_URL": database_url}
            runs = Runs(folder, tasks, urls)
            try:
                _say("starting it with wrong settings")
                asyncio.run(check_faults(runs, image))
                _say("running jobs through it, and stopping it")
                asyncio.run(check_jobs(runs, image, derived))
            finally:
                runs.close()
    finally:
        builder.close()


def _say(step: str) -> None:
    print(f"image-test: {step}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
