// A Node process for the tests, as the API is one: it takes commands, one JSON object a line, and answers each.
//
//   node node.mjs 5|6 REDIS_URL PREFIX
//   {"id": 1, "do": "add", "queue": "mail", ...}  ->  {"id": 1, "result": ...} or {"id": 1, "error": "..."}
//   events that were asked for                    ->  {"queue": "mail", "event": "completed", "args": {...}}
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';

const [version, url, prefix] = process.argv.slice(2);
const { DelayedError, FlowProducer, Queue, QueueEvents, UnrecoverableError, Worker } = createRequire(import.meta.url)(
  `bullmq${version}`,
);

const PRIORITIES = { critical: 1, high: 2, normal: 3, low: 4 };
const connection = { url, maxRetriesPerRequest: null };
const queues = new Map();
const listeners = [];
const workers = [];
let flows;

const print = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);

// Node 5 and later refuse a colon in a queue's name, which older queues have. Queue `a:b` under prefix `p` has the keys
// of queue `b` under prefix `p:a`.
function open(Class, name, more) {
  const parts = name.split(':');
  const last = parts.pop();
  const opened = new Class(last, { connection, prefix: [prefix, ...parts].join(':'), ...more });
  opened.on('error', (error) => process.stderr.write(`${error}\n`));
  return opened;
}

function queueOf(name) {
  if (!queues.has(name)) queues.set(name, open(Queue, name));
  return queues.get(name);
}

// What the API passes to BullMQ for a task.
function asJob({ queue, taskId, payload, correlationId, priority, attempts, delay, backoff, opts }) {
  return {
    name: queue,
    data: { ...payload, correlationId },
    opts: {
      jobId: taskId,
      priority: PRIORITIES[priority],
      attempts,
      backoff: { type: 'exponential', delay: backoff },
      ...(delay === null ? {} : { delay }),
      removeOnComplete: 100,
      removeOnFail: 500,
      ...opts,
    },
  };
}

// Jobs hold their queue, which is not JSON.
function plain(value) {
  if (Array.isArray(value)) return value.map(plain);
  if (value && typeof value === 'object') {
    if (typeof value.toJSON === 'function') return value.toJSON();
    if (value.job) return { job: plain(value.job), children: plain(value.children ?? []) };
  }
  return value === undefined ? null : value;
}

// What a worker does: the step of this run in `data.script`.
async function act(job, token) {
  const step = job.data.script[job.attemptsStarted - 1] ?? {};
  if ('progress' in step) await job.updateProgress(step.progress);
  if ('log' in step) await job.log(step.log);
  if ('delay' in step) {
    await job.moveToDelayed(Date.now() + step.delay, token);
    throw new DelayedError();
  }
  if ('throw' in step) throw new Error(step.throw);
  if ('unrecoverable' in step) throw new UnrecoverableError(step.unrecoverable);
  return { success: true, output: step.return ?? null, duration: 0 };
}

class ScriptedWorker extends Worker {
  constructor(name, opts) {
    super(name, act, opts);
  }
}

const commands = {
  async schedule({ queue, jobs }) {
    const added = await queueOf(queue).addBulk(jobs.map((job) => asJob({ queue, ...job })));
    return added.map((job) => job.id);
  },
  async add({ queue, name, data, opts }) {
    return (await queueOf(queue).add(name, data, opts)).id;
  },
  // Any method of the queue.
  async queue({ queue, method, args }) {
    return plain(await queueOf(queue)[method](...args));
  },
  // Any method of one job.
  async job({ queue, jobId, method, args }) {
    const job = await queueOf(queue).getJob(jobId);
    if (!job) throw new Error(`no job ${jobId} in ${queue}`);
    return plain(await job[method](...args));
  },
  async flow({ flow }) {
    flows ??= new FlowProducer({ connection, prefix });
    return plain(await flows.add(flow));
  },
  // A worker of Node's own, to compare with.
  async work({ queue, opts }) {
    workers.push(open(ScriptedWorker, queue, opts));
    await workers.at(-1).waitUntilReady();
    return null;
  },
  async listen({ queue, events }) {
    // From the beginning: the first events may come before the first read.
    const listener = open(QueueEvents, queue, { lastEventId: '0-0' });
    for (const event of events) {
      listener.on(event, (args) => print({ queue, event, args }));
    }
    listeners.push(listener);
    await listener.waitUntilReady();
    return null;
  },
};

async function answer(line) {
  const { id, do: command, ...args } = JSON.parse(line);
  try {
    print({ id, result: (await commands[command](args)) ?? null });
  } catch (error) {
    print({ id, error: String(error?.stack ?? error) });
  }
}

const running = new Set();
for await (const line of createInterface({ input: process.stdin })) {
  const done = answer(line).finally(() => running.delete(done));
  running.add(done);
}
await Promise.all(running);
await Promise.all([...workers, ...queues.values(), ...listeners, ...(flows ? [flows] : [])].map((c) => c.close()));
process.exit(0);
