"""Tasks that foreign code makes on a loop that contains them are as any other, but for exits."""

import asyncio
import contextvars
import gc
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import uvloop

from autoflow_worker.operations.oversight import persist
from autoflow_worker.worker.handler_tasks import contain_tasks
from autoflow_worker.worker.threads import HandlerExitError

variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    factory: Callable[[], asyncio.AbstractEventLoop] = request.param
    with asyncio.Runner(loop_factory=factory) as runner:
        contain_tasks(runner.get_loop())
        yield runner


async def leave(error: BaseException) -> None:
    await asyncio.sleep(0)
    raise error


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_exits_are_contained(runner: asyncio.Runner, error: BaseException) -> None:
    async def main() -> None:
        with pytest.raises(HandlerExitError, match=type(error).__name__) as info:
            await asyncio.create_task(leave(error))
        assert info.value.__cause__ is error

    runner.run(main())


def test_all_else_goes_its_way(runner: asyncio.Runner) -> None:
    async def answer() -> int:
        await asyncio.sleep(0)
        return variable.get()

    async def numbers() -> AsyncIterator[int]:
        yield 1

    async def main() -> None:
        context = contextvars.copy_context()
        context.run(variable.set, 7)
        task = asyncio.create_task(answer(), name="mine", context=context)
        assert task.get_name() == "mine"
        assert "answer()" in repr(task)
        assert await task == 7
        with pytest.raises(ValueError, match="no"):
            await asyncio.create_task(leave(ValueError("no")))
        assert list(await asyncio.gather(asyncio.sleep(0, 1), asyncio.sleep(0, 2))) == [1, 2]
        assert [number async for number in numbers()] == [1]
        task = asyncio.create_task(answer())
        await asyncio.sleep(0)
        [frame] = task.get_stack()
        assert frame.f_code is answer.__code__
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Cancelled before it ran: nobody complains that it was never awaited.
        task = asyncio.create_task(answer())
        task.cancel()
        await asyncio.wait([task])
        del task
        gc.collect()

    runner.run(main())


def test_own_code_is_left_alone(runner: asyncio.Runner) -> None:
    async def ask() -> int:
        return 1

    async def main() -> None:
        task = asyncio.create_task(persist(ask, 1.0))
        assert asyncio.iscoroutine(task.get_coro())
        assert type(task.get_coro()).__name__ == "coroutine"
        assert await task == 1

    runner.run(main())
