"""The next time of a cron pattern; `tests/integration/broker/test_cron_as_node.py` asks Node."""

import time
from datetime import UTC, datetime
from typing import Any

import pytest

from autoflow_worker.broker.cron import next_ms
from autoflow_worker.broker.cron_fields import parse


def ms(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp() * 1000)


def following(after: str, pattern: str, **options: Any) -> str | None:
    found = next_ms(ms(after), {"pattern": pattern, **options})
    if found is None:
        return None
    return datetime.fromtimestamp(found / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize(
    ("pattern", "after", "expected"),
    [
        # The clocks go from 2 to 3 at 2026-03-29T01:00Z, and back at 2026-10-25T01:00Z.
        ("0 9 * * *", "2026-03-28T08:00Z", "2026-03-29T07:00:00Z"),
        ("0 9 * * *", "2026-03-29T07:00Z", "2026-03-30T07:00:00Z"),
        ("0 9 * * *", "2026-10-24T07:00Z", "2026-10-25T08:00:00Z"),
        ("0 9 * * *", "2026-10-25T08:00Z", "2026-10-26T08:00:00Z"),
        # 02:30 is skipped, and comes twice.
        ("30 2 * * *", "2026-03-28T12:00Z", "2026-03-29T01:30:00Z"),
        ("30 2 * * *", "2026-10-25T00:30Z", "2026-10-26T01:30:00Z"),
        ("0 * * * *", "2026-10-25T00:00Z", "2026-10-25T01:00:00Z"),
    ],
)
def test_a_zone_follows_its_wall_clock(pattern: str, after: str, expected: str) -> None:
    assert following(after, pattern, tz="Europe/Berlin") == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("0 0 * * 5L", "2026-01-30T00:00:00Z"),
        ("0 0 * * FRIL", "2026-01-30T00:00:00Z"),
        ("0 0 * * 1L,5L", "2026-01-26T00:00:00Z"),
        ("0 0 L * *", "2026-01-31T00:00:00Z"),
        ("0 0 * * MON#2", "2026-01-12T00:00:00Z"),
        ("@weekdays", "2026-01-02T00:00:00Z"),
        ("@weekends", "2026-01-03T00:00:00Z"),
        ("@minutely", "2026-01-01T00:01:00Z"),
        ("@secondly", "2026-01-01T00:00:01Z"),
        ("0 ? * ? FEB 7", "2026-02-01T00:00:00Z"),
        ("15 10 5 * * *", "2026-01-01T05:10:15Z"),
        ("5 5", "2026-05-01T00:00:00Z"),
        ("0 0 13 * 5", "2026-01-02T00:00:00Z"),
        ("0 0 29 2 *", "2028-02-29T00:00:00Z"),
    ],
)
def test_patterns_of_every_kind(pattern: str, expected: str) -> None:
    assert following("2026-01-01T00:00Z", pattern, tz="UTC") == expected


def test_a_seed_fixes_what_h_draws() -> None:
    seeded = {following("2026-01-01T00:00Z", "H * * * *", hashSeed="s") for _ in range(9)}
    assert len(seeded) == 1
    assert len({parse("H H H * * *").second.values for _ in range(99)}) > 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"pattern": "61 * * * *"}, "got value 61 expected range 0-59"),
        ({"pattern": "* * * * * * *"}, "too many fields"),
        ({"pattern": "0 0 30 2 *"}, "Invalid explicit day of month"),
        ({"pattern": "0 0 * * L"}, "standalone L"),
        ({"pattern": "0 0 * * 1,1"}, "duplicate values"),
        ({"pattern": "0 0 * * 1#6"}, "occurrence number"),
        ({"pattern": "@reboot"}, "cannot resolve alias"),
        ({"pattern": "a * * * *"}, "Invalid characters"),
        ({"pattern": "*/0 * * * *"}, "cannot repeat at every 0"),
        ({"pattern": "5-1 * * * *"}, r"min\(5\) > max\(1\)"),
        ({"pattern": "1,,2 * * * *"}, "Invalid list value"),
        ({"pattern": "0 " * 600}, "too long"),
        ({"pattern": 5}, "a cron pattern is a text"),
        ({"pattern": "0 0 0 1 * 1", "strict": True}, "strict mode"),
        ({"pattern": "* * * * *", "strict": True}, "expected 6 fields"),
        ({"pattern": "* * * * *", "tz": "Nowhere/Town"}, "no time zone 'Nowhere/Town'"),
        ({"pattern": "* * * * *", "tz": "../etc/passwd"}, "no time zone"),
        ({"pattern": "* * * * *", "tz": {}}, "not a time zone"),
        ({"pattern": "* * * * *", "endDate": "soon"}, "endDate is not a date"),
    ],
)
def test_what_node_refuses_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        next_ms(0, options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"startDate": ms("2026-05-01T12:00Z")}, "2026-05-02T00:00:00Z"),
        ({"startDate": "2026-05-01T12:00:00.000Z"}, "2026-05-02T00:00:00Z"),
        ({"startDate": "Fri, 01 May 2026 12:00:00 GMT"}, "2026-05-02T00:00:00Z"),
        ({"startDate": ms("2020-01-01T00:00Z")}, "2026-01-02T00:00:00Z"),
        ({"endDate": ms("2026-01-02T00:00Z")}, "2026-01-02T00:00:00Z"),
        ({"endDate": ms("2026-01-01T23:00Z")}, None),
        ({"endDate": ms("2025-01-01T00:00Z")}, None),
    ],
)
def test_start_and_end(options: dict[str, Any], expected: str | None) -> None:
    assert following("2026-01-01T00:00Z", "@daily", tz="UTC", **options) == expected


def test_a_pattern_without_a_further_date_has_none() -> None:
    assert following("2026-01-01T00:00Z", "0 0 31 4,6 *", tz="UTC") is None
    assert next_ms(ms("9999-12-31T12:00Z"), {"pattern": "0 0 1 1 *", "tz": "UTC"}) is None


def test_immediately_is_now() -> None:
    before = int(time.time() * 1000)
    found = next_ms(0, {"pattern": "@yearly", "immediately": True})
    assert found is not None
    assert before <= found <= time.time() * 1000


@pytest.mark.parametrize(
    ("tz", "expected"),
    [
        ("europe/berlin", "08"),
        ("utc", "09"),
        ("UTC+2", "07"),
        ("utc-3:30", "12"),
        ("-05:00", "14"),
        (90, "07"),
        ("JST", "00"),
    ],
)
def test_the_zones_that_luxon_takes(tz: str | int, expected: str) -> None:
    found = following("2026-01-01T00:00Z", "0 9 * * *", tz=tz)
    assert found is not None
    assert found[11:13] == expected


def test_without_tz_it_is_the_process_s_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert following("2026-01-01T01:00Z", "0 9 * * *") == "2026-01-02T00:00:00Z"
    # Where the machine has no file for the name, it is the C library's zone.
    monkeypatch.setenv("TZ", "XXX-3")
    time.tzset()
    try:
        assert following("2026-01-01T01:00Z", "0 9 * * *") == "2026-01-01T06:00:00Z"
    finally:
        monkeypatch.undo()
        time.tzset()
