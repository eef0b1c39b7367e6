"""Log lines: what is in them, and that no value breaks one or shows a secret."""

import io
import json
import logging
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from autoflow_worker import TaskContext
from autoflow_worker.logs.configure import (
    MAX_LINE_LENGTH,
    configure_logging,
    flush_logs,
    job_logger,
)

CONTEXT = TaskContext(task_id="t1", correlation_id="c1", queue_name="mails", max_attempts=3)


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    configure_logging(stream=io.StringIO())
    structlog.reset_defaults()
    logging.captureWarnings(False)
    root.handlers, root.level = handlers, level


class Lines:
    """What was logged, in memory."""

    def __init__(self, level: Any = "info", fmt: Any = "json") -> None:
        self.stream = io.StringIO()
        configure_logging(level, fmt, self.stream)

    @property
    def text(self) -> str:
        assert flush_logs(10)
        return self.stream.getvalue()

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.split("\n") if line]


def test_a_jobs_lines_are_bound_to_it() -> None:
    lines = Lines()
    CONTEXT.logger.info("sending", email="a@b.c")
    [entry] = lines.entries
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {
        "event": "sending",
        "level": "info",
        "email": "a@b.c",
        "task_id": "t1",
        "queue": "mails",
        "attempt": 1,
        "max_attempts": 3,
        "correlation_id": "c1",
    }


def test_lines_below_the_level_are_left_out() -> None:
    lines = Lines("warning")
    for log in (CONTEXT.logger, structlog.get_logger()):
        log.info("no")
        log.warning("yes")
    logging.getLogger("library").info("no")
    logging.getLogger("library").warning("yes")
    assert [entry["event"] for entry in lines.entries] == ["yes"] * 3


def test_the_console_format_is_for_people() -> None:
    lines = Lines(fmt="console")
    try:
        int("broken")
    except ValueError:
        CONTEXT.logger.exception("it_failed", url="redis://u:S3cr3t@h")
    text = lines.text
    assert "it_failed" in text
    assert "task_id=t1" in text
    assert "ValueError: invalid literal" in text
    assert "S3cr3t" not in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


CONTROLS = [
    *("\x1b[2J", "\x1b]8;;http://evil\x1b\\", "\x9b2J", "\r", "\x07", "\x08", "\x7f"),
    *("\u202e", "\u2066", "\u2028", "\x85"),
]


class Rude:
    def __repr__(self) -> str:
        return "rude" + "".join(CONTROLS)


def fail(text: str) -> None:
    raise ValueError(text)


@pytest.mark.parametrize("control", CONTROLS, ids=ascii)
def test_no_payload_gives_orders_to_a_terminal(control: str) -> None:
    stream = Terminal()
    configure_logging(fmt="console", stream=stream)
    log = job_logger(task_id=f"t{control}1")
    event = f"before{control}after"
    log.info(event, value=f"x{control}y", deep=[{control: control}], rude=Rude())
    log.info("keys", **{f"key{control}": 1, "logger": control, "stack": f"a{control}\nb"})
    logging.getLogger("library").warning("library %s", control)
    try:
        fail(f"first{control}\nsecond")
    except ValueError:
        log.exception("failed")
    assert flush_logs(10)
    text = stream.getvalue()
    assert "\x1b[" in text  # the colours of our own
    theirs = re.sub(r"\x1b\[\d+m", "", text)
    assert [c for c in theirs if not c.isprintable() and c not in "\n\t"] == []
    assert "before\\" in theirs
    assert "after" in theirs
    assert "first\\" in theirs
    # A traceback keeps its lines.
    lines = theirs.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert "second" in lines


def test_the_console_shows_values_as_python_does() -> None:
    lines = Lines(fmt="console")
    job_logger(task_id="t1").info(
        "it", a="x", b="x y", c=["x"], d=None, e=1.5, f="", g="ünï", h="q=1"
    )
    words = lines.text.split("it", 1)[1].strip()
    assert words == "task_id=t1 a=x b='x y' c=['x'] d=None e=1.5 f= g=ünï h='q=1'"


def test_colours_do_not_bring_a_secret_to_light() -> None:
    stream = Terminal()
    configure_logging(fmt="console", stream=stream)
    job_logger(password="S3cr3t").info(
        "it", apiKey="S3cr3t", pin_token=987654, deep={"jwt": "S3cr3t"}
    )
    assert flush_logs(10)
    assert "S3cr3t" not in stream.getvalue()
    assert "987654" not in stream.getvalue()


def test_libraries_log_the_same_way() -> None:
    lines = Lines()
    logger = logging.getLogger("some.library")
    logger.warning("took %d ms", 5)
    logger.log(35, "between the levels")
    logger.warning("wrong %d arguments", "x")
    try:
        int("broken")
    except ValueError:
        logger.exception("it failed")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    entries = lines.entries
    assert [entry["level"] for entry in entries] == ["warning"] * 3 + ["error", "warning"]
    assert entries[0]["event"] == "took 5 ms"
    assert entries[0]["logger"] == "some.library"
    assert entries[2]["event"] == "wrong %d arguments"
    assert "ValueError: invalid literal" in entries[3]["exception"]
    assert "DeprecationWarning: old" in entries[4]["event"]


