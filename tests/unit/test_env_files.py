"""What is read from `.env` files, in the order in which Bun reads them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoflow_worker.errors import SettingsError
from autoflow_worker.settings import read_env_files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, in an environment that is put back afterwards."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    os.environ.pop("NODE_ENV", None)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def test_no_file(folder: Path) -> None:
    before = dict(os.environ)
    assert read_env_files() == []
    assert dict(os.environ) == before


def test_the_environment_goes_before_a_file(folder: Path) -> None:
    (folder / ".env").write_text("TEST_A=file\nexport TEST_B='in quotes'\n# no\nTEST_C=\nTEST_D\n")
    os.environ["TEST_A"] = "environment"
    os.environ["TEST_B"] = ""  # set to nothing is not set
    assert read_env_files() == [".env"]
    assert os.environ["TEST_A"] == "environment"
    assert os.environ["TEST_B"] == "in quotes"
    assert os.environ["TEST_C"] == ""
    assert "TEST_D" not in os.environ


@pytest.mark.parametrize(
    ("node_env", "read"),
    [
        (None, [".env", ".env.development", ".env.local", ".env.development.local"]),
        ("staging", [".env", ".env.development", ".env.local", ".env.development.local"]),
        ("Production", [".env", ".env.production", ".env.local", ".env.production.local"]),
        ("test", [".env", ".env.test", ".env.test.local"]),
        ("../x", [".env", ".env.development", ".env.local", ".env.development.local"]),
    ],
)
def test_the_more_special_file_counts(folder: Path, node_env: str | None, read: list[str]) -> None:
    names = [".env", ".env.local"]
    names += [f".env.{mode}{end}" for mode in _MODES for end in ("", ".local")]
    for name in names:
        (folder / name).write_text(f"TEST_NAME={name}\n")
    if node_env is not None:
        os.environ["NODE_ENV"] = node_env
    assert read_env_files() == read
    assert os.environ["TEST_NAME"] == read[-1]


_MODES = ("production", "development", "test")


def test_a_file_that_can_not_be_read(folder: Path) -> None:
    (folder / ".env").write_bytes(b"TEST_PASSWORD=S3cr3t\xff\n")
    with pytest.raises(SettingsError, match=r"\.env can't be read: it is not UTF-8") as caught:
        read_env_files()
    assert "S3cr3t" not in str(caught.value)
    (folder / ".env").write_bytes(b"TEST_PASSWORD='S3cr3t\0'\n")
    with pytest.raises(SettingsError, match="TEST_PASSWORD") as caught:
        read_env_files()
    assert "S3cr3t" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(folder: Path) -> None:
    (folder / ".env").write_text("A=1")
    (folder / ".env").chmod(0)
    with pytest.raises(SettingsError, match="Permission denied"):
        read_env_files()
