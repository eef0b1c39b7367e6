// Node's own Worker with a no-op handler, to compare with.
//
//   node work.mjs 5|6 REDIS_URL PREFIX QUEUE CONCURRENCY [DATABASE_URL]
//
// With a database it writes each status by one awaited UPDATE before and one after the handler.
import { createRequire } from 'node:module';

const require = createRequire(new URL('../../tests/node/', import.meta.url));
const [version, url, prefix, name, concurrency, databaseUrl] = process.argv.slice(2);
const { Worker } = require(`bullmq${version}`);
const sql = databaseUrl ? require('postgres')(databaseUrl) : undefined;

const epochMs = () => performance.timeOrigin + performance.now();
const now = () => new Date().toISOString();

const update = (id, patch) =>
  sql`UPDATE tasks SET data = data || ${sql.json(patch)}, updated_at = timezone('utc', now()) WHERE id = ${id}`;

// What the Python handlers of this benchmark do.
async function handle(job) {
  if (job.data.fail) throw new Error('as it was told');
  if (job.data.sleep) {
    await new Promise((resolve) => setTimeout(resolve, job.data.sleep * 1000));
    return { endedAt: epochMs() };
  }
  return job.data.sentAt ? { waitedMs: epochMs() - job.data.sentAt } : { ok: true };
}

async function handleAndRecord(job) {
  await update(job.id, { status: 'active', startedAt: now(), attempts: job.attemptsMade + 1 });
  const started = performance.now();
  const output = await handle(job);
  const result = { success: true, output, duration: Math.round(performance.now() - started) };
  await update(job.id, {
    status: 'completed',
    completedAt: now(),
    result,
    error: null,
    failedAt: null,
    delayUntil: null,
  });
  return result;
}

async function handleOnly(job) {
  return { success: true, output: await handle(job), duration: 0 };
}

const worker = new Worker(name, sql ? handleAndRecord : handleOnly, {
  connection: { url, maxRetriesPerRequest: null },
  prefix,
  concurrency: Number(concurrency),
});
worker.on('error', (error) => process.stderr.write(`${error}\n`));
