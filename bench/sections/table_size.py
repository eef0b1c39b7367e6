"""Throughput by the number of rows in the table."""

from importlib.resources import files

from bench.contestants import OURS
from bench.draining import timed
from bench.results import Results
from bench.servers import Servers
from bench.sizes import Sizes

CONCURRENCY = 50

_SCHEMA = files("autoflow_worker.recording").joinpath("schema.sql").read_text()
_INDEXES = ("tasks_user_id_idx", "tasks_status_idx", "tasks_task_name_idx")


def measure(servers: Servers, results: Results, sizes: Sizes) -> None:
    table = results.table("table_size", "Throughput by rows in the table", "jobs/s")
    for rows in (10, sizes.table_rows):
        servers.reset()
        _add_old_rows(servers, rows)
        for number in range(sizes.rounds):
            first = number * sizes.jobs
            servers.redis.flushall()
            servers.add_rows(["q"], sizes.jobs, first=first)
            servers.add_jobs(["q"], sizes.jobs, first=first)
            servers.database.execute("CHECKPOINT")
            rate = timed(servers, OURS, CONCURRENCY, sizes.seconds).rate
            table.add(OURS.name, f"{rows:,}", rate)


def _add_old_rows(servers: Servers, rows: int) -> None:
    # Building the indexes afterwards is quicker than updating them for each row.
    for index in _INDEXES:
        servers.database.execute(f"DROP INDEX {index}".encode())
    servers.add_rows(["old"], rows)
    servers.database.execute(_SCHEMA)
    servers.database.execute("ANALYZE tasks")
