"""A Redis user that lacks a right is told so at the start, by name, on every server there is."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from bullmq import Worker
from redis.asyncio import Redis

from autoflow_worker.broker import scripts as own_scripts
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.requirements import DIRECT, SCRIPTED, RedisReport, examine_redis
from autoflow_worker.errors import RedisRefusedError, RedisUnfitError
from tests.support.clients import connected
from tests.support.permissions import documented_rules
from tests.support.servers import OwnServer, redis_programs

ALL = ("~bull:*", "+@all")

MakeServer = Callable[..., Awaitable[OwnServer]]
Examine = Callable[..., Awaitable[RedisReport]]

# These are for operators: no worker, job or scheduler runs them.
OF_OPERATORS = {"cleanJobsInSet", "drain", "obliterate", "pause"}
_CALL = re.compile(r"""(?:rcall|redis\.p?call)\s*\(\s*["'](\w+)["']""")
# `lifo and 'RPUSH' or 'LPUSH'`: the command is chosen first, and called by a variable's name.
_CHOICE = re.compile(r"""["'](RPUSH|LPUSH)["']""")


def commands_of(script: str) -> set[str]:
    found = {command.upper() for command in _CALL.findall(script)}
    return found | set(_CHOICE.findall(script))


def test_the_probe_runs_what_the_scripts_call() -> None:
    scripts = Worker("any", None, {"connection": Redis()}).scripts.commands
    assert scripts.keys() > OF_OPERATORS
    texts = [script.script for name, script in scripts.items() if name not in OF_OPERATORS]
    texts += [text for text in vars(own_scripts).values() if isinstance(text, str)]
    assert set().union(*map(commands_of, texts)) == SCRIPTED


def test_the_document_lists_what_the_probe_runs() -> None:
    named = {rule[1:] for rule in documented_rules() if rule.startswith("+")}
    needed = {command.lower().replace(" ", "|") for command in (*SCRIPTED, *DIRECT)}
    extra = {"select", "multi", "exec", "client|setinfo"}
    assert named == needed | {"evalsha", "script|load"} | extra


@asynccontextmanager
async def client_of(server: OwnServer, *rules: str) -> AsyncIterator[PipelinedRedis]:
    """A client whose user has these rights and no other."""
    async with Redis.from_url(server.url) as admin:
        command = ("ACL", "SETUSER", "worker", "reset", "on", ">secret", *rules)
        await admin.execute_command(*command)  # type: ignore[no-untyped-call]
    async with connected(server.url.replace("redis://", "redis://worker:secret@"), 5) as client:
        yield client


@pytest.fixture(params=["redis-6.2", "valkey-8.1", "redis-8.2", "valkey-9.1"])
async def server(request: pytest.FixtureRequest, make_redis: MakeServer) -> OwnServer:
    program = redis_programs().get(request.param)
    if program is None:
        pytest.skip(f"no wheel with {request.param} is installed")
    return await make_redis(program=program, appendonly=False)


@pytest.fixture
def examine(server: OwnServer) -> Examine:
    """Examines the server by a user with these rights, for the queues `mails` and `reports`."""

    async def examine(*rules: str) -> RedisReport:
        async with client_of(server, *rules) as client:
            return await examine_redis(client, "bull", ["mails", "reports"])

    return examine


async def keys_of(server: OwnServer) -> list[Any]:
    async with Redis.from_url(server.url) as admin:
        return list(await admin.keys())


async def test_the_documented_rights_will_do(server: OwnServer, examine: Examine) -> None:
    assert (await examine(*documented_rules())).warnings == ()
    assert await keys_of(server) == []


async def test_commands_that_are_missing_are_named_at_once(examine: Examine) -> None:
    with pytest.raises(RedisUnfitError) as refused:
        await examine(*ALL, "-zadd", "-lrem", "-bzpopmin", "-info")
    assert "may not run INFO, BZPOPMIN, LREM, ZADD (docs" in str(refused.value)


@pytest.mark.parametrize("command", [*sorted(SCRIPTED), "evalsha", "bzpopmin", "info"])
async def test_each_command_is_missed(own_redis: OwnServer, command: str) -> None:
    async with client_of(own_redis, *ALL, f"-{command.lower()}") as client:
        with pytest.raises(RedisUnfitError, match=rf"may not run {command.upper()} \(docs"):
            await examine_redis(client, "bull", ["mails"])


async def test_scripts_that_can_not_be_loaded(examine: Examine) -> None:
    with pytest.raises(RedisUnfitError, match="may not run SCRIPT LOAD"):
        await examine(*ALL, "-script")


async def test_a_user_that_may_not_manage_connections(examine: Examine) -> None:
    # The connection asks for its own number, so there is none without that right.
    with pytest.raises(RedisRefusedError, match="permissions to run the 'client"):
        await examine(*ALL, "-client")


async def test_keys_of_one_queue_are_missing(examine: Examine) -> None:
    with pytest.raises(RedisUnfitError) as refused:
        await examine("~bull:mails:*", "+@all")
    assert "may not use the keys bull:reports:* (docs" in str(refused.value)


async def test_keys_that_may_only_be_read(own_redis: OwnServer) -> None:
    async with client_of(own_redis, "%R~bull:*", "+@all") as client:
        with pytest.raises(RedisUnfitError, match=r"may not use the keys bull:mails:\*"):
            await examine_redis(client, "bull", ["mails"])


async def test_a_server_without_memory_lacks_no_right(server: OwnServer, examine: Examine) -> None:
    async with Redis.from_url(server.url) as admin:
        await admin.config_set("maxmemory", 1)
    await examine(*ALL)
