// A Node process for the tests, as the API is one. It listens on a Unix socket; each connection is a session with its own
// version of BullMQ, Redis and prefix. A session takes commands, one JSON object per line, and answers each.
//
//   node node.mjs SOCKET                          ->  "listening" on stdout
//   {"version": 5, "url": "redis://...", "prefix": "bull"}, a session's first line
//   {"id": 1, "do": "add", "queue": "mail", ...}  ->  {"id": 1, "result": ...} or {"id": 1, "error": "..."}
//   events that were asked for                    ->  {"queue": "mail", "event": "completed", "args": {...}}
//
// At the end of a session its queues and workers are closed. The process ends when its stdin does.
import { createRequire } from 'node:module';
import { createServer } from 'node:net';
import { createInterface } from 'node:readline';
import { setTimeout as pause } from 'node:timers/promises';

const require = createRequire(import.meta.url);
const PRIORITIES = { critical: 1, high: 2, normal: 3, low: 4 };

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

// A worker's backoff strategies, by name.
const STRATEGIES = {
  linear: (attemptsMade) => attemptsMade * 40,
  'once more': (attemptsMade) => (attemptsMade < 2 ? 10 : -1),
  'by type': (attemptsMade, type, error) => type.length * 60 + error.message.length,
  later: async () => 30,
};

// What a worker does: the step of this run in `data.script`. parity/script.py does the same in Python.
async function act(bullmq, queue, job, token) {
  const step = job.data?.script?.[job.attemptsStarted - 1] ?? {};
  for (const progress of [step.progress ?? []].flat()) await job.updateProgress(progress);
  for (const line of [step.log ?? []].flat()) await job.log(line);
  if ('sleep' in step) await pause(step.sleep);
  while (step.hold && !(await queue(job.queueName).getJob(job.id)).data.go) await pause(20);
  if ('update' in step) await job.updateData({ ...job.data, ...step.update });
  if ('children' in step) await addChildren(queue, job, step.children);
  const answers = [];
  for (const [method, ...args] of step.call ?? []) answers.push(plain(await job[method](...args)));
  for (const name of step.see ?? []) answers.push(plain(job[name]));
  if (step.discard) job.discard();
  if ('park' in step && (await job.moveToWaitingChildren(token))) throw new bullmq.WaitingChildrenError();
  if ('limit' in step) {
    await queue(job.queueName).rateLimit(step.limit);
    throw new bullmq.RateLimitError();
  }
  if ('wait' in step) {
    await job.moveToWait(token);
    throw new bullmq.WaitingError();
  }
  if ('delay' in step) {
    await job.moveToDelayed(Date.now() + step.delay, token);
    throw new bullmq.DelayedError();
  }
  if ('throw' in step) throw new Error(step.throw);
  if ('unrecoverable' in step) throw new bullmq.UnrecoverableError(step.unrecoverable);
  const output = 'call' in step || 'see' in step ? answers : (step.return ?? null);
  return { success: true, output, duration: 0 };
}

async function addChildren(queue, job, children) {
  const parent = { id: job.id, queue: job.queueQualifiedName };
  const jobs = children.map(({ name, data, opts }) => ({ name, data, opts: { ...opts, parent } }));
  await queue(children[0].queueName).addBulk(jobs);
}

class Session {
  #queues = new Map();
  #opened = [];

  constructor({ version, url, prefix }, print) {
    this.bullmq = require(`bullmq${version}`);
    this.connection = { url, maxRetriesPerRequest: null };
    this.prefix = prefix;
    this.print = print;
  }

  async schedule({ queue, jobs }) {
    const added = await this.#queue(queue).addBulk(jobs.map((job) => asJob({ queue, ...job })));
    return added.map((job) => job.id);
  }

  async add({ queue, name, data, opts }) {
    return (await this.#queue(queue).add(name, data, opts)).id;
  }

  // Any method of the queue.
  async queue({ queue, method, args }) {
    return plain(await this.#queue(queue)[method](...args));
  }

  // Any method of one job.
  async job({ queue, jobId, method, args }) {
    const job = await this.#queue(queue).getJob(jobId);
    if (!job) throw new Error(`no job ${jobId} in ${queue}`);
    return plain(await job[method](...args));
  }

  async flow({ flow }) {
    const flows = new this.bullmq.FlowProducer({ connection: this.connection, prefix: this.prefix });
    this.#opened.push(flows);
    return plain(await flows.add(flow));
  }

  // A worker of Node's own, to compare with. Its backoff strategy is one of those above, by name.
  async work({ queue, opts: { backoff, ...opts } }) {
    const { bullmq } = this;
    const queueOf = (name) => this.#queue(name);
    class ScriptedWorker extends bullmq.Worker {
      constructor(name, options) {
        super(name, (job, token) => act(bullmq, queueOf, job, token), options);
      }
    }
    const settings = backoff ? { settings: { backoffStrategy: STRATEGIES[backoff] } } : {};
    await this.#open(ScriptedWorker, queue, { ...opts, ...settings }).waitUntilReady();
  }

  // The next time of each schedule, by BullMQ's own strategy: `at`, or the `error` with which it refuses. `tz` is the
  // process's zone.
  async nextMillis({ cases, tz }) {
    const before = process.env.TZ;
    process.env.TZ = tz;
    const { getNextMillis } = this.bullmq;
    try {
      return cases.map(({ millis, options }) => {
        try {
          return { at: getNextMillis(millis, options) ?? null };
        } catch (error) {
          return { error: error.message };
        }
      });
    } finally {
      if (before === undefined) delete process.env.TZ;
      else process.env.TZ = before;
    }
  }

  async listen({ queue, events }) {
    // From the beginning: the first events may come before the first read.
    const listener = this.#open(this.bullmq.QueueEvents, queue, { lastEventId: '0-0' });
    for (const event of events) {
      listener.on(event, (args) => this.print({ queue, event, args }));
    }
    await listener.waitUntilReady();
  }

  async close() {
    await Promise.all(this.#opened.map((opened) => opened.close()));
  }

  #queue(name) {
    if (!this.#queues.has(name)) this.#queues.set(name, this.#open(this.bullmq.Queue, name));
    return this.#queues.get(name);
  }

  // BullMQ refuses a colon in a queue's name, which older queues have. Queue `a:b` under prefix `p` has the keys of
  // queue `b` under prefix `p:a`.
  #open(Class, name, more) {
    const parts = name.split(':');
    const last = parts.pop();
    const { connection, prefix } = this;
    const opened = new Class(last, { connection, prefix: [prefix, ...parts].join(':'), ...more });
    opened.on('error', (error) => process.stderr.write(`${error}\n`));
    this.#opened.push(opened);
    return opened;
  }
}

async function answer(session, line) {
  const { id, do: command, ...args } = JSON.parse(line);
  try {
    session.print({ id, result: (await session[command](args)) ?? null });
  } catch (error) {
    session.print({ id, error: String(error?.stack ?? error) });
  }
}

async function serve(socket) {
  socket.on('error', () => {}); // The test has ended without a word.
  const print = (line) => socket.writable && socket.write(`${JSON.stringify(line)}\n`);
  const running = new Set();
  let session;
  for await (const line of createInterface({ input: socket })) {
    if (session) {
      const done = answer(session, line).finally(() => running.delete(done));
      running.add(done);
    } else {
      session = new Session(JSON.parse(line), print);
    }
  }
  await Promise.all(running);
  await session?.close();
  socket.end();
}

createServer({ allowHalfOpen: true }, serve).listen(process.argv[2], () => console.log('listening'));
process.stdin.resume().on('end', () => process.exit(0));
