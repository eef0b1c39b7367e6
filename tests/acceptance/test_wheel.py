"""The wheel holds what an installed package needs."""

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support.readme import REPOSITORY

NEEDED = {
    "autoflow_worker/py.typed",
    "autoflow_worker/recording/schema.sql",
    "autoflow_worker/_demo/examples/tasks_config.py",
    # pytest imports it wherever the package is installed, so without it no test would run there.
    "autoflow_worker_pytest.py",
}


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        names = set(wheel.namelist())
    assert names >= NEEDED
    tops = {name.partition("/")[0].partition("-")[0] for name in names}
    assert tops == {"autoflow_worker", "autoflow_worker_pytest.py"}
