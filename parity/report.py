"""The table of a run."""

from rich.console import Console
from rich.table import Table

from parity.runner import Report, Result
from parity.scenario import VERSION_NAMES, VERSIONS, Version


def print_report(report: Report) -> None:
    """Print one line per scenario, what differs without a name, and a summary."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(report))
    for result in report.results:
        if result.unnamed:
            version = VERSION_NAMES[result.version]
            console.print(f"\n{result.scenario} with {version} differs:", markup=False)
            for difference in result.unnamed:
                console.print(f"    {difference}", markup=False)
    for line in report.stale:
        console.print(f"STALE: {line}", markup=False)
    console.print(f"\n{_summary(report)}", markup=False)


def _table(report: Report) -> Table:
    table = Table(title="parity with Node's Worker")
    table.add_column("scenario")
    for version in VERSIONS:
        table.add_column(VERSION_NAMES[version])
    results = {(result.scenario, result.version): result for result in report.results}
    for scenario in dict.fromkeys(result.scenario for result in report.results):
        words = [_word(results.get((scenario, version))) for version in VERSIONS]
        table.add_row(scenario, *words)
    return table


def _word(result: Result | None) -> str:
    if result is None:
        return "-"
    if result.unnamed:
        return "DIFFERS"
    return "as named" if result.named else "same"


def _summary(report: Report) -> str:
    parts = [_of_version(report, version) for version in VERSIONS]
    count = len({result.scenario for result in report.results})
    return f"{count} scenarios in {report.seconds:.0f} s; " + "; ".join(filter(None, parts))


def _of_version(report: Report, version: Version) -> str:
    results = [result for result in report.results if result.version == version]
    if not results:
        return ""
    words = [_word(result) for result in results]
    return (
        f"{VERSION_NAMES[version]}: {words.count('same')} the same, "
        f"{words.count('as named')} as named, {words.count('DIFFERS')} differ"
    )
