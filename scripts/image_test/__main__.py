"""Builds the image without Docker, runs jobs through it and stops it: `make image-test`."""

import asyncio
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoflow_worker.embedded import embedded_postgres, embedded_redis
from scripts.image_test.build import Builder, BuildError, require_tools
from scripts.image_test.contents import check_configuration, check_contents
from scripts.image_test.jobs import TASKS, Runs, check_faults, check_jobs


def main() -> int:
    """Return the exit code."""
    # Turned into an exception, so that everything gets closed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        require_tools()
        with _folder() as folder:
            _test(folder)
    except BuildError as error:
        print(f"image-test: {error}", file=sys.stderr)
    except AssertionError as error:
        print(f"image-test: failed: {error}", file=sys.stderr)
    else:
        print("image-test: passed")
        return 0
    return 1


@contextmanager
def _folder() -> Iterator[Path]:
    # /tmp is often small, and kept in memory.
    with tempfile.TemporaryDirectory(prefix="autoflow-image-test-", dir="/var/tmp") as folder:
        yield Path(folder)


def _test(folder: Path) -> None:
    builder = Builder(folder / "images")
    try:
        _say("making a base image of Debian with Python")
        builder.build_bases()
        _say("building the Dockerfile")
        image = builder.build_worker()
        _say("building an image FROM it, with a task list")
        derived = builder.build_derived(TASKS)
        _say("checking what is in it")
        check_configuration(image)
        check_configuration(derived)
        check_contents(image)
        with embedded_redis() as redis_url, embedded_postgres() as database_url:
            runs = Runs(folder, {"REDIS_URL": redis_url, "DATABASE_URL": database_url})
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
