"""Redis' wire format: commands to bytes, bytes to replies, and error replies to exceptions.

An exception says whose fault an error reply is. A `ResponseError` is about the data that the
command worked on. A `ConnectionError` is about the server: another server, another moment or an
operator can mend it.
"""

import re
from typing import Any, Final, cast

import hiredis
from redis._parsers.base import BaseParser
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    NoPermissionError,
    NoScriptError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

INCOMPLETE: Final = object()
"""What a reader returns when it needs more bytes for the next reply."""

# These match the texts of Redis from 6.2 on, and of Valkey.
NO_KEY: Final = re.compile(r"(?:permissions to|can't) access", re.IGNORECASE)
NO_COMMAND: Final = re.compile(
    r"no permissions to run|can't run this command|unknown (?:redis )?command|unknown subcommand",
    re.IGNORECASE,
)

# Redis 6 wraps the error of a command in a script; later servers answer with the code alone.
_ERROR_CODE: Final = re.compile(r"(?:ERR Error running script .*?: -?)?([A-Z]+) ", re.DOTALL)
# A blocked connection gets UNBLOCKED when its server becomes a replica.
_WRONG_SERVER: Final = frozenset({"READONLY", "LOADING", "MASTERDOWN", "NOAUTH", "UNBLOCKED"})
_UNABLE_SERVER: Final = frozenset(
    {"MISCONF", "OOM", "BUSY", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN", "UNKILLABLE"}
)
# Errors of Redis, Lua, cjson and cmsgpack about the data that a command or a script works on. Any
# other error is about the server.
_DATA_AT_FAULT: Final = re.compile(
    r"""
    WRONGTYPE
    | not\ an\ integer | not\ a\ valid\ float | is\ not\ a\ float | not\ a\ valid\ number
    | would\ overflow | would\ produce\ NaN | out\ of\ range
    | attempt\ to\ (?: index | call | perform | compare | concatenate | get\ length )
    | bad\ argument\ \# | must\ be\ strings\ or\ integers
    | stack\ overflow | too\ many\ results\ to\ unpack
    | Expected\ .*\ but\ found | nested\ data\ structures | Excessive\ nesting | Cannot\ serialise
    | Missing\ bytes\ in\ input | Bad\ data\ format\ in\ input
    | BUSYGROUP | The\ ID\ specified\ in\ XADD | Invalid\ stream\ ID
    """,
    re.VERBOSE,
)


class ServerNotReadyError(RedisConnectionError):
    """The server answered that it can't serve commands now; nothing was executed."""


class CommandRefusedError(RedisConnectionError):
    """The server refused a command for reasons of its own; it may have run half of a script.

    The user lacks a right, a quota is used up, or a proxy failed. No job is to blame, so callers
    wait and retry, as after a lost connection.
    """


class WrongServerError(ServerNotReadyError):
    """The server is a replica, or is loading: a new connection may reach one that serves."""


def is_denial(error: BaseException | str) -> bool:
    """Whether this error says that the user lacks a right, or the server a command."""
    text = str(error)
    return bool(NO_KEY.search(text) or NO_COMMAND.search(text))


def is_refusal(error: Exception) -> bool:
    """Whether this error, met while connecting, says that the server refuses the user."""
    refusals = (AuthenticationError, AuthorizationError, NoPermissionError)
    return isinstance(error, refusals) or is_denial(error)


def reply_error(text: str) -> Exception:
    """Return the exception for an error reply."""
    match = _ERROR_CODE.match(text)
    code = match.group(1) if match else ""
    if code in _WRONG_SERVER:
        return WrongServerError(text)
    if code in _UNABLE_SERVER:
        return ServerNotReadyError(text)
    error = cast(Exception, BaseParser.parse_error(text))  # type: ignore[no-untyped-call]
    if isinstance(error, NoScriptError | RedisConnectionError) or _DATA_AT_FAULT.search(text):
        return error
    return CommandRefusedError(text)


def new_reader() -> hiredis.Reader:
    """Return a reader that turns the bytes of one connection into replies.

    Bytes that are not UTF-8 become lone surrogates, which `pack` turns back into the same bytes.
    """
    return hiredis.Reader(
        protocolError=InvalidResponse,
        replyError=reply_error,
        encoding="utf-8",
        errors="surrogateescape",
        notEnoughData=INCOMPLETE,
    )


def pack(args: tuple[Any, ...]) -> bytes:
    """Encode one command."""
    if " " in args[0]:  # redis-py writes "SCRIPT LOAD" as one word
        args = (*args[0].split(), *args[1:])
    try:
        return bytes(hiredis.pack_command(args))
    except UnicodeEncodeError:
        encoded: list[Any] = [
            arg.encode(errors="surrogateescape") if isinstance(arg, str) else arg for arg in args
        ]
        return bytes(hiredis.pack_command(tuple(encoded)))
