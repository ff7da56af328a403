"""Steps and models that torch.compile traces.

CI runs this file by itself, where nothing counts lines: SlipCover writes calls into the bytecode, which torch.compile
does not take.
"""

import pytest
import torch

import htsr
from tests.training.models import TinyLM, loss
from tests.training.runs import batches
from tests.transformer import llama

COUNTED = any(callable(constant) for constant in htsr.layerwise.__code__.co_consts)
pytestmark = pytest.mark.skipif(COUNTED, reason="the lines of htsr are counted in its bytecode")
LR = 2e-3


def test_compiled_step_of_groups_that_are_stepped_together():
    """torch's own step is compiled, and moves the weights alike."""
    runs = []
    for compiled in (False, True):
        model = TinyLM()
        optimizer = htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=LR, fused=True), model, interval=None)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for i in range(2):
            optimizer.zero_grad()
            loss(model, i).backward()
            step()
        assert optimizer.param_groups[0]["htsr_step"] == 2
        runs.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-3 * LR)


@pytest.mark.parametrize("wrap", [True, False], ids=["torch.compile", "Module.compile"])
def test_a_streamed_model_that_is_compiled_later_is_refused(wrap):
    model = llama(5)
    htsr.stream_frozen(model, htsr.LayerSampler(model, active=1))
    called = torch.compile(model, backend="eager") if wrap else model
    if not wrap:
        model.compile(backend="eager")
    with pytest.raises(htsr.UsageError, match="cannot be compiled"):
        called(input_ids=batches(1)[0])
    torch._dynamo.reset()
