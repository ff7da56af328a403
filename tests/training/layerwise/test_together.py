"""One step for all groups: the bits of torch's step group by group, and torch's own step where it has to be."""

import sys

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import htsr
from htsr.training.layerwise import together
from tests.training.models import TinyLM, decay_groups, loss, train


class GroupByGroupAdam(torch.optim.Adam):
    """What is not torch's own class makes torch's own step."""


class GroupByGroupAdamW(torch.optim.AdamW):
    pass


CLASSES = {"Adam": (torch.optim.Adam, GroupByGroupAdam), "AdamW": (torch.optim.AdamW, GroupByGroupAdamW)}
POLICY = {"interval": 3, "ramp": 2, "total_steps": 20}


@pytest.fixture
def torch_steps(monkeypatch):
    """How often torch itself has stepped a group."""
    module, calls = sys.modules["torch.optim.adam"], []
    adam = module.adam
    monkeypatch.setattr(module, "adam", lambda *args, **how: (calls.append(1), adam(*args, **how)))
    return calls


def run(kind, model, steps=range(7), policy="llr", groups=None, **options):
    optimizer = kind(decay_groups(model) if groups is None else groups, lr=3e-3, **options)
    htsr.layerwise(optimizer, model, policy, **POLICY)
    train(model, optimizer, steps)
    return optimizer


def assert_same_bits(first, second):
    """Weights and states of two runs (model, optimizer)."""
    for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(p, q)
        assert first[1].state[p].keys() == second[1].state[q].keys()
        for name, value in first[1].state[p].items():
            other = second[1].state[q][name]
            assert torch.equal(value, other)
            assert (value.dtype, value.device) == (other.dtype, other.device)


@pytest.mark.parametrize("policy", ["llr", "alphadecay"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True, "betas": [0.5, 0.9]}], ids=str)
@pytest.mark.parametrize("how", ["fused", "foreach"])
@pytest.mark.parametrize("name", CLASSES)
def test_steps_as_torch_does_group_by_group(torch_steps, monkeypatch, name, how, options, policy):
    monkeypatch.setattr(together, "_PIECE", 5000)  # some pieces of several matrices, the embedding one of its own
    runs = []
    for kind in CLASSES[name]:
        model = TinyLM()
        runs.append((model, run(kind, model, policy=policy, **{how: True}, **options)))
        if kind is CLASSES[name][0]:
            assert not torch_steps
    assert len(set(htsr.multipliers(runs[0][1]).values())) > 5
    assert_same_bits(*runs)


@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_what_has_no_gradient_or_another_dtype_or_other_options(how):
    """Frozen parameters, weights of two dtypes, and groups of two kinds of betas; one of them comes late."""
    runs = []
    for kind in CLASSES["AdamW"]:
        model = TinyLM()
        model.lm_head.double()
        model.norm.double()
        for block in model.layers:
            block.register_forward_hook(lambda _module, _args, out: out.float())
        model.norm.register_forward_pre_hook(lambda _module, args: (args[0].double(),))
        model.layers[0].self_attn["q_proj"].weight.requires_grad_(False)
        body = [p for p in model.parameters() if p.dtype == torch.float32]
        groups = [{"params": body}, {"params": [model.lm_head.weight, *model.norm.parameters()], "betas": (0.6, 0.7)}]
        optimizer = run(kind, model, range(3), groups=groups, **{how: True})
        model.layers[0].self_attn["q_proj"].weight.requires_grad_(True)
        train(model, optimizer, range(3, 6))
        runs.append((model, optimizer))
    assert_same_bits(*runs)
    model, optimizer = runs[0]
    late = optimizer.state[model.layers[0].self_attn["q_proj"].weight]["step"]
    assert (late, optimizer.state[model.lm_head.weight]["step"]) == (3, 6)


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True, "lr": torch.tensor(3e-3)}], ids=str)
def test_torch_steps_where_it_has_to(torch_steps, options):
    model = TinyLM()
    optimizer = htsr.layerwise(torch.optim.AdamW(model.parameters(), **options), model, **POLICY)
    train(model, optimizer, [0])
    assert len(torch_steps) == len(optimizer.param_groups)


def test_a_scaler_that_finds_an_overflow():
    """The fused step is skipped inside its kernel, and the count taken back."""
    runs = []
    for kind in CLASSES["AdamW"]:
        model = TinyLM()
        optimizer = htsr.layerwise(kind(decay_groups(model), lr=3e-3, fused=True), model, **POLICY)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale(loss(model, step)).backward()
            if step in (0, 3):
                model.lm_head.weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        runs.append((model, optimizer))
    assert_same_bits(*runs)
    assert {int(state["step"]) for state in runs[0][1].state.values()} == {3}


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_shards_of_fsdp2(one_process, how):
    runs = []
    for kind in CLASSES["AdamW"]:
        model = TinyLM()
        for module in (*model.layers, model):
            fully_shard(module, mesh=one_process)
        optimizer = run(kind, model, range(4), **{how: True})
        assert all(isinstance(p, DTensor) for p in model.parameters())
        runs.append((model, optimizer))
    assert_same_bits(*runs)


def test_no_gradient_at_all():
    model = TinyLM()
    for how in ("fused", "foreach"):
        optimizer = htsr.layerwise(torch.optim.AdamW(model.parameters(), **{how: True}), model, **POLICY)
        optimizer.step()
        assert not any(optimizer.state.values())


def test_complex_parameters_are_torchs(torch_steps):
    model = torch.nn.Sequential(torch.nn.Linear(60, 60), torch.nn.Linear(60, 60))
    model.phases = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = htsr.layerwise(torch.optim.AdamW(model.parameters(), foreach=True), model, **POLICY)
    (model(torch.randn(4, 60)).sum() + model.phases.sum().real).backward()
    optimizer.step()
    assert len(torch_steps) == len(optimizer.param_groups)


def test_closures_and_sparse_gradients():
    model = TinyLM()
    optimizer = htsr.layerwise(torch.optim.AdamW(model.parameters(), fused=True), model, **POLICY)

    def closure():
        value = loss(model, 0)
        value.backward()
        return value

    assert optimizer.step(closure) == loss(TinyLM(), 0)
    model.embed_tokens.weight.grad = model.embed_tokens.weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
