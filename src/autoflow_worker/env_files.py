"""Variables from `.env` files in the working directory, as Bun gives them to the Node worker."""

import os
from pathlib import Path

from pydantic_settings import BaseSettings, DotEnvSettingsSource

from autoflow_worker.errors import SettingsError


def read_env_files() -> list[str]:
    """Read the files into the process's environment, for handlers too; return the files' names.

    A variable of the environment stays as it is. Of two files that set the same variable the more
    specific one counts: `.env.production.local`, `.env.local`, `.env.production`, `.env`.

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
    """Return the files that Bun reads, from the most general to the most specific."""
    mode = node_env.strip().lower()
    mode = mode if mode in {"production", "test"} else "development"
    local = [] if mode == "test" else [".env.local"]
    return [".env", f".env.{mode}", *local, f".env.{mode}.local"]


def _set(variable: str, value: str) -> None:
    try:
        os.environ[variable] = value
    except ValueError:
        raise SettingsError(
            [f"a .env file sets {variable!a} to a value with a null character"]
        ) from None
