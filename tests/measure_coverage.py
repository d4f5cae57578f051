#!/usr/bin/env python3
"""Runs the tests, and says which lines and branches of wsqueue.py none of them has reached.

    python tests/measure_coverage.py [--fail-under 97] [PYTEST ARGUMENTS]

Without arguments, the whole suite. Counted is what runs in the test process, and in every Python process that a test
starts: servers, producers, examples, workers, forked children. What ends by kill -9 takes what it knows with it; and
what is started without site-packages (python -S), or with an environment of its own, is not seen.

Ends with status 1 if less than --fail-under percent of lines and branches together were reached. A test that fails
does not change that: tests/run is who judges them, and those that look at what a process has imported, or fill its
disk, find the measurement there. What is left out, and why, stands beside each `pragma: no` in wsqueue.py.

Needs Python 3.9, and the packages that the tests need.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Sequence

import coverage

HERE = Path(__file__).resolve().parent
WSQUEUE = HERE.parent / "wsqueue.py"
CONFIG = HERE / "coverage.ini"
PYTEST = ("pytest", "-c", HERE / "pytest.ini", "--rootdir", HERE.parent)
WHOLE_SUITE = ("-n", "2", "--dist", "loadfile", HERE)


def run_tests(data: Path, args: Sequence[str]) -> None:
    """Each process leaves a file beside data when it ends."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    env.setdefault("WSQUEUE_TIME_UNIT", "3")  # what is measured is slower
    command = [sys.executable, "-m", "coverage", "run", "--rcfile", CONFIG, "--data-file", data, "-m", *PYTEST, *args]
    subprocess.run(list(map(str, command)), env=env, check=False)


def combine(data: Path) -> coverage.Coverage:
    """What all processes have seen, wherever the copy lay that they ran."""
    combined = coverage.CoverageData(str(data))
    for path in data.parent.glob(f"{data.name}.*"):
        part = coverage.CoverageData(str(path))
        try:
            part.read()
            combined.update(part, map_path=lambda _: str(WSQUEUE))
        except coverage.exceptions.CoverageException as error:  # killed while it wrote
            print(f"measure_coverage: left out: {error}", file=sys.stderr)
    result = coverage.Coverage(data_file=str(data), config_file=str(CONFIG))
    result.load()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fail-under", type=float, default=97.0, metavar="PERCENT")
    options, args = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="wsqueue-coverage-") as directory:
        os.chmod(directory, 0o1777)  # some servers run as another user
        data = Path(directory, "data")
        run_tests(data, args or WHOLE_SUITE)
        percent = combine(data).report(morfs=[str(WSQUEUE)])
    return 0 if percent >= options.fail_under else 1


if __name__ == "__main__":
    sys.exit(main())
