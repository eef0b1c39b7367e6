"""`python -m bench`: measure this worker and others side by side."""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import click

from bench import plot
from bench.goals import goals
from bench.report import as_markdown
from bench.results import Results
from bench.sections import (
    backlog,
    handlers,
    idle,
    latency,
    memory,
    payloads,
    queues,
    startup,
    status_delay,
    table_size,
    throughput,
)
from bench.servers import Servers, own_servers
from bench.sizes import FULL, QUICK, Sizes

Section = Callable[[Servers, Results, Sizes], None]

SECTIONS: dict[str, Section] = {
    "throughput": throughput.measure,
    "handlers": handlers.measure,
    "latency": latency.measure,
    "status-delay": status_delay.measure,
    "startup": startup.measure,
    "idle": idle.measure,
    "queues": queues.measure,
    "payloads": payloads.measure,
    "backlog": backlog.measure,
    "table-size": table_size.measure,
    "memory": memory.measure,
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Few jobs and one round: does it work at all?")
@click.option("--only", metavar="A,B", help=f"Only these sections: {', '.join(SECTIONS)}.")
@click.option("--jobs", type=int, help=f"In each throughput measurement. [default: {FULL.jobs}]")
@click.option("--rounds", type=int, help=f"[default: {FULL.rounds}]")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/bench"),
    show_default=True,
    help="Folder for the results; those of other sections that it has are kept.",
)
def main(quick: bool, only: str | None, jobs: int | None, rounds: int | None, out: Path) -> None:
    """Measure this worker and others side by side, on servers of the program's own."""
    given = {"jobs": jobs, "rounds": rounds}
    changes = {name: value for name, value in given.items() if value is not None}
    sizes = replace(QUICK if quick else FULL, **changes)
    names = only.split(",") if only else list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        raise click.UsageError(f"no such section: {', '.join(unknown)}")
    results = Results({**asdict(sizes), **_machine()})
    with own_servers() as servers:
        for name in names:
            began = time.perf_counter()
            SECTIONS[name](servers, results, sizes)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
            _save(out, results)
    print(f"\n{as_markdown(results, goals(results))}\nsaved in {out}")


def _machine() -> dict[str, object]:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _save(out: Path, results: Results) -> None:
    """Write the results so far, and keep what the folder has of other sections."""
    out.mkdir(parents=True, exist_ok=True)
    saved = out / "results.json"
    everything = Results({})
    everything.tables.update(results.tables)
    if saved.exists():
        everything.fill_up(json.loads(saved.read_text()))
    saved.write_text(json.dumps(everything.as_json(), indent=1, ensure_ascii=False) + "\n")
    (out / "results.md").write_text(as_markdown(everything, goals(everything)))
    if "throughput" in everything.tables:
        (out / "throughput.svg").write_text(plot.throughput(everything.get("throughput")))


if __name__ == "__main__":
    main()
