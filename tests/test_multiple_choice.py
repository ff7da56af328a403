import pytest

import htsr
from htsr.multiple_choice import multiple_choice_accuracy


def test_no_questions_have_no_accuracy():
    with pytest.raises(htsr.UsageError, match="no multiple-choice questions"):
        multiple_choice_accuracy(None, None, [])
