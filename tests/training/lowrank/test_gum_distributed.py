"""GUM in two gloo processes ends with the weights of one that sees both halves of the batch."""

import functools

import pytest
import torch

from htsr.training.lowrank.gum import GUM
from htsr.training.lowrank.gum_groups import gum_groups
from tests.training.lowrank.test_distributed import STEPS, both, half
from tests.training.lowrank.test_optimizer import batch, loss_of, make

OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "refresh_every": 2, "active": 1, "seed": 1}


def train(model, optimizer, data, steps=range(STEPS)):
    for step in steps:
        loss_of(model, data(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def check(state, base):
    model = make(dtype=torch.float64, blocks=3, experts=2)
    train(model, GUM(gum_groups(model, 4, strategy="increase"), base=base, **OPTIONS), batch)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-8, atol=1e-9)


def ddp(rank, base):
    model = torch.nn.parallel.DistributedDataParallel(make(dtype=torch.float64, blocks=3, experts=2))
    optimizer = GUM(gum_groups(model, 4, strategy="increase"), base=base, **OPTIONS)
    train(model, optimizer, functools.partial(half, rank=rank))
    check(model.module.state_dict(), base)


def fsdp(rank, base, mode, at):
    """Saved whole after `at` steps, of which 2 end a period; begun anew; loaded."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (2,))

    def start():
        model = make(dtype=torch.float64, blocks=3, experts=2)
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, GUM(gum_groups(model, 4, strategy="increase"), base=base, gradients=mode, **OPTIONS)

    data = functools.partial(half, rank=rank)
    model, optimizer = start()
    train(model, optimizer, data, range(at))
    whole = StateDictOptions(full_state_dict=True)
    weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
    saved = get_optimizer_state_dict(model, optimizer, options=whole)
    model, optimizer = start()
    for name, value in model.state_dict().items():
        value.copy_(distribute_tensor(weights[name], mesh, value.placements))
    optimizer.before_loading(at)
    ranks = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer, saved if rank == 0 else {}, options=ranks)
    train(model, optimizer, data, range(at, STEPS))
    check({name: value.full_tensor() for name, value in model.state_dict().items()}, base)


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_ddp(tmp_path, base):
    both(functools.partial(ddp, base=base), tmp_path)


@pytest.mark.parametrize(("base", "mode", "at"), [("adamw", "update", 2), ("muon", "keep", 3), ("muon", "project", 3)])
def test_fsdp(tmp_path, base, mode, at):
    both(functools.partial(fsdp, base=base, mode=mode, at=at), tmp_path)
