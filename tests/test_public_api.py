import difflib
import re
from pathlib import Path

import pytest

from tests.public_api import LIST, public_api


def test_nothing_public_has_changed_unnoticed():
    agreed, found = LIST.read_text(), public_api()
    if agreed != found:
        difference = "\n".join(
            difflib.unified_diff(agreed.splitlines(), found.splitlines(), LIST.name, "now", n=0, lineterm="")
        )
        pytest.fail(
            f"the public API has changed; if that is meant, run `python -m tests.public_api`, commit {LIST.name} and "
            f"say it in CHANGELOG.md\n{difference}",
            pytrace=False,
        )


@pytest.mark.parametrize("path", ["README.md", "reports/documentation/pages/**/*.md", "tests/examples/*.py"])
def test_what_users_copy_names_no_private_module(path):
    files = sorted(Path(__file__).parents[1].glob(path))
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        private = re.findall(r"^ *(?:from|import) (htsr\.(?!finetune\b)\w+.*)", text, re.MULTILINE)
        assert not private, f"{file.name}: {private[0]}"
