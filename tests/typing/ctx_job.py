"""Only checked, never run: what type checkers know about a handler's job."""

from typing import Any, assert_type

from autoflow_worker import DelayedError, JobHandle, RateLimitError, TaskContext, WaitingError


async def moves(payload: dict[str, Any], ctx: TaskContext) -> None:
    assert_type(ctx.job, JobHandle)
    assert_type(await ctx.job.moveToWait(ctx.job.token), int)
    assert_type(await ctx.job.moveToWaitingChildren(ctx.job.token), bool)
    await ctx.job.moveToDelayed(0, ctx.job.token)
    await ctx.job.rateLimit(1000)
    raise DelayedError if payload else RateLimitError if ctx.attempt else WaitingError


async def tells(payload: dict[str, Any], ctx: TaskContext) -> None:
    await ctx.job.updateProgress({"at": 50})
    assert_type(await ctx.job.log("a line"), int)
    assert_type(await ctx.job.extendLock(ctx.job.token, 30_000), int)


async def asks(payload: dict[str, Any], ctx: TaskContext) -> None:
    assert_type(await ctx.job.getChildrenValues(), dict[str, Any])
    assert_type(await ctx.job.getIgnoredChildrenFailures(), dict[str, str])
    children = await ctx.job.getDependencies({"failed": {"cursor": 0, "count": 5}})
    assert_type(children["failed"], list[str])
    counts = await ctx.job.getDependenciesCount({"processed": True})
    assert_type(counts["processed"], int)


# Each of these is a mistake that has to be found.
async def mistaken(payload: dict[str, Any], ctx: TaskContext) -> None:
    await ctx.job.updateProgess(50)  # type: ignore[attr-defined]
    await ctx.job.move_to_wait(ctx.job.token)  # type: ignore[attr-defined]
    await ctx.job.moveToWait()  # type: ignore[call-arg]
    await ctx.job.moveToDelayed(ctx.job.token, 0)  # type: ignore[arg-type]
    await ctx.job.getDependencies({"finished": {}})  # type: ignore[arg-type]
    await ctx.job.moveToCompleted(None, ctx.job.token)  # type: ignore[attr-defined]
    ctx.job.attemptsMade + "1"  # type: ignore[operator]
