"""Settings from `.env` files and the environment, and all faults in them in one error."""

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, DotEnvSettingsSource, NoDecode, SettingsConfigDict

from autoflow_worker.broker.redis_urls import redis_url as checked_redis_url
from autoflow_worker.encoding.masking import mask_secrets
from autoflow_worker.errors import SettingsError
from autoflow_worker.logs.configure import LogFormat, LogLevel
from autoflow_worker.lookalikes import Lookalike, lookalikes
from autoflow_worker.process.cores import usable_cores
from autoflow_worker.recording.database_urls import database_url as checked_database_url
from autoflow_worker.urls import SCHEME

# Names from Node's loggers, so that the API and this worker can share one LOG_LEVEL.
_LEVEL_ALIASES = {"trace": "debug", "warn": "warning", "fatal": "critical"}
_SIZE = re.compile(r"\s*(\d{1,15})\s*([KMG]?)i?B?\s*", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
_SHOWN_LENGTH = 80
# For `examine`, where a URL is missing or wrong; the other settings have defaults.
_STAND_INS = {"redis_url": "redis://unset", "database_url": "postgresql://unset"}


def _split_names(value: object) -> object:
    if not isinstance(value, str):
        return value
    # A queue that is named twice counts once. A list without a name stays text, which is refused.
    return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip())) or value


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _level_name(value: object) -> object:
    name = _lower(value)
    return _LEVEL_ALIASES.get(str(name), name)


def _process_count(value: object) -> object:
    return usable_cores() if _lower(value) == "auto" else value


def _bytes(value: object) -> object:
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    return int(found[1]) * _UNITS[found[2].upper()] if found else value


def _url(check: Callable[[str], str]) -> AfterValidator:
    return AfterValidator(lambda value: SecretStr(check(value.get_secret_value())))


class Settings(BaseSettings):
    """The environment's settings, checked.

    Each attribute holds the variable of the same name in capitals. An empty variable counts as not
    set. The two URLs are never printed.
    """

    model_config = SettingsConfigDict(
        frozen=True, env_ignore_empty=True, hide_input_in_errors=True, str_strip_whitespace=True
    )

    node_env: Annotated[str, BeforeValidator(_lower)] = Field(
        "development", description="a name; production turns JSON logs on"
    )
    redis_url: Annotated[SecretStr, _url(checked_redis_url)] = Field(
        description="host:6379 or redis://host:6379/0, rediss:// for TLS, or unix:// and a "
        "socket's path"
    )
    database_url: Annotated[SecretStr, _url(checked_database_url)] = Field(
        description="postgresql://user:password@host:5432/database"
    )
    bullmq_prefix: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]{1,200}$")] = Field(
        "bull", description="the key prefix that the producers use, 1 to 200 characters"
    )
    tasks_config: Annotated[str, StringConstraints(pattern=r"^[\w.]+:[\w.]+$")] = Field(
        "tasks_config:tasks", description="module:attribute, where the attribute is a list of tasks"
    )
    worker_queues: Annotated[tuple[str, ...] | None, NoDecode, BeforeValidator(_split_names)] = (
        Field(None, description="queue names separated by commas, or not set for all of them")
    )
    worker_concurrency: int = Field(
        1, ge=1, le=10_000, description="a whole number from 1 to 10000 (jobs at once per task)"
    )
    worker_processes: Annotated[int, BeforeValidator(_process_count)] = Field(
        1, ge=1, le=256, description="a whole number from 1 to 256, or auto (one for each core)"
    )
    worker_recycle_jobs: int | None = Field(
        None, ge=1, description="a whole number from 1 (jobs of one process), or not set"
    )
    worker_recycle_memory: Annotated[int | None, BeforeValidator(_bytes)] = Field(
        None,
        ge=1024**2,
        description="bytes of one process, or a number with K, M or G, such as 512M; 1M or more",
    )
    worker_shutdown_grace: float = Field(
        25.0, ge=0, le=86_400, allow_inf_nan=False, description="seconds from 0 to 86400"
    )
    worker_startup_timeout: float = Field(
        30.0, gt=0, le=3_600, allow_inf_nan=False, description="seconds above 0, up to 3600"
    )
    database_pool_max: int = Field(
        5, ge=2, le=1_000, description="a whole number from 2 to 1000 (connections)"
    )
    record_unknown_jobs: bool = Field(True, description="true or false")
    max_payload_bytes: int = Field(
        16 * 1024**2,
        ge=1024,
        le=512 * 1024**2,
        description="a whole number from 1024 to 536870912 (bytes of a job's data)",
    )
    log_level: Annotated[LogLevel, BeforeValidator(_level_name)] = Field(
        "info", description="debug, info, warning, error or critical"
    )
    log_format: Annotated[LogFormat, BeforeValidator(_lower)] = Field(
        default_factory=lambda data: "json" if data.get("node_env") == "production" else "console",
        description="console or json",
    )

    @property
    def needs_supervisor(self) -> bool:
        """Whether `start` runs worker processes of its own, and works in none itself."""
        limits = (self.worker_recycle_jobs, self.worker_recycle_memory)
        return self.worker_processes > 1 or limits != (None, None)

    @classmethod
    def load(cls, *, needs: Collection[str] | None = None, **overrides: Any) -> Self:
        """Read the environment; each of `overrides` that is not ``None`` goes before its variable.

        Only the faults of the attributes in `needs` count; ``None``: of all.

        Raises:
            SettingsError: with all faults; each names the variable, its value and the way out.
        """
        settings, faults = cls.examine(**overrides)
        counted = [fault for name, fault in faults.items() if needs is None or name in needs]
        if counted:
            raise SettingsError([*counted, *map(str, cls.lookalikes())])
        return settings

    @classmethod
    def lookalikes(cls) -> list[Lookalike]:
        """Find the environment's variables whose names are nearly a setting's."""
        return lookalikes(os.environ, [name.upper() for name in cls.model_fields])

    @classmethod
    def examine(cls, **overrides: Any) -> tuple[Self, dict[str, str]]:
        """Return the settings, with a stand-in for each faulty one, and the faults by attribute."""
        given = {name: value for name, value in overrides.items() if value is not None}
        try:
            return cls(**given), {}
        except ValidationError as error:
            details = error.errors(include_url=False)
        # Pydantic does not make log_format's default, which depends on node_env, beside a fault.
        faulty = {
            str(detail["loc"][0]): detail
            for detail in details
            if detail["type"] != "default_factory_not_called"
        }
        faults = {name: _fault(name, faulty[name]) for name in cls.model_fields if name in faulty}
        stand_ins = {
            name: _STAND_INS.get(name)
            or cls.model_fields[name].get_default(call_default_factory=True, validated_data={})
            for name in faults
        }
        return cls(**(given | stand_ins)), faults


