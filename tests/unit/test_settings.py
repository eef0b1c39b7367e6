"""Settings from the environment: defaults, faults, and names that are nearly ours."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflow_worker.errors import SettingsError
from autoflow_worker.process.cores import usable_cores
from autoflow_worker.settings import Settings
from tests.support.environment import NAMES, URLS, environment, faults, load

SECRET = "S3cr3t"


def test_the_defaults() -> None:
    settings = load()
    assert settings.redis_url.get_secret_value() == "redis://h:1/2"
    assert settings.database_url.get_secret_value() == "postgresql://h/db"
    assert settings.model_dump(exclude={"redis_url", "database_url"}) == {
        "node_env": "development",
        "bullmq_prefix": "bull",
        "tasks_config": "tasks_config:tasks",
        "worker_queues": None,
        "worker_concurrency": 1,
        "worker_processes": 1,
        "worker_recycle_jobs": None,
        "worker_recycle_memory": None,
        "worker_shutdown_grace": 25.0,
        "worker_startup_timeout": 30.0,
        "database_pool_max": 5,
        "record_unknown_jobs": True,
        "max_payload_bytes": 16_777_216,
        "log_level": "info",
        "log_format": "console",
    }


def test_what_is_set_counts() -> None:
    settings = load(
        NODE_ENV="production",
        WORKER_QUEUES=" a, b:c ,,a",
        WORKER_CONCURRENCY=" 20 ",
        WORKER_SHUTDOWN_GRACE="0",
        RECORD_UNKNOWN_JOBS="false",
        LOG_LEVEL="WARN",
    )
    assert settings.worker_queues == ("a", "b:c")
    assert settings.worker_concurrency == 20
    assert settings.worker_shutdown_grace == 0
    assert settings.record_unknown_jobs is False
    assert settings.log_level == "warning"
    assert settings.log_format == "json"


@pytest.mark.parametrize(
    ("value", "bytes_"),
    [("1048576", 2**20), ("512M", 512 * 2**20), (" 2 GiB ", 2 * 2**30), ("4096kb", 2**22)],
)
def test_memory_in_bytes_or_with_a_unit(value: str, bytes_: int) -> None:
    assert load(WORKER_RECYCLE_MEMORY=value).worker_recycle_memory == bytes_


def test_when_start_runs_processes_of_its_own() -> None:
    assert not load(WORKER_PROCESSES="1").needs_supervisor
    assert load(WORKER_PROCESSES="2").needs_supervisor
    assert load(WORKER_RECYCLE_JOBS="9").needs_supervisor
    assert load(WORKER_PROCESSES=" Auto").worker_processes == usable_cores()


def test_log_format_goes_before_the_default_of_production() -> None:
    assert load(NODE_ENV="production", LOG_FORMAT="Console").log_format == "console"


def test_the_command_line_goes_before_the_environment() -> None:
    with environment(URLS | {"TASKS_CONFIG": "a:b", "WORKER_QUEUES": "x"}):
        settings = Settings.load(tasks_config="c:d", worker_queues=None)
    assert settings.tasks_config == "c:d"
    assert settings.worker_queues == ("x",)


def test_set_to_nothing_is_not_set() -> None:
    assert load(WORKER_CONCURRENCY="", LOG_LEVEL="").worker_concurrency == 1
    assert faults(REDIS_URL="")[0].startswith("REDIS_URL is not set: ")


def test_nothing_in_the_working_directory_is_read(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("project")
    (folder / ".env").write_text("WORKER_CONCURRENCY=7\n")
    monkeypatch.chdir(folder)
    assert load().worker_concurrency == 1


@pytest.mark.parametrize(
    ("variable", "value", "said", "nearest"),
    [
        ("WORKER_CONCURENCY", "5", "WORKER_CONCURENCY", "WORKER_CONCURRENCY"),
        ("worker_concurency", "5", "worker_concurency", "WORKER_CONCURRENCY"),
        ("REDIS_URI", "redis://:S3cr3t@h", "REDIS_URI", "REDIS_URL"),
        ("REDIS_ULR", "redis://h", "REDIS_ULR", "REDIS_URL"),
        ("DATABASE_POOLMAX", "5", "DATABASE_POOLMAX", "DATABASE_POOL_MAX"),
        ("DATABSE_URL", "x", "DATABSE_URL", "DATABASE_URL"),
        ("BULL_PREFIX", "x", "BULL_PREFIX", "BULLMQ_PREFIX"),
        ("TASK_CONFIG", "x", "TASK_CONFIG", "TASKS_CONFIG"),
        ("LOG_LEVL", "x", "LOG_LEVL", "LOG_LEVEL"),
        ("WORKER_QUEUE", "x", "WORKER_QUEUE", "WORKER_QUEUES"),
        ("NODE_ENV", "prod", "NODE_ENV=prod", "NODE_ENV=production"),
        ("NODE_ENV", "Prodution", "NODE_ENV=prodution", "NODE_ENV=production"),
        ("NODE_ENV", "dev", "NODE_ENV=dev", "NODE_ENV=development"),
    ],
)
def test_a_variable_that_is_nearly_ours_is_named(
    variable: str, value: str, said: str, nearest: str
) -> None:
    with environment(URLS | {variable: value}):
        assert Settings.lookalikes() == [(said, nearest)]
        Settings.load()
    with environment({variable: value}), pytest.raises(SettingsError) as caught:
        Settings.load()
    told = caught.value.faults[-1]
    assert told == f"{said} is not known; the nearest is {nearest}"


def test_variables_of_other_software_are_not_named() -> None:
    others = """
        REDIS_PASSWORD REDIS_HOST REDIS_PORT REDIS_DB REDIS_USER REDIS_TLS_URL REDIS_URL_2
        REDIS_PORT_6379_TCP REDIS_PORT_6379_TCP_ADDR REDIS_SERVICE_HOST REDIS_SERVICE_PORT
        DATABASE_HOST DATABASE_PORT DATABASE_USER DATABASE_NAME DATABASE_PASSWORD DATABASE_URL2
        DATABASE_URL_UNPOOLED DATABASE_POOL_MIN DATABASE_POOL_SIZE DB_URL POSTGRES_URL PGHOST
        LOG_DIR LOG_FILE LOG_PATH LOGLEVEL LOG_COLOR RUST_LOG NPM_CONFIG_LOGLEVEL
        NODE_OPTIONS NODE_VERSION NODE_PATH NODE_NAME NODE_IP NODE_EXTRA_CA_CERTS NODE_HOST
        WORKER_ID WORKER_COUNT WORKER_CLASS WORKER_TIMEOUT WEB_CONCURRENCY WORKER_CONNECTIONS
        TASK_ID TASKS_DIR QUEUE_URL QUEUES PATH HOME LANG MAX_PAYLOAD_SIZE PYTHONPATH
    """.split()  # noqa: SIM905 - a list of words
    with environment(URLS | dict.fromkeys(others, "x") | {"NODE_ENV": "staging"}):
        assert Settings.lookalikes() == []


def test_settings_can_not_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().worker_concurrency = 2  # type: ignore[misc]


def test_every_fault_is_told_at_once() -> None:
    variables = {
        "REDIS_URL": "http://h",
        "TASKS_CONFIG": "no-colon",
        "WORKER_QUEUES": " , ",
        "WORKER_CONCURRENCY": "0",
        "WORKER_PROCESSES": "several",
        "WORKER_RECYCLE_JOBS": "0",
        "WORKER_RECYCLE_MEMORY": "512X",
        "WORKER_SHUTDOWN_GRACE": "inf",
        "WORKER_STARTUP_TIMEOUT": "0",
        "DATABASE_POOL_MAX": "1.5",
        "RECORD_UNKNOWN_JOBS": "maybe",
        "MAX_PAYLOAD_BYTES": "1023",
        "LOG_LEVEL": "loud",
        "LOG_FORMAT": "xml",
    }
    with environment(variables), pytest.raises(SettingsError) as caught:
        Settings.load()
    told = [fault.split("=")[0].split(" ")[0] for fault in caught.value.faults]
    assert sorted(told) == sorted([*variables, "DATABASE_URL"])
    assert caught.value.exit_code == 2
    for fault in caught.value.faults:
        assert "must be" in fault or "set it to" in fault


def test_only_the_faults_that_matter() -> None:
    with environment({"DATABASE_URL": URLS["DATABASE_URL"], "LOG_LEVEL": "loud"}):
        settings = Settings.load(needs={"database_url"})
    assert settings.database_url.get_secret_value() == URLS["DATABASE_URL"]


def test_examine_keeps_what_is_right() -> None:
    with environment({"REDIS_URL": "redis://h", "WORKER_CONCURRENCY": "x"}):
        settings, found = Settings.examine()
    assert list(found) == ["database_url", "worker_concurrency"]
    assert settings.redis_url.get_secret_value() == "redis://h"
    assert settings.worker_concurrency == 1


def test_the_urls_are_never_shown() -> None:
    settings = load(REDIS_URL=f"redis://:{SECRET}@h", DATABASE_URL=f"postgres://u:{SECRET}@h/d")
    assert SECRET not in repr(settings) + str(settings) + settings.model_dump_json()


_text = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30
) | st.text(st.sampled_from("%@:/?#[],;='\"\\ .-\ud83d\udcff"), max_size=12).map(
    lambda text: os.fsdecode(os.fsencode(text.encode("utf-8", "ignore").decode()))
)
_word = st.sampled_from(["redis", "rediss", "unix", "postgres", "postgresql", "http", "x", ""])
_secret = st.builds(lambda before, after: before + SECRET + after, _text, _text)
_url = st.builds(
    lambda scheme, user, password, rest: f"{scheme}://{user}:{password}@{rest}",
    _word,
    _text,
    _secret,
    _text,
)
_secret_url = _url | _secret
_plain = (
    _text
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["a:b", "true", "off", "json", "debug", "production", "[1]", "{}", "null"])
)


@given(
    urls=st.fixed_dictionaries(
        {}, optional={"REDIS_URL": _secret_url, "DATABASE_URL": _secret_url}
    ),
    others=st.dictionaries(st.sampled_from(NAMES).filter(lambda n: not n.endswith("URL")), _plain),
)
def test_any_environment_gives_settings_or_one_error(
    urls: dict[str, str], others: dict[str, str]
) -> None:
    with environment(urls | others):
        try:
            shown = repr(Settings.load())
        except SettingsError as error:
            shown = str(error) + repr(error) + repr(error.__cause__) + repr(error.__context__)
    assert SECRET not in shown
    assert shown.encode()  # can be printed
