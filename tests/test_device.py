"""The tests of `device` on the pretended device, in a process of their own: one line here for each function there.

Where torch knows of a device, autograd starts threads for it, with which the tests that fork do not go together.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
FUNCTIONS = [
    f"{path.stem}::{name}"
    for path in sorted((HERE / "device").glob("test_*.py"))
    for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What was wrong with each function's cases: nothing, where all have passed."""
    report = tmp_path_factory.mktemp("device") / "report.xml"
    options = ["--confcutdir=tests/device", "-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, "tests/device"],
        cwd=HERE.parent,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")},
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout[-4000:] + done.stderr[-4000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        key = f"{case.get('classname').rpartition('.')[2]}::{case.get('name').partition('[')[0]}"
        wrong = [f"{case.get('name')}: {part.tag} {part.text or part.get('message')}" for part in case]
        found.setdefault(key, []).extend(wrong)
    return found


@pytest.mark.parametrize("function", FUNCTIONS)
def test_on_the_device(outcomes, function):
    wrong = outcomes[function]
    if wrong and all(": skipped " in one for one in wrong):
        pytest.skip(wrong[0])
    assert not wrong, "\n".join(wrong)