def read_env_files() -> list[str]:
    """Read `.env` files in the working directory, as Bun does; return the files' names.

    Their variables go into the process's environment, for handlers too. A variable of the
    environment stays as it is. Of two files that set the same variable the more specific one
    counts: `.env.production.local`, `.env.local`, `.env.production`, `.env`.

    Raises:
        SettingsError: a file can't be read.
    """
    mode = os.environ.get("NODE_ENV", "").strip().lower()
    mode = mode if mode in {"production", "test"} else "development"
    local = [] if mode == "test" else [".env.local"]
    names = [".env", f".env.{mode}", *local, f".env.{mode}.local"]
    found = [name for name in names if Path(name).is_file()]
    variables: dict[str, str | None] = {}
    for name in found:
        try:
            source = DotEnvSettingsSource(BaseSettings, env_file=name, case_sensitive=True)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise SettingsError([f"{name} can't be read: {reason}"]) from None
        variables |= source.env_vars
    for variable, value in variables.items():
        if value is not None and not os.environ.get(variable):
            try:
                os.environ[variable] = value
            except ValueError:
                fault = f"a .env file sets {variable!a} to a value with a null character"
                raise SettingsError([fault]) from None
    return found


def check_urls(*, redis_url: str, database_url: str) -> None:
    """Check the URLs of a caller without `Settings`.

    Raises:
        SettingsError: a URL can't be used.
    """
    faults = []
    for name, check, url in (
        ("redis_url", checked_redis_url, redis_url),
        ("database_url", checked_database_url, database_url),
    ):
        try:
            check(url)
        except ValueError as error:
            faults.append(f"{name}={_shown(name, url)}: {error}; it must be {_wanted(name)}")
    if faults:
        raise SettingsError(faults)


def _wanted(name: str) -> str | None:
    return Settings.model_fields[name].description


def _fault(name: str, detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return (
            f"{name.upper()} is not set: set it to {_wanted(name)} "
            "(`autoflow-worker dev` starts a server of its own)"
        )
    reason = ""
    if detail["type"] == "value_error":
        reason = detail["msg"].removeprefix("Value error, ") + "; "
    return f"{name.upper()}={_shown(name, detail['input'])}: {reason}it must be {_wanted(name)}"


def _shown(name: str, value: object) -> str:
    if name in _STAND_INS:
        # No part but the scheme: the password may stand anywhere in a malformed URL.
        scheme = SCHEME.match(str(value).strip())
        return f"{scheme[0]}://***" if scheme else "***"
    text = mask_secrets(ascii(value))
    return text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "..."
