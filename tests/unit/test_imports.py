"""Imports run one way, and few modules know each library."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import autoflow_worker

SOURCE = Path(autoflow_worker.__file__).parent

# Each imports only from what stands above it.
ORDER = """
    errors libraries masking urls redis_urls database_urls lookalikes failpoints log_writer
    fork_guard watchdog event_loop logs leaving settings env_files
    worker_options payload task loader
    digits cleaning storable failure record
    breakages handler_threads execution handler_tasks retry
    outage
    writes row_statements refused_rows postgres_link recorder_lane recorder
    pooler row_probe database
    redis_denials redis_channel redis_client redis_rights fitness
    queue_scripts script_guard claim completion official_worker job_queue
    fetcher keepers held_outcomes job_history job_run running_jobs task_worker
    new_rows producer scheduler
    signals service
    kept_job open_rows reconcile_plan reconcile_report reconcile
    postgres_cluster embedded check dev demo_kinds demo_jobs demo_display demo
    __init__
    cli __main__
""".split()  # noqa: SIM905 - one row for each layer

# Who may import what; everyone else goes through these.
DRIVERS = {
    # recorder_lane writes the rows, by row_statements over a postgres_link; database makes and
    # judges the table before; database_urls asks libpq whether it can read a URL; new_rows
    # writes those of new tasks; open_rows reads rows that no worker is writing.
    "psycopg": {
        "row_statements",
        "postgres_link",
        "recorder_lane",
        "pooler",
        "row_probe",
        "database",
        "database_urls",
        "new_rows",
        "open_rows",
    },
    # task passes BullMQ's exceptions on; producer adds jobs; job_queue drives the worker that
    # official_worker makes.
    "bullmq": {
        "task",
        "claim",
        "official_worker",
        "job_queue",
        "producer",
    },
    "hiredis": {"redis_channel"},
    "watchfiles": {"dev"},
    "rich": {"demo_display"},
    "click": {"cli"},
    "uvloop": {"event_loop"},
    "pydantic_settings": {"settings", "env_files"},
}

MODULES = sorted(path.stem for path in SOURCE.glob("*.py"))


def imports(module: str) -> Iterator[str]:
    """Each module that a module imports, wherever in its text, as a dotted name."""
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out"
            yield str(node.module)
            if node.module == "autoflow_worker":
                yield from (f"autoflow_worker.{alias.name}" for alias in node.names)


def test_every_module_has_its_place() -> None:
    assert set(MODULES) <= set(ORDER), "a new module needs a place in ORDER"


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    above = set(ORDER[: ORDER.index(module)])
    own = {name.split(".")[1] for name in imports(module) if name.startswith("autoflow_worker.")}
    assert own & set(MODULES) <= above


@pytest.mark.parametrize("module", MODULES)
def test_few_modules_know_each_library(module: str) -> None:
    for name in imports(module):
        library = name.split(".")[0]
        assert library not in DRIVERS or module in DRIVERS[library], f"{module} imports {name}"


def test_the_surface_is_sorted_and_whole() -> None:
    names = autoflow_worker.__all__
    assert names == sorted(names)
    for name in names:
        assert getattr(autoflow_worker, name) is not None
