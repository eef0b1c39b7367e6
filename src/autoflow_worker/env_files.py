"""Variables from `.env` files in the working directory, as Bun gives them to the Node worker."""

import os
from pathlib import Path

from pydantic_settings import BaseSettings, DotEnvSettingsSource

from autoflow_worker.errors import SettingsError


def read_env_files() -> list[str]:
    """Set the variables that the files hold and the environment does not; return the files' names.

    In the process's environment, so that handlers have them too. Of two files that set the same
    variable the more special one counts: `.env.production.local`, `.env.local`, `.env.production`,
    `.env`. The environment goes before all of them.

    Raises:
        SettingsError: a file can't be read.
    """
    found = [name for name in _names(os.environ.get("NODE_ENV", "")) if Path(name).is_file()]
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
            _set(variable, value)
    return found


def _names(node_env: str) -> list[str]:
    """The files that Bun reads, from the most general to the most special."""
    mode = node_env.strip().lower()
    mode = mode if mode in {"production", "test"} else "development"
    local = [] if mode == "test" else [".env.local"]
    return [".env", f".env.{mode}", *local, f".env.{mode}.local"]


def _set(variable: str, value: str) -> None:
    try:
        os.environ[variable] = value
    except ValueError:
        raise SettingsError([f"a .env file gives {variable!a} a value with a null in it"]) from None
