"""A handler without `async`. It runs in a thread, so it does not block other jobs."""

import hashlib
import time
from dataclasses import dataclass

from autoflow_worker import TaskContext, TaskOptions, define_task


@dataclass
class File:
    name: str
    size: int


def checksum_file(payload: File, ctx: TaskContext) -> str:
    time.sleep(0.05)  # a slow disk
    digest = hashlib.sha256()
    for _ in range(0, payload.size, 65_536):
        digest.update(bytes(65_536))
    return digest.hexdigest()


checksum_file_task = define_task("files-checksum", checksum_file, TaskOptions(concurrency=4))
