"""Handlers that start processes: a child answers for itself, and leaves its parent alone."""

import psutil

from tests.support.api import Api
from tests.support.process import WorkerProcess, WorkerStarter
from tests.support.until import until

QUEUE = "forks"
TASKS = """
    import asyncio, multiprocessing, os, signal, subprocess, sys, time
    from concurrent.futures import ProcessPoolExecutor
    from autoflow_worker import TaskOptions, define_task

    FORK = multiprocessing.get_context("fork")

    def processes(payload, ctx):
        children = [FORK.Process(target=time.sleep, args=[600]) for _ in range(3)]
        for child in children:
            child.start()
        for child in children:
            child.terminate()
        for child in children:
            child.join()
        return [child.exitcode for child in children]

    async def processes_on_the_loop(payload, ctx):
        return processes(payload, ctx)

    async def interrupted(payload, ctx):
        child = FORK.Process(target=time.sleep, args=[600])
        child.start()
        os.kill(child.pid, signal.SIGUSR1)
        child.join()
        return child.exitcode

    async def pool(payload, ctx):
        with ProcessPoolExecutor(2, mp_context=FORK) as executor:
            loop = asyncio.get_running_loop()
            numbers = await asyncio.gather(
                *(loop.run_in_executor(executor, pow, 2, n) for n in range(8))
            )
            for process in executor._processes.values():
                process.terminate()
        return numbers

    async def programs(payload, ctx):
        sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
        one = await asyncio.create_subprocess_exec(*sleeping)
        one.terminate()
        two = subprocess.Popen(sleeping)
        two.terminate()
        return [await one.wait(), await asyncio.to_thread(two.wait)]

    def own_loop(results):
        async def main():
            tasks = [asyncio.create_task(asyncio.sleep(0, n)) for n in range(3)]
            return await asyncio.gather(*tasks)
        results.put(asyncio.run(main()))

    async def loop_in_a_child(payload, ctx):
        results = FORK.SimpleQueue()
        child = FORK.Process(target=own_loop, args=[results])
        child.start()
        found = await asyncio.to_thread(results.get)
        child.join()
        return [found, child.exitcode]

    async def ended(child):
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        return os.waitstatus_to_exitcode(status)

    async def returns(payload, ctx):
        child = os.fork()
        return await ended(child) if child else "from the child"

    async def awaits(payload, ctx):
        child = os.fork()
        if child:
            return await ended(child)
        await asyncio.sleep(0)
        os._exit(99)

    async def forks_in_a_task(payload, ctx):
        async def fork():
            return os.fork()
        child = await asyncio.create_task(fork())
        return await ended(child) if child else "from the child"

    async def forks_after_a_wait(payload, ctx):
        await asyncio.sleep(0)
        child = os.fork()
        return await ended(child) if child else "from the child"

    async def forks_in_a_callback(payload, ctx):
        child = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(lambda: child.set_result(os.fork()))
        return await ended(child) if (child := await child) else "from the child"

    def returns_in_a_thread(payload, ctx):
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    async def forks_in_an_executor(payload, ctx):
        child = await asyncio.to_thread(os.fork)
        return await ended(child) if child else "from the child"

    async def logs_in_a_child(payload, ctx):
        child = FORK.Process(target=ctx.logger.warning, args=["from_a_child"])
        child.start()
        child.join()
        return child.exitcode

    async def neighbour(payload, ctx):
        with open("neighbour", "a") as file:
            for _ in range(200):
                print(os.getpid(), file=file, flush=True)
                await asyncio.sleep(0)

    handlers = [
        processes, processes_on_the_loop, interrupted, pool, programs, loop_in_a_child, returns,
        awaits, forks_in_a_task, forks_after_a_wait, returns_in_a_thread, forks_in_an_executor,
        logs_in_a_child, forks_in_a_callback,
    ]
    tasks = [define_task(handler.__name__, handler) for handler in handlers]
    tasks.append(define_task("neighbour", neighbour, TaskOptions(concurrency=3)))
    tasks.append(define_task("calm", lambda payload, ctx: None))
"""


async def output(api: Api, worker: WorkerProcess, queue: str) -> object:
    """What a handler returns, of a job that runs while others do."""
    for _ in range(3):
        await api.schedule("neighbour", {})
    task_id = await api.schedule(queue, {}, attempts=1)
    await until(lambda: worker.running or worker.report())
    row = await api.until_both_say(queue, task_id, "completed")
    return row["result"].get("output")


async def goes_on_and_stops(api: Api, worker: WorkerProcess) -> None:
    """The worker still works, and stops in order; nobody is left."""
    task_id = await api.schedule("calm", {})
    await api.until_both_say("calm", task_id, "completed")
    assert not worker.logged("signal_received")
    family = psutil.Process(worker.pid).children(recursive=True)
    worker.terminate()
    assert await worker.wait() == 0, worker.report()
    await until(lambda: not any(child.is_running() for child in family))


async def test_a_signal_to_a_child_is_the_childs(worker_process: WorkerStarter, api: Api) -> None:
    worker = worker_process(TASKS, WORKER_SHUTDOWN_GRACE="600")
    await worker.until_logged("worker_started")
    assert await output(api, worker, "processes") == [-15, -15, -15]
    assert await output(api, worker, "processes_on_the_loop") == [-15, -15, -15]
    assert await output(api, worker, "interrupted") == -10
    assert await output(api, worker, "pool") == [1, 2, 4, 8, 16, 32, 64, 128]
    assert await output(api, worker, "programs") == [-15, -15]
    assert await output(api, worker, "loop_in_a_child") == [[0, 1, 2], 0]
    await goes_on_and_stops(api, worker)


async def test_a_child_that_comes_back_ends(worker_process: WorkerStarter, api: Api) -> None:
    worker = worker_process(TASKS, WORKER_SHUTDOWN_GRACE="600")
    await worker.until_logged("worker_started")
    ways = [
        "returns",
        "awaits",
        "forks_in_a_task",
        "forks_after_a_wait",
        "returns_in_a_thread",
        "forks_in_an_executor",
        "forks_in_a_callback",
    ]
    for count, way in enumerate(ways, 1):
        assert await output(api, worker, way) == 1, way
        assert worker.stderr.count("its code came back into the worker") == count, way
    await goes_on_and_stops(api, worker)
    # Nothing of its neighbours ran in a child.
    lines = (worker.folder.parent / "neighbour").read_text().split()
    assert set(lines) == {str(worker.pid)}


async def test_a_child_logs_its_own_lines(worker_process: WorkerStarter, api: Api) -> None:
    worker = worker_process(TASKS)
    await worker.until_logged("worker_started")
    assert await output(api, worker, "logs_in_a_child") == 0
    assert len(worker.logged("worker_started")) == 1
    await goes_on_and_stops(api, worker)


async def test_children_do_not_outlive_the_worker(worker_process: WorkerStarter, api: Api) -> None:
    worker = worker_process(
        """
        import multiprocessing, time
        from autoflow_worker import define_task

        def handler(payload, ctx):
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[600])
            child.start()
            ctx.logger.info("child", pid=child.pid)
            child.join()

        tasks = [define_task("parents", handler)]
        """,
        WORKER_SHUTDOWN_GRACE="0",
    )
    await api.schedule("parents", {})
    child = psutil.Process((await worker.until_logged("child"))["pid"])
    worker.terminate()
    assert await worker.wait() == 4, worker.report()
    await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