def test_context_variables_are_in_the_lines() -> None:
    lines = Lines()
    with structlog.contextvars.bound_contextvars(request="r1"):
        CONTEXT.logger.info("one")
    assert lines.entries[0]["request"] == "r1"


def test_passwords_are_masked_wherever_they_are() -> None:
    lines = Lines()
    url = "postgresql://user:S3cr3t@h/db"
    try:
        int(url)
    except ValueError:
        CONTEXT.logger.exception(url, url=url, deep={"list": [url, {url: url}]}, n=5)
    [entry] = lines.entries
    assert "S3cr3t" not in lines.text
    assert entry["url"] == "postgresql://user:***@h/db"
    assert entry["deep"]["list"][0] == "postgresql://user:***@h/db"
    assert entry["n"] == 5
    CONTEXT.logger.info("one", password="S3cr3t", deep=[{"db_password": "S3cr3t", "n": 1}])
    assert "S3cr3t" not in lines.text
    assert lines.entries[1]["deep"] == [{"db_password": "***", "n": 1}]
    CONTEXT.logger.info("two", a="x://host:", b='"@')  # as one line: a URL with a password
    assert lines.entries[2]["b"] == '"@'


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_tokens_and_keys_are_masked_by_their_names(fmt: str) -> None:
    lines = Lines(fmt=fmt)
    CONTEXT.logger.info(
        "called",
        headers={"Authorization": "Basic S3cr3t", "x-api-key": "S3cr3t"},
        clientSecret="S3cr3t",
        access_token=123456,
        body=json.dumps({"apiKey": "S3cr3t", "kept": "this"}),
        words="sent Bearer S3cr3t.S3cr3t to it",
        tokens_used=12,
        idempotencyKey="k-1",
    )
    assert "S3cr3t" not in lines.text
    assert "123456" not in lines.text
    for kept in ("called", "kept", "sent Bearer ***", "tokens_used", "12", "k-1"):
        assert kept in lines.text
    if fmt == "json":
        [entry] = lines.entries
        assert entry["headers"] == {"Authorization": "***", "x-api-key": "***"}
        assert entry["clientSecret"] == entry["access_token"] == "***"
        assert entry["tokens_used"] == 12


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("fmt", ["json", "console"])
@pytest.mark.parametrize(
    "value",
    [
        "\ud800",
        "\0\x1b[31m\u2028",
        10**400,
        float("nan"),
        {1: {(2, 3): b"\xff"}},
        {"key": {"\ud800": Hostile()}},
        Hostile(),
        ["x"] * 100_000,
        "x" * 10_000_000,
    ],
    ids=range(9),
)
def test_no_value_breaks_a_line(fmt: str, value: object) -> None:
    lines = Lines(fmt=fmt)
    CONTEXT.logger.info("odd", value=value)
    CONTEXT.logger.info("next")
    text = lines.text
    assert text.count("\n") == 2
    assert len(text) < 2 * MAX_LINE_LENGTH
    assert "next" in text
    if fmt == "json":
        assert lines.entries[0]["attempt"] == 1


def test_circles_do_not_break_a_line() -> None:
    lines = Lines()
    circle: list[object] = []
    circle.append(circle)
    CONTEXT.logger.info("odd", value=circle)
    assert lines.entries[0]["value"] == "[[...]]"


def test_a_long_line_hides_its_passwords() -> None:
    lines = Lines()
    for length in range(1900, 2100, 10):
        text = "x" * length + " redis://user:S3cr3tS3cr3t@host " + "x" * 20_000
        CONTEXT.logger.info("long", text=text)
        key = "-----BEGIN PRIVATE KEY-----\n" + "S3cr3t\n" * 450
        text = "x" * (length - 200) + json.dumps({"private_key": key}) + "x" * 20_000
        CONTEXT.logger.info("long", text=text)
    assert "S3cr3t" not in lines.text


def test_before_configuration_a_context_can_log(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "from autoflow_worker import TaskContext\n"
        "TaskContext(task_id='t', correlation_id='c', queue_name='q').logger.info('hello')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hello" in done.stdout


def test_lines_of_threads_do_not_mix() -> None:
    lines = Lines()

    def log(number: int) -> None:
        for _ in range(200):
            job_logger(thread=number).info("line", text="x" * 50)

    threads = [threading.Thread(target=log, args=[number]) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines.entries) == 1000


def test_the_last_lines_are_written_at_exit() -> None:
    code = (
        "from autoflow_worker.logs.configure import configure_logging, job_logger\n"
        "configure_logging('info', 'json')\n"
        "for n in range(1000): job_logger(n=n).info('line')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1000
