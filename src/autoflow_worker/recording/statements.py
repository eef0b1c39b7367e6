"""The statements that write the tasks table, and the settings of the session that runs them."""

from typing import Final

LOCK_TIMEOUT: Final = "50ms"
"""How long a batch waits for somebody else's lock before the locked rows are put off."""

# A batch looks up each of its rows by primary key, whatever the planner believes of the table's
# size: a plan made for a small table would read all of a grown one for every batch. Reading rows is
# made dear, since large ones lie outside a table that then looks small.
_SETTINGS: Final = {
    "lock_timeout": LOCK_TIMEOUT,
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_material": "off",
    "cpu_tuple_cost": "1",
}
SESSION: Final = "SELECT " + ", ".join(
    f"set_config('{name}', '{value}', false)" for name, value in _SETTINGS.items()
)

# `data || patch` merges at the top level and keeps the API's other keys. The conditions are the
# rules that no write may break: another queue's row is not ours; `since`: a start never goes
# behind a later start; `fence`: an outcome goes only into the row that still shows its own start;
# a cancelled task stays cancelled, unless its work was done after all (`settles`); `unfinished`:
# what is said of a job whose data Redis has lost goes only into a row that tells no end yet.
_UPDATE: Final = """
UPDATE tasks AS t
SET data = t.data || p.patch, updated_at = timezone('utc', now())
FROM {patches} AS p{columns}
WHERE {relaxed}t.id = p.id
  AND jsonb_typeof(t.data) = 'object'
  AND coalesce(t.data->>'queueName', p.queue) = p.queue
  AND (p.since IS NULL OR coalesce(t.data->>'startedAt', '') <= p.since COLLATE "C")
  AND (p.fence IS NULL OR t.data->>'startedAt' = p.fence)
  AND (p.settles OR t.data->>'status' IS DISTINCT FROM 'cancelled')
  AND (p.unfinished IS NULL OR coalesce(t.data->>'status', '') NOT IN ('completed', 'failed'))
RETURNING t.id
"""
_MANY: Final = {
    "patches": "json_to_recordset($1::json)",
    "columns": "(id text, queue text, patch jsonb, since text, fence text, settles boolean,"
    " unfinished boolean)",
}
# The same for one patch, which PostgreSQL needs a tenth less time for.
_ONE: Final = {
    "patches": "(SELECT $1::text, $2::text, $3::jsonb, $4::text, $5::text, $6::boolean,"
    " $7::boolean)",
    "columns": "(id, queue, patch, since, fence, settles, unfinished)",
}
# A start that a crash of PostgreSQL loses is made good by its outcome, so it needn't wait for the
# disk. Set inside the statement, it holds for this one transaction and needs no round trip.
_RELAXED: Final = "(SELECT set_config('synchronous_commit', 'off', true)) = 'off' AND "

UPDATE_MANY: Final = _UPDATE.format(relaxed="", **_MANY)
UPDATE_MANY_RELAXED: Final = _UPDATE.format(relaxed=_RELAXED, **_MANY)
UPDATE_ONE: Final = _UPDATE.format(relaxed="", **_ONE)
UPDATE_ONE_RELAXED: Final = _UPDATE.format(relaxed=_RELAXED, **_ONE)
INSERT: Final = """
INSERT INTO tasks (id, data, created_at, updated_at)
SELECT p.id, p.data, timezone('utc', now()), timezone('utc', now())
FROM json_to_recordset($1::json) AS p(id text, data jsonb)
ON CONFLICT (id) DO NOTHING
"""
# These two take a list of ids.
LOCKED: Final = """
WITH wanted AS MATERIALIZED (SELECT json_array_elements_text($1::json) AS id),
free AS MATERIALIZED (
  SELECT id FROM tasks WHERE id = ANY(ARRAY(SELECT id FROM wanted)) FOR NO KEY UPDATE SKIP LOCKED)
SELECT id FROM tasks WHERE id = ANY(ARRAY(SELECT id FROM wanted)) EXCEPT SELECT id FROM free
"""
# Whether somebody has, or waits for, a lock of the table that no row can be written beside: an
# index that is built, a migration. Who waits for one is before us, too.
TABLE_LOCKED: Final = """
SELECT FROM pg_locks
WHERE relation = to_regclass('tasks') AND pid <> pg_backend_pid()
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
LIMIT 1
"""
LOOK: Final = """
SELECT id, jsonb_typeof(data), data->>'queueName', data->>'status', data->>'startedAt'
FROM tasks WHERE id = ANY(ARRAY(SELECT json_array_elements_text($1::json)))
"""
