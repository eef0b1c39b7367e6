"""Whose fault an error reply is: the data's, or the server's."""

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError

from autoflow_worker.broker.replies import CommandRefusedError, reply_error

IN_A_SCRIPT = " script: 2f6a7380b8ea, on @user_script:147."
IN_REDIS_6 = "ERR Error running script (call to f_9c96): @user_script:1: "

ABOUT_DATA = [
    "WRONGTYPE Operation against a key holding the wrong kind of value",
    "WRONGTYPE Operation against a key holding the wrong kind of value" + IN_A_SCRIPT,
    IN_REDIS_6 + "WRONGTYPE Operation against a key holding the wrong kind of value",
    "ERR hash value is not an integer" + IN_A_SCRIPT,
    "ERR value is not an integer or out of range" + IN_A_SCRIPT,
    "ERR value is not a valid float" + IN_A_SCRIPT,
    "ERR min or max is not a float" + IN_A_SCRIPT,
    "ERR increment or decrement would overflow" + IN_A_SCRIPT,
    "ERR user_script:1: attempt to index local 'x' (a nil value)" + IN_A_SCRIPT,
    "ERR user_script:1: attempt to compare nil with number" + IN_A_SCRIPT,
    "ERR user_script:1: attempt to perform arithmetic on a nil value" + IN_A_SCRIPT,
    "ERR user_script:1: bad argument #1 to 'floor' (number expected, got nil)" + IN_A_SCRIPT,
    "ERR user_script:1: Expected object key string but found T_END at character 2" + IN_A_SCRIPT,
    "ERR user_script:1: Found too many nested data structures (1001)" + IN_A_SCRIPT,
    "ERR Command arguments must be strings or integers" + IN_A_SCRIPT,
    IN_REDIS_6 + "@user_script: 1: Lua redis() command arguments must be strings or integers",
]
ABOUT_THE_SERVER = [
    "ERR ACL failure in script: User w has no permissions to run the 'zadd' command" + IN_A_SCRIPT,
    IN_REDIS_6 + "@user_script: 1: The user executing the script can't run this command",
    "NOPERM User w has no permissions to run the 'evalsha' command",
    "ERR upstream failure",
    "ERR max daily request limit exceeded. Limit: 500000, Usage: 500000.",
    "ERR unknown command 'LPOS', with args beginning with: 'k'",
    "ERR Error running script: Script killed by user with SCRIPT KILL...",
    "OOM command not allowed when used memory > 'maxmemory'.",
    "MISCONF Redis is configured to save RDB snapshots",
    "READONLY You can't write against a read only replica.",
    "",
    "\x00",
]


@pytest.mark.parametrize("text", ABOUT_DATA)
def test_what_is_said_of_data(text: str) -> None:
    assert type(reply_error(text)) is ResponseError


@pytest.mark.parametrize("text", ABOUT_THE_SERVER)
def test_what_is_said_of_anything_else(text: str) -> None:
    assert isinstance(reply_error(text), RedisConnectionError)


def test_a_refused_command_is_no_lost_connection() -> None:
    assert type(reply_error("ERR upstream failure")) is CommandRefusedError
    assert type(reply_error("NOSCRIPT No matching script.")) is NoScriptError
