"""Settings out of an environment that holds nothing else of ours."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from autoflow_worker.errors import SettingsError
from autoflow_worker.settings import Settings

URLS = {"REDIS_URL": "redis://h:1/2", "DATABASE_URL": "postgresql://h/db"}
NAMES = [name.upper() for name in Settings.model_fields]


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    for name in NAMES:
        os.environ.pop(name, None)
        os.environ.pop(name.lower(), None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def load(**variables: str) -> Settings:
    with environment(URLS | variables):
        return Settings.load()


def faults(**variables: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        load(**variables)
    return caught.value.faults
