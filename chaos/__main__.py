"""`python -m chaos`: break servers and workers at random under load, and check every row."""

import asyncio
import random
import shutil
import sys
import tempfile
from pathlib import Path

import click

from chaos.driver import Plan, run
from chaos.report import print_report

DEFAULTS = Plan(seed=0)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, help="Draws the jobs and the moments. [default: a new one]")
@click.option("--jobs", default=DEFAULTS.jobs, show_default=True)
@click.option("--workers", default=DEFAULTS.workers, show_default=True, help="Processes.")
@click.option("--kills", default=DEFAULTS.kills, show_default=True, help="Workers, by SIGKILL.")
@click.option(
    "--terminations", default=DEFAULTS.terminations, show_default=True, help="Workers, by SIGTERM."
)
@click.option("--stops", default=DEFAULTS.stops, show_default=True, help="Workers, by SIGSTOP.")
@click.option("--restarts", default=DEFAULTS.restarts, show_default=True, help="Of each server.")
@click.option(
    "--suspensions", default=DEFAULTS.suspensions, show_default=True, help="Of each server."
)
@click.option("--cuts", default=DEFAULTS.cuts, show_default=True, help="Of each server's clients.")
@click.option("--seconds", default=DEFAULTS.seconds, show_default=True, help="Of breaking things.")
@click.option("--limit", default=DEFAULTS.limit, show_default=True, help="Seconds for the whole.")
def main(seed: int | None, **sizes: float) -> None:
    """Break servers and workers at random under load, and check every job's row.

    The exit code is 0 if every job and every row is as it has to be.
    """
    plan = Plan(seed=random.randrange(10**6) if seed is None else seed, **sizes)  # type: ignore[arg-type]
    print(f"seed {plan.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    report = asyncio.run(run(plan, folder))
    print_report(report)
    if report.ok:
        shutil.rmtree(folder)
        return
    print(f"the workers' output and effects: {folder}; again: python -m chaos --seed {plan.seed}")
    sys.exit(1)


if __name__ == "__main__":
    main()
