// Adds jobs as the API does: many at once, or one every so often.
//
//   echo '{"queues": ["q"], "first": 0, "count": 1000, "payload": {...}, "every": ms, "failing": 10}' |
//     node add.mjs REDIS_URL PREFIX
//
// `count` is for each queue, `failing` is a percentage. The id of job i is `<md5 of "<queue>-<i>">.slice(0, 21)`, so that PostgreSQL can make the same rows by itself.
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';

const require = createRequire(new URL('../../tests/node/', import.meta.url));
const { Queue } = require('bullmq5');
const { Redis } = require('ioredis');
const [url, prefix] = process.argv.slice(2);
const { queues, first = 0, count, payload = {}, every = 0, failing = 0, opts = {} } = JSON.parse(readFileSync(0));

const epochMs = () => performance.timeOrigin + performance.now();

function jobOf(name, i) {
  const fails = failing > 0 && i % 100 < failing;
  return {
    name,
    data: { ...payload, ...(fails ? { fail: true } : {}), ...(every ? { sentAt: epochMs() } : {}), correlationId: 'bench' },
    opts: {
      jobId: createHash('md5').update(`${name}-${i}`).digest('hex').slice(0, 21),
      priority: 3,
      attempts: fails ? 1 : 3,
      backoff: { type: 'exponential', delay: 1000 },
      removeOnComplete: 100,
      removeOnFail: 500,
      ...opts,
    },
  };
}

// A timer is only good for whole milliseconds, so several jobs may be due in one.
async function addEverySoOften(queue) {
  const began = performance.now();
  const adding = [];
  for (let i = 0; i < count; ) {
    for (const due = (performance.now() - began) / every; i < Math.min(due, count); i += 1) {
      const job = jobOf(queue.name, first + i);
      adding.push(queue.add(job.name, job.data, job.opts));
    }
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
  await Promise.all(adding);
}

async function addAtOnce(queue) {
  const chunk = Math.max(1, Math.min(1000, Math.floor(4_000_000 / (JSON.stringify(payload).length + 100))));
  for (let i = 0; i < count; i += chunk) {
    const length = Math.min(chunk, count - i);
    await queue.addBulk(Array.from({ length }, (_, k) => jobOf(queue.name, first + i + k)));
  }
}

const connection = new Redis(url);
for (const name of queues) {
  const queue = new Queue(name, { connection, prefix });
  await (every ? addEverySoOften(queue) : addAtOnce(queue));
  await queue.close();
}
await connection.quit();
