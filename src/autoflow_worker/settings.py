"""Settings from the environment; every fault in them is reported at once."""

import os
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from autoflow_worker.broker.redis_urls import redis_url as checked_redis_url
from autoflow_worker.encoding.masking import mask_secrets
from autoflow_worker.errors import SettingsError
from autoflow_worker.logs.configure import LogFormat, LogLevel
from autoflow_worker.lookalikes import Lookalike, lookalikes
from autoflow_worker.recording.database_urls import database_url as checked_database_url
from autoflow_worker.urls import SCHEME

# Names that Node's loggers know, so that one LOG_LEVEL serves the API and this worker.
_LEVEL_ALIASES = {"trace": "debug", "warn": "warning", "fatal": "critical"}
_SHOWN_LENGTH = 80


def _split_names(value: object) -> object:
    if not isinstance(value, str):
        return value
    # Named twice is asked for once; what names nothing stays text, which is refused.
    return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip())) or value


def _level_name(value: object) -> object:
    if not isinstance(value, str):
        return value
    return _LEVEL_ALIASES.get(value.strip().lower(), value.strip().lower())


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _redis_url(value: SecretStr) -> SecretStr:
    return SecretStr(checked_redis_url(value.get_secret_value()))


def _database_url(value: SecretStr) -> SecretStr:
    return SecretStr(checked_database_url(value.get_secret_value()))


class Settings(BaseSettings):
    """What the environment says, checked.

    Each attribute is the variable of the same name in capitals. A variable set to nothing counts
    as not set. The two URLs are never printed.
    """

    model_config = SettingsConfigDict(
        frozen=True, env_ignore_empty=True, hide_input_in_errors=True, str_strip_whitespace=True
    )

    node_env: Annotated[str, BeforeValidator(_lower)] = Field(
        "development", description="a name; production turns JSON logs on"
    )
    redis_url: Annotated[SecretStr, AfterValidator(_redis_url)] = Field(
        description="host:6379 or redis://host:6379/0, rediss:// for TLS, or unix:// and a "
        "socket's path"
    )
    database_url: Annotated[SecretStr, AfterValidator(_database_url)] = Field(
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
    worker_shutdown_grace: float = Field(
        25.0, ge=0, le=86_400, allow_inf_nan=False, description="seconds from 0 to 86400"
    )
    worker_startup_timeout: float = Field(
        30.0, gt=0, le=3_600, allow_inf_nan=False, description="seconds above 0, up to 3600"
    )
    database_pool_max: int = Field(
        5, ge=1, le=1_000, description="a whole number from 1 to 1000 (connections)"
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

    #: Never shown, not even in part: a malformed URL hides its password anywhere.
    secret_fields: ClassVar[frozenset[str]] = frozenset({"redis_url", "database_url"})

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the environment only; what the command line says goes before it."""
        return init_settings, env_settings

    @classmethod
    def load(cls, *, needs: Collection[str] | None = None, **overrides: Any) -> Self:
        """Read the environment.

        Args:
            needs: the attributes whose faults count; ``None``: all of them.
            overrides: values that go before the environment, by attribute; ``None`` is none.

        Raises:
            SettingsError: with all faults, each naming the variable, its value and the way out.
        """
        settings, faults = cls.examine(**overrides)
        counted = [fault for name, fault in faults.items() if needs is None or name in needs]
        if counted:
            raise SettingsError([*counted, *map(str, cls.lookalikes())])
        return settings

    @classmethod
    def lookalikes(cls) -> list[Lookalike]:
        """Find the variables of the environment that are nearly one of these, and so none."""
        return lookalikes(os.environ, [name.upper() for name in cls.model_fields])

    @classmethod
    def examine(cls, **overrides: Any) -> tuple[Self, dict[str, str]]:
        """Return settings with a stand-in for each faulty one, and the faults by attribute."""
        given = {name: value for name, value in overrides.items() if value is not None}
        try:
            return cls(**given), {}
        except ValidationError as error:
            details = error.errors(include_url=False)
        # A default that depends on other settings is not made while one of these is wrong.
        faulty = {
            str(detail["loc"][0]): detail
            for detail in details
            if detail["type"] != "default_factory_not_called"
        }
        faults = {name: _fault(faulty[name]) for name in cls.model_fields if name in faulty}
        return cls(**(given | {name: _stand_in(name) for name in faults})), faults


def check_urls(*, redis_url: str, database_url: str) -> None:
    """Check the URLs of somebody who has no `Settings`.

    Raises:
        SettingsError: one of them can't be used.
    """
    faults = []
    for name, check, url in (
        ("redis_url", checked_redis_url, redis_url),
        ("database_url", checked_database_url, database_url),
    ):
        try:
            check(url)
        except ValueError as error:
            wanted = Settings.model_fields[name].description
            faults.append(f"{name}={_shown(name, url)}: {error}; it must be {wanted}")
    if faults:
        raise SettingsError(faults)


def _stand_in(name: str) -> object:
    if name in Settings.secret_fields:
        return {"redis_url": "redis://unset", "database_url": "postgresql://unset"}[name]
    return Settings.model_fields[name].get_default(call_default_factory=True, validated_data={})


def _fault(detail: ErrorDetails) -> str:
    name = str(detail["loc"][0]) if detail["loc"] else "?"
    field = Settings.model_fields.get(name)
    wanted = field.description if field is not None else None
    if detail["type"] == "missing":
        return f"{name.upper()} is not set: set it to {wanted}"
    reason = ""
    if detail["type"] == "value_error":
        reason = detail["msg"].removeprefix("Value error, ") + "; "
    return f"{name.upper()}={_shown(name, detail['input'])}: {reason}it must be {wanted}"


def _shown(name: str, value: object) -> str:
    if name in Settings.secret_fields:
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        scheme = SCHEME.match(text.strip())
        return f"{scheme[0]}://***" if scheme else "***"
    text = mask_secrets(ascii(value))
    return text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "..."
