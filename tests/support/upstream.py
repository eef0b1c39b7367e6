"""The reports for upstream in docs/upstream/, each run as a program of its own."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

from tests.support.readme import REPOSITORY

FOLDER = REPOSITORY / "docs/upstream"
REPORTS = sorted(FOLDER.glob("*.py"))
PATIENCE = 120


def run_reports(redis_url: str, outputs: Path) -> dict[str, tuple[int | None, str]]:
    """Run all reports at once, and return each one's exit code and standard output.

    They are forked from one process that has imported bullmq, because importing it thirty times
    takes longer than all that they do.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bullmq", "tests.support.upstream"])
    running = {}
    for report in REPORTS:
        arguments = (report, redis_url, outputs / report.stem)
        running[report.stem] = context.Process(target=_run, args=arguments)
        running[report.stem].start()
    ended = {}
    for name, process in running.items():
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
        ended[name] = (process.exitcode, (outputs / name).read_text())
    return ended


def _run(report: Path, redis_url: str, output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), sys.stderr.fileno())
    os.environ["REDIS_URL"] = redis_url
    runpy.run_path(str(report), run_name="__main__")
