"""The report of a run, on the terminal."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from chaos.audit import Audit, Story
from chaos.driver import Report
from chaos.effects import Key
from chaos.servers import POSTGRES, REDIS
from chaos.workload import numbers_of

SHOWN = 10
"""Jobs whose histories are printed."""


def print_report(report: Report) -> None:
    """Print the summary, and the histories of the jobs with faults."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(report))
    for fault in report.faults:
        console.print(f"FAULT: {fault}", markup=False)
    if report.audit is not None:
        _print_faults(console, report, report.audit)
    verdict = "everything is as it has to be" if report.ok else "NOT everything is as it has to be"
    console.print(f"seed {report.plan.seed}: {verdict}")


def _table(report: Report) -> Table:
    table = Table(title=f"chaos, seed {report.plan.seed}")
    table.add_column("what")
    table.add_column("how many", justify="right")
    for name, value in _figures(report):
        table.add_row(name, value)
    return table


def _figures(report: Report) -> list[tuple[str, str]]:
    figures = [("jobs", str(len(report.jobs)))]
    figures += [(f"  {kind}", str(n)) for kind, n in numbers_of(report.jobs).items()]
    if report.crew is not None:
        lives = report.crew.lives
        figures += [
            ("worker processes", str(len(lives))),
            ("  killed (-9)", str(sum(life.killed_at is not None for life in lives))),
            ("  terminated", str(sum(life.terminated_at is not None for life in lives))),
            ("  slowest exit, s", f"{report.crew.slowest_exit:.1f}"),
            ("  stopped and continued", str(sum(len(life.stops) for life in lives))),
            ("  jobs handed back", str(sum(len(life.handed_back) for life in lives))),
        ]
    if report.servers is not None:
        for server in (REDIS, POSTGRES):
            hows = Counter(o.how for o in report.servers.outages if o.server == server)
            restarts = hows["killed"] + hows["stopped"]
            figures.append((f"{server} restarted", str(restarts)))
            figures += [(f"  {how}", str(n)) for how, n in sorted(hows.items())]
    if report.audit is not None:
        figures += _audit_figures(report.audit)
    figures.append(("seconds to settle", f"{report.settled_after:.1f}"))
    figures.append(("seconds in all", f"{report.duration:.0f}"))
    return figures


def _audit_figures(found: Audit) -> list[tuple[str, str]]:
    return [
        *((state, str(n)) for state, n in sorted(found.states.items())),
        ("runs of handlers", str(found.runs)),
        ("  in child processes", str(found.runs_in_children)),
        ("runs repeated", str(found.reruns.total())),
        *((f"  {cause}", str(n)) for cause, n in sorted(found.reruns.items())),
        ("jobs that differ", str(len(found.faults))),
    ]


def _print_faults(console: Console, report: Report, found: Audit) -> None:
    for key, faults in list(found.faults.items())[:SHOWN]:
        console.print(f"\n{' '.join(key)}", markup=False)
        for fault in faults:
            console.print(f"  {fault}", markup=False)
        if key in found.stories:
            for line in _history(report, key, found.stories[key]):
                console.print(f"    {line}", markup=False)
    if len(found.faults) > SHOWN:
        console.print(f"\n... and {len(found.faults) - SHOWN} more")


def _history(report: Report, key: Key, story: Story) -> list[str]:
    lines = [f"planned: {story.planned}", f"row: {story.row}", f"BullMQ: {story.job}"]
    lines += [f"run: {run}" for run in story.runs]
    assert report.crew is not None
    assert report.servers is not None
    pids = {run.worker for run in story.runs}
    for life in report.crew.lives:
        if life.pid in pids:
            lines.append(str(life))
        for entry in life.process.logs:
            if entry.get("task_id") == key[1]:
                lines.append(f"log of {life.pid}: {entry}")
    if story.runs:
        began, ended = story.runs[0].started_at - 5, story.runs[-1].started_at + 15
        lines += [str(o) for o in report.servers.outages if began < o.ended_at < ended]
    return lines
