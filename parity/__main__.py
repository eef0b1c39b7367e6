"""`python -m parity`: run scenarios with Node's Worker and with this one, and compare."""

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import click

from parity.batch import Servers
from parity.report import print_report
from parity.runner import Report, run
from parity.scenario import ALL, VERSIONS, Scenario, Version
from tests.support.database import create_database
from tests.support.servers import own_postgres_server, own_redis_server


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("patterns", nargs=-1)
@click.option("--version", type=click.IntRange(5, 6), help="Of BullMQ. [default: both]")
@click.option("--list", "only_list", is_flag=True, help="Print the names of the scenarios.")
def main(patterns: tuple[str, ...], version: Version | None, only_list: bool) -> None:
    """Run the scenarios whose names match PATTERNS (`flows/*`), or all of them.

    The exit code is 1 if something differs that parity/differences.toml does not name, or if one of
    its entries matches nothing any more.
    """
    scenarios = [
        scenario
        for name, scenario in ALL.items()
        if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if only_list:
        print("\n".join(scenario.name for scenario in scenarios))
        return
    if not scenarios:
        sys.exit("no scenario has such a name; --list prints them all")
    folder = Path(tempfile.mkdtemp(prefix="parity-"))
    report = asyncio.run(run_on_own_servers(scenarios, [version] if version else VERSIONS, folder))
    print_report(report)
    if report.ok:
        shutil.rmtree(folder)
        return
    print(f"the workers' output: {folder}")
    sys.exit(1)


async def run_on_own_servers(
    scenarios: Sequence[Scenario], versions: Sequence[Version], folder: Path
) -> Report:
    """Run scenarios on servers that live as long as the run."""
    redis = await own_redis_server(appendonly=False)
    try:
        postgres = await own_postgres_server()
        try:
            urls = {
                version: await create_database(postgres.url, f"parity_{version}")
                for version in VERSIONS
            }
            servers = Servers(redis.url, urls, "parity")
            return await run(scenarios, versions, servers, folder)
        finally:
            await postgres.close()
    finally:
        await redis.close()


if __name__ == "__main__":
    main()
