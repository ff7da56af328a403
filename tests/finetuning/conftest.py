import pytest


@pytest.fixture(autouse=True)
def unpredicted(request, monkeypatch):
    """A run ends with a prediction of its memory, half a second for the smallest model: one test looks at it."""
    if "report_of_a_run" not in request.node.name:
        monkeypatch.setattr("htsr.finetuning.memory.predicted_mib", lambda *_: None)
