import difflib

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
