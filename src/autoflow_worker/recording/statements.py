"""The statements that write the tasks table, and the settings of the session that runs them."""

from typing import Final

LOCK_TIMEOUT: Final = "50ms"
"""How long a batch waits for another session's lock before the locked rows are put off."""

# Make the planner look up each row by primary key. A plan that was made for a small table would
# scan the whole table for every batch once the table has grown. Raise `cpu_tuple_cost` as well:
# TOASTed rows make the table look small, and the planner would pick a sequential scan.
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
# rules that no write may break:
# - the row of another queue's task is left alone;
# - `since`: a start does not replace a later start;
# - `fence`: an outcome is written only if the row still shows its own attempt's start;
# - `settles`: only a completed outcome replaces `cancelled`;
# - `unfinished`: the failure of a job whose data Redis has lost does not replace an end.
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
# The same for one patch: PostgreSQL needs a tenth less time than for the JSON record set.
_ONE: Final = {
    "patches": "(SELECT $1::text, $2::text, $3::jsonb, $4::text, $5::text, $6::boolean,"
    " $7::boolean)",
    "columns": "(id, queue, patch, since, fence, settles, unfinished)",
}
# A batch of starts does not wait for the disk: if a crash of PostgreSQL loses a start, its outcome
# repairs the row. `set_config` in the statement holds for one transaction and needs no round trip.
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
# Whether another session holds, or waits for, a table lock that blocks all writes, such as that of
# a migration or of CREATE INDEX. A session that waits for such a lock is ahead of us in its queue.
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
