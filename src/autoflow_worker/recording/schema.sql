-- The tasks table as the API's migrations create it. The API owns it: this file serves
-- `autoflow-worker init-db`, development and the tests, and changes nothing that is there.

CREATE TABLE IF NOT EXISTS tasks (
  id text PRIMARY KEY,
  data jsonb NOT NULL DEFAULT '{}'::jsonb,
  created_at timestamp NOT NULL DEFAULT now(),  -- without time zone, UTC
  updated_at timestamp NOT NULL DEFAULT now()   -- without time zone, UTC
);

CREATE INDEX IF NOT EXISTS tasks_user_id_idx ON tasks ((data->>'userId'));
CREATE INDEX IF NOT EXISTS tasks_status_idx ON tasks ((data->>'status'));
CREATE INDEX IF NOT EXISTS tasks_task_name_idx ON tasks ((data->>'taskName'));
