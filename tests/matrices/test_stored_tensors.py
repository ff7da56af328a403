"""Names: wrappers' prefixes go, a model's own names stay, and no tensor is lost to another of its name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import htsr
from htsr.matrices.sharded import open_live
from htsr.matrices.stored_tensors import WRAPPERS, base_names, clean_names


@pytest.mark.parametrize(
    ("stored", "clean"),
    [
        (["module.a.weight", "module.b.weight"], ["a.weight", "b.weight"]),  # DDP
        (["module.a.weight", "n_averaged"], ["a.weight", "n_averaged"]),  # torch.optim.swa_utils.AveragedModel
        (["_orig_mod.module.a.weight"], ["a.weight"]),
        (["module._orig_mod.a.weight"], ["a.weight"]),
        (["module.module.a.weight"], ["a.weight"]),
        (["_forward_module.a.weight", "_forward_module.b.weight"], ["a.weight", "b.weight"]),  # Lightning Fabric
        (["layers.0._fsdp_wrapped_module.a.weight"], ["layers.0.a.weight"]),
        (["layers.0._checkpoint_wrapped_module.a.weight"], ["layers.0.a.weight"]),
        (["module.weight", "head.weight"], ["module.weight", "head.weight"]),  # a model's own attribute
        (["rnns.0.module.weight", "rnns.0.weight"], ["rnns.0.module.weight", "rnns.0.weight"]),  # AWD-LSTM
        (["module.lin.weight", "lin.weight"], ["module.lin.weight", "lin.weight"]),
        (["a._orig_mod.weight", "a.weight"], ["a._orig_mod.weight", "a.weight"]),
        (["weight", "bias"], ["weight", "bias"]),
    ],
)
def test_wrappers_of_a_whole_model(stored, clean):
    assert list(clean_names(stored).values()) == clean


parts = st.sampled_from([*(wrapper[:-1] for wrapper in WRAPPERS), "base_model.model", "a", "b", "weight"])


@given(st.sets(st.lists(parts, min_size=1, max_size=5).map(".".join), max_size=8))
@example({"_orig_mod._orig_mod._orig_mod.module", "_orig_mod.module", "module"})
@example({"base_model.model.base_model.model.a", "base_model.model.a", "a"})
def test_no_two_names_become_one(names):
    for clean in (clean_names, base_names):
        found = clean(names)
        assert found.keys() == names
        assert len(set(found.values())) == len(names)


COLLIDING = {
    "module.lin.weight": torch.full((4, 6), 1.0),
    "lin.weight": torch.full((4, 6), 2.0),
    "lin_weight": torch.full((4, 6), 3.0),
}


@pytest.mark.parametrize("source", ["state dict", "safetensors", "pt", "module"])
def test_tensors_of_nearly_one_name_are_all_there(tmp_path, source):
    file = tmp_path / f"model.{source}"
    model = SimpleNamespace()
    if source == "module":
        model = nn.Module()
        model.module = nn.Module()
        model.module.lin, model.lin = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
        model.lin_weight = nn.Parameter(COLLIDING["lin_weight"])
        model.load_state_dict(COLLIDING)
    elif source == "safetensors":
        save_file(COLLIDING, file)
    elif source == "pt":
        torch.save(COLLIDING, file)
    opened = {"state dict": COLLIDING, "module": model}.get(source, file)
    found = {m.name: float(m.read()[0, 0]) for m in htsr.describe(opened)}
    assert found == {"module.lin": 1.0, "lin": 2.0, "lin_weight": 3.0}
    if source == "module":
        assert len(open_live(model).matrices) == 3
        optimizer = htsr.layerwise(torch.optim.SGD(model.parameters(), lr=1.0), model, score=None, pin={"lin": 3.0})
        model.lin.weight.sum().backward()
        optimizer.step()
        (pinned,) = [group for group in optimizer.param_groups if group["multiplier"] == 3.0]
        assert pinned["params"] == [model.lin.weight]


def test_a_wrapped_model_has_the_names_of_the_plain_one():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5))
    names = [m.name for m in htsr.describe(model)]
    for wrapped in (nn.DataParallel(model), torch.optim.swa_utils.AveragedModel(model), torch.compile(model)):
        assert [m.name for m in htsr.describe(wrapped)] == names
        assert [m.name for m in htsr.describe(wrapped.state_dict())] == names
