"""The tests of `device` on the pretended device, in a process of their own.

Where torch knows of a device, autograd starts threads for it, with which the tests that fork do not go together.
"""

import os
import subprocess
import sys
from pathlib import Path


def test_all_of_device():
    options = ["-q", "--confcutdir=tests/device", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/device"],
        cwd=Path(__file__).parent.parent,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]
