"""Finds the type of a task's payload, and validates a job's data against it."""

import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import orjson
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from autoflow_worker.errors import PayloadError

#: Limits of an error's message: faults, characters of each fault, and characters in all.
MAX_FAULTS = 20
MAX_FAULT_LENGTH = 200
MAX_MESSAGE_LENGTH = 2_000
# The most faults that are described one by one: more of them would block the event loop.
_MAX_DESCRIBED = 5_000
_MAX_PART_LENGTH = 64
_MAX_SCHEMAS = 1_000  # parts of a schema that are looked at, which may refer to each other

NO_ANNOTATION: Final = inspect.Parameter.empty

# Types for which any JSON object is valid.
_PLAIN: list[Any] = [NO_ANNOTATION, Any, object, dict, dict[str, Any], dict[str, object]]
_PLAIN += [Mapping, Mapping[str, Any], Mapping[str, object]]


def underlying_function(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function under partials, or the ``__call__`` of a callable object."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if inspect.isroutine(handler) or inspect.isclass(handler):
        return handler
    return type(handler).__call__


def payload_annotation(handler: Callable[..., Any]) -> Any:
    """Return the annotation of a handler's first parameter, `NO_ANNOTATION` if there is none.

    Raises:
        NameError: or another exception, from the evaluation of an annotation in quotes.
    """
    try:
        first = next(iter(inspect.signature(handler).parameters.values()), None)
    except ValueError:  # a builtin without a signature
        return NO_ANNOTATION
    if first is None or first.annotation is NO_ANNOTATION:
        return NO_ANNOTATION
    # Evaluate only this annotation: the others' names may exist for type checkers alone.
    holder = types.SimpleNamespace(__annotations__={first.name: first.annotation})
    namespace = getattr(inspect.unwrap(underlying_function(handler)), "__globals__", {})
    return typing.get_type_hints(holder, globalns=namespace, include_extras=True)[first.name]


def hidden_annotation(handler: Callable[..., Any]) -> Any:
    """Return the payload's annotation that a decorator without `functools.wraps` hides.

    Looks at the functions that the handler's function closes over, or that the handler has as its
    attributes: a decorator keeps the decorated function there. `NO_ANNOTATION` if none of them
    looks like a handler with a payload of a type of its own.
    """
    function = underlying_function(handler)
    kept = [*getattr(handler, "__dict__", {}).values()]
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            kept.append(cell.cell_contents)
    for each in kept:
        if inspect.isfunction(each) and _takes_context(each):
            with suppress(Exception):  # an annotation that can't be evaluated
                annotation = payload_annotation(each)
                if annotation not in _PLAIN:
                    return annotation
    return NO_ANNOTATION


def _takes_context(function: Callable[..., Any]) -> bool:
    parameters = list(inspect.signature(function).parameters.values())
    return len(parameters) > 1 and (
        parameters[1].name == "ctx" or "TaskContext" in str(parameters[1].annotation)
    )


def payload_adapter(annotation: Any) -> TypeAdapter[Any] | None:
    """Return pydantic's validator of a type; ``None`` if any JSON object is valid.

    Raises:
        Exception: pydantic's, when it can't validate the type.
    """
    if isinstance(annotation, TypeAdapter):
        return annotation
    if annotation in _PLAIN:
        return None
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    if not adapter.pydantic_complete:
        adapter.rebuild(raise_errors=True)
    return adapter


def has_field(adapter: TypeAdapter[Any] | None, name: str) -> bool:
    """Whether a type's JSON objects have a field of this name of their own."""
    if adapter is None:
        return False
    try:
        schema = adapter.json_schema(mode="validation")
    except Exception:  # A type without a JSON schema tells of no fields.
        return False
    definitions = schema.get("$defs", {})
    waiting, seen = [schema], 0
    while waiting and seen < _MAX_SCHEMAS:
        part, seen = waiting.pop(), seen + 1
        if name in part.get("properties", {}):
            return True
        for union in ("anyOf", "oneOf", "allOf"):
            waiting += part.get(union, [])
        if reference := part.get("$ref"):
            waiting.append(definitions.get(reference.rpartition("/")[2], {}))
    return False


def parse(adapter: TypeAdapter[Any] | None, data: object) -> Any:
    """Return the payload, or raise a `PayloadError` that names the fields."""
    if not isinstance(data, dict):
        raise PayloadError(f"payload does not validate: a JSON object is needed, not {_kind(data)}")
    if adapter is None:
        return data
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        return _parse_as_json(adapter, data, error)
    except BaseException as error:
        # A validator that raises another exception, even SystemExit, does so on every attempt.
        raise PayloadError(
            f"payload does not validate: its validation raised {type(error).__name__}"
        ) from error


def _parse_as_json(adapter: TypeAdapter[Any], data: object, error: ValidationError) -> Any:
    """Validate again, by pydantic's rules for JSON.

    A strict model takes a date, an enum or a tuple from JSON text, but not from a Python string or
    list. Jobs arrive as JSON, so the rules for JSON decide. They come second, since most types
    make no difference, and to encode the data again takes longest.
    """
    try:
        try:
            text = orjson.dumps(data)
        except TypeError:  # an integer beyond 64 bits, or deeper than orjson goes
            text = json.dumps(data, ensure_ascii=False).encode()
        return adapter.validate_json(text)
    except ValidationError as json_error:
        error = json_error
    except BaseException:  # noqa: S110 - the data is no JSON: the first error stays
        pass
    raise PayloadError("payload does not validate: " + _describe(error)) from error


def _describe(error: ValidationError) -> str:
    count = error.error_count()
    if count > _MAX_DESCRIBED:
        return f"{count} faults in {error.title[:_MAX_PART_LENGTH]}"
    # Leave out the inputs: they may be secret or huge, and both stores keep this text.
    details = error.errors(include_url=False, include_context=False, include_input=False)
    lines: list[str] = []
    length = 0
    for detail in details[:MAX_FAULTS]:
        line = _fault(detail)
        length += len(line)
        if length > MAX_MESSAGE_LENGTH:
            break
        lines.append(line)
    if count > len(lines):
        lines.append(f"and {count - len(lines)} more")
    return "; ".join(lines)


def _fault(detail: ErrorDetails) -> str:
    where = ".".join(_part(part) for part in detail["loc"])
    text = detail["msg"].removeprefix("Value error, ")
    line = f"{where}: {text}" if where else text
    return line if len(line) <= MAX_FAULT_LENGTH else line[:MAX_FAULT_LENGTH] + "..."


def _part(part: int | str) -> str:
    text = str(part)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= _MAX_PART_LENGTH else text[:_MAX_PART_LENGTH] + "..."


def _kind(data: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(data), "a number" if isinstance(data, int | float) else "something else")
