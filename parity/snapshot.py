"""What a scenario left in Redis, without what can't be equal: times, tokens, texts of traces."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from redis.asyncio import Redis

from parity.scenario import Json, Scenario

# A moment of these decades in ms since the epoch, wherever it stands.
_MOMENT: Final = re.compile(r"(?<!\d)1[6-9]\d{11}(?!\d)")
_DURATION: Final = re.compile(r'(?<="duration":)\d+')
_MD5: Final = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_MOMENTS: Final = range(1_600_000_000_000, 2_000_000_000_000)

_JSON_FIELDS: Final = frozenset({"data", "opts", "returnvalue", "progress", "stacktrace", "parent"})
# Sets whose scores are times. Two jobs of one millisecond stand in any order.
_BY_TIME: Final = frozenset({"completed", "failed", "delayed", "waiting-children", "repeat"})
# It exists for `stalledInterval` after each check.
_LEFT_OUT: Final = frozenset({"stalled-check"})
# Milliseconds pass between reading the clock and using what was read.
_DELAY_STEP: Final = 10
_NEAR: Final = 200


async def read(redis: Redis, prefix: str, scenario: Scenario) -> dict[str, Json]:
    """Return every key of the scenario's queues with its type, its content, and if it expires."""
    found: dict[str, Json] = {}
    async for key in redis.scan_iter(f"{prefix}:{scenario.queue}*", count=1000):
        queue, _, name = key.removeprefix(f"{prefix}:").partition(":")
        if queue in scenario.queues and name not in _LEFT_OUT:
            kind: Any = await redis.type(key)
            # A key may expire between two commands.
            if kind != "none":
                expires = await redis.pttl(key) >= 0
                found[f"{queue}/{name}"] = {
                    "type": kind,
                    "content": await _content(redis, key, kind),
                    **({"expires": True} if expires else {}),
                }
    return found


async def _content(redis: Redis, key: str, kind: str) -> Any:
    match kind:
        case "string":
            return await redis.get(key)
        case "hash":
            return await redis.hgetall(key)
        case "list":
            return await redis.lrange(key, 0, -1)
        case "set":
            return sorted(await redis.smembers(key))
        case "zset":
            return await redis.zrange(key, 0, -1, withscores=True)
        case "stream":
            entries: Any = await redis.xrange(key)
            return [fields for _, fields in entries]
    raise AssertionError(f"{key} is a {kind}")


class Comparable:
    """Makes what was read comparable; names are as short on both sides.

    Args:
        prefix: the side's key prefix, which is left out.
        scenario: its queue's name becomes `q`.
    """

    def __init__(self, prefix: str, scenario: Scenario) -> None:
        self._prefix = f"{prefix}:"
        self._scenario = scenario

    def all(self, found: Mapping[str, Json], facts: Json) -> Json:
        """Return facts and keys, each under a path of its own."""
        result: Json = {"facts": self.value(facts)}
        for name in sorted(found):
            queue, _, key = name.partition("/")
            content = found[name]["content"]
            if key == "events":
                result |= self._events(queue, content)
                continue
            shown = self._key(key, found[name]["type"], content)
            due = key.rpartition(":")[2]
            if key.startswith("repeat:") and due.isdigit() and "opts" in shown:
                _note_due(shown, int(due), content)
            if found[name].get("expires"):
                shown = {"expires": True, "content": shown}
            _put(result, f"{self.text(queue)}/{self.text(key)}", shown)
        return result

    def _key(self, key: str, kind: str, content: Any) -> Any:
        if key.endswith(":lock"):
            return "a token"
        if kind == "zset" and key in _BY_TIME:
            return sorted(self.text(member) for member, _ in content)
        if kind == "zset":
            return [[self.text(member), self.value(score)] for member, score in content]
        if kind == "hash" and "data" in content and "timestamp" in content:
            return self._job(content)
        if kind == "hash" and "offset" in content:
            # It comes from the moment of the start, unless the producer gives it.
            content = {**content, "offset": "some ms"}
        return self.value(content)

    def _job(self, fields: Mapping[str, str]) -> Json:
        job: Json = {}
        for name, text in fields.items():
            job[name] = self._field(name, text)
        if "stacktrace" in fields:
            reason = fields.get("failedReason", "")
            traces = _parsed(fields["stacktrace"])
            job["stacktrace"] = [f"a trace{' of it' * (reason in trace)}" for trace in traces]
        moments = [
            int(fields[name])
            for name in ("timestamp", "processedOn", "finishedOn")
            if fields.get(name, "").isdigit()
        ]
        job["times in order"] = moments == sorted(moments)
        return job

    def _field(self, name: str, text: str) -> Any:
        if name == "delay" and text.isdigit():
            return _rounded(int(text))
        value = _parsed(text) if name in _JSON_FIELDS else text
        if name == "opts" and isinstance(value, dict) and isinstance(value.get("repeat"), dict):
            repeat = value["repeat"]
            if "offset" in repeat:  # As that of a scheduler.
                value = {**value, "repeat": {**repeat, "offset": "some ms"}}
        return self.value(value)

    def _events(self, queue: str, events: list[dict[str, str]]) -> Json:
        """Return each job's events in their order, and the order in which jobs were picked up."""
        by_job: dict[str, list[Any]] = {}
        for fields in events:
            if fields["event"] == "drained":
                continue  # How often a queue runs empty depends on how fast jobs are added.
            rest = {
                name: self.value(_parsed(text) if name in ("returnvalue", "data") else text)
                for name, text in fields.items()
                if name not in ("event", "jobId")
            }
            by_job.setdefault(fields.get("jobId", "-"), []).append([fields["event"], rest])
        of = f"{self.text(queue)}/events"
        shown: Json = {}
        for job_id in sorted(by_job):
            _put(shown, f"{of}/{self.text(job_id)}", by_job[job_id])
        if self._scenario.queues[queue].get("concurrency", 1) == 1:
            shown[f"{of}/picked up"] = [
                self.text(fields["jobId"]) for fields in events if fields["event"] == "active"
            ]
        return shown

    def value(self, value: Any) -> Any:
        """Return a value of any type without its times."""
        if isinstance(value, Mapping):
            result: Json = {}
            for key, item in value.items():
                shown = "some ms" if key == "duration" else self.value(item)
                _put(result, self.text(str(key)), shown)
            return result
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return "<ms>" if int(value) in _MOMENTS else value
        return value

    def text(self, text: str) -> str:
        text = text.replace(self._prefix, "").replace(self._scenario.queue, "q")
        text = _DURATION.sub('"some ms"', text)
        return _MD5.sub("<md5>", _MOMENT.sub("<ms>", text))


def _note_due(job: Json, due: int, fields: Mapping[str, str]) -> None:
    """Replace the delay of a scheduler's iteration, which ends at the time in its id."""
    added = int(fields["timestamp"])
    for holder in (job, job["opts"]):
        delay = holder.get("delay")
        if isinstance(delay, int) and delay > 0 and abs(added + delay - due) < _NEAR:
            holder["delay"] = "until it is due"


def _put(target: Json, name: str, value: Any) -> None:
    """Set a key; the ids of a scheduler's iterations differ in their times only."""
    number, free = 1, name
    while free in target:
        number += 1
        free = f"{name} #{number}"
    target[free] = value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _rounded(ms: int) -> int | str:
    return "<ms>" if ms in _MOMENTS else round(ms / _DELAY_STEP) * _DELAY_STEP
