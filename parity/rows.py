"""The rule for rows: a row's status is its BullMQ state in the API's words."""

from collections.abc import Mapping

from redis.asyncio import Redis

from autoflow_worker.recording.patches import own_row_id
from parity.scenario import Scenario
from tests.support.agreement import BullJob, Row, bull_jobs, differences

Rows = Mapping[str, Row]


async def faults_of_rows(redis: Redis, prefix: str, scenario: Scenario, rows: Rows) -> list[str]:
    """Return how the rows differ from what BullMQ holds of the scenario's jobs.

    Rows whose jobs BullMQ has removed are left out, and jobs that no worker ever picked up.
    """
    faults: list[str] = []
    for queue in scenario.queues:
        jobs = await bull_jobs(redis, prefix, queue)
        of_queue = {row_id: row for row_id, row in rows.items() if row["queueName"] == queue}
        kept: dict[str, Row] = {}
        started: dict[str, BullJob] = {}
        for job_id, job in jobs.items():
            row = of_queue.get(job_id) or of_queue.get(own_row_id(queue, job_id))
            if row is not None:
                kept[job_id] = row
            if row is not None or int(job.fields.get("ats", 0)) > 0:
                started[job_id] = job
        faults += differences(kept, started)
    return faults
