"""The device that these tests run on: `--device cuda`, or a pretended one where there is none.

This folder needs nothing of the others: with torch, transformers, accelerate, peft and pytest alone it runs by

    python -m pytest --confcutdir=tests/device tests/device --device cuda
"""

import contextlib
import gc
import warnings

import pytest
import torch

from . import pretended


def pytest_addoption(parser):
    parser.addoption(
        "--device", default=pretended.NAME, help="device of the tests in tests/device: cuda, xpu, pretended"
    )


def pytest_collection_modifyitems(config):
    """Make the pretended device known before any test: autograd counts devices at the first backward of a process."""
    if config.getoption("--device", pretended.NAME) == pretended.NAME:
        with contextlib.suppress(ImportError, AttributeError):  # the fixture says so
            pretended.install()


@pytest.fixture(autouse=True, scope="module")
def _imports_are_no_garbage():
    """As in tests/conftest.py: accelerate collects garbage three times a training."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def device(request):
    """The accelerator: the process has one within the test."""
    name = request.config.getoption("--device", pretended.NAME)
    if name != pretended.NAME:
        yield torch.device(name, 0)
        return
    try:
        pretended.install()
    except (ImportError, AttributeError) as why:
        pytest.skip(f"this torch cannot make a device in Python ({why})")
    with pretended.switched_on() as found:
        yield found


@pytest.fixture
def synchronisations(device):
    """`with synchronisations() as counted: ...`, and afterwards `counted.names`: what waited for the device, in order.

    `counted.count` is their number. It is None on a real device, where libraries wait by themselves; CUDA names what
    torch waits for, so that where nothing should wait, `not counted.names` is asked of it as well.
    """
    if device.type == pretended.NAME:
        return pretended.synchronisations
    return _warned_of if device.type == "cuda" else lambda: contextlib.nullcontext(_Uncounted())


@pytest.fixture
def memory(device):
    """`with memory() as used: ...`, then `used.peak` and `used.now`: bytes on the device of what was made within."""
    return pretended.memory if device.type == pretended.NAME else lambda: contextlib.nullcontext(_Unmetered(device))


@pytest.fixture
def at_place(device, monkeypatch):
    """Accelerate, which decides once in a process where to train, decides anew."""

    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset(place):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state() if hasattr(state, "_reset_state") else state._shared_state.clear()
        if place == "cpu":
            monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
        else:
            monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(place))

    yield reset
    reset("cpu")


class _Uncounted:
    count, names = None, ()


@contextlib.contextmanager
def _warned_of():
    counted, before = _Uncounted(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counted
        finally:
            torch.cuda.set_sync_debug_mode(before)
    counted.names = [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing CUDA operation" in str(w.message)]


class _Unmetered:
    """The same numbers of a real device."""

    def __init__(self, device):
        self._device = device
        gc.collect()
        torch.accelerator.reset_peak_memory_stats(device)
        self._before = self.now_at_all

    @property
    def now_at_all(self):
        return torch.accelerator.memory_allocated(self._device)

    @property
    def now(self):
        return self.now_at_all - self._before

    @property
    def peak(self):
        return torch.accelerator.max_memory_allocated(self._device) - self._before
