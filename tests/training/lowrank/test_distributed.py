"""Two gloo processes end with the weights of one that sees both halves of the batch."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from htsr.training.lowrank.groups import low_rank_groups
from htsr.training.lowrank.optimizer import LowRankAdamW
from htsr.training.lowrank.released import ReleasedGradient
from htsr.training.lowrank.rounding import ROUNDINGS, axis_keys, entry_noise
from tests.processes import leave
from tests.training.lowrank.test_optimizer import batch, loss_of, make

STEPS = 5
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "refresh_every": 2, "moments": "rotate"}
CHANNEL = {"scaled_by": "channel", "method": "random", "moments": "keep"}
TENSOR = CHANNEL | {"scaled_by": "tensor"}


def train(model, optimizer, data, clip):
    """On data(step) of every step, with the gradient clipped to a norm of `clip` unless that is None."""
    for step in range(STEPS):
        loss_of(model, data(step)).backward()
        if clip:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()


def alone(clip, experts=0, **options):
    model = make(dtype=torch.float64, experts=experts)
    optimizer = LowRankAdamW(low_rank_groups(model, 4), **OPTIONS | options)
    train(model, optimizer, batch, clip)
    return {name: value.detach() for name, value in model.state_dict().items()}


def _worker(rank, task, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    task(rank)
    leave()


def both(task, folder):
    folder.mkdir(exist_ok=True)
    mp.start_processes(_worker, (task, str(folder / "rendezvous")), nprocs=2, start_method="fork")


def half(step, rank):
    return batch(step).chunk(2)[rank]


def check(state, clip, **options):
    expected = alone(clip, **options)
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name.removeprefix("module.")], rtol=1e-8, atol=1e-9)


def ddp(rank, clip, **options):
    model = torch.nn.parallel.DistributedDataParallel(make(dtype=torch.float64))
    optimizer = LowRankAdamW(low_rank_groups(model, 4), **OPTIONS | options)
    train(model, optimizer, functools.partial(half, rank=rank), clip)
    check(model.state_dict(), clip, **options)


def released(rank, mode, **options):
    model = torch.nn.parallel.DistributedDataParallel(make(dtype=torch.float64))
    options = OPTIONS | options
    optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients=mode, process_group=dist.group.WORLD, **options)
    for step in range(STEPS):
        with model.no_sync():
            loss_of(model, half(step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    if mode == "update":
        check(model.state_dict(), None, **options)
    sizes = [torch.empty_like(p) for p in model.parameters()]
    for mine, other in zip(model.parameters(), sizes, strict=True):
        other.copy_(mine.detach())
        dist.broadcast(other, 0)
        assert torch.equal(mine, other)


def taken_back(rank):
    from htsr.errors import UsageError

    model = torch.nn.parallel.DistributedDataParallel(make())
    optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients="project")
    with pytest.raises(UsageError, match="no_sync"):
        loss_of(model, half(0, rank)).backward()
    assert optimizer.state  # it was projected, and then DDP asked for it


def noise_of_shards(rank):
    """Each process makes its part of the noise that one process makes of the whole, on meshes of one and two axes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for sizes, placements in (
        ((2,), [Shard(0)]),
        ((2,), [Shard(1)]),
        ((2,), [Replicate()]),
        ((2, 1), [Shard(1), Shard(0)]),
        ((1, 2), [Shard(0), Shard(0)]),
        ((1, 2), [Replicate(), Shard(1)]),
    ):
        mesh = init_device_mesh("cpu", sizes)
        for shape in ((7, 5), (3, 4, 6), (1, 1)):
            whole = entry_noise(axis_keys(torch.empty(shape), seed=9))
            shard = distribute_tensor(torch.empty(shape), mesh, placements)
            expected = distribute_tensor(whole, mesh, placements).to_local()
            assert torch.equal(entry_noise(axis_keys(shard, seed=9)), expected)


def narrow_shards(rank):
    """Weights in bfloat16, split by rows and by columns, and copies end as the whole, bit for bit, by each rounding."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))

    def end(place, rounding):
        torch.manual_seed(0)
        W = torch.nn.Parameter(place(torch.randn(7, 5, dtype=torch.bfloat16)))
        optimizer = LowRankAdamW([W], lr=1e-3, weight_decay=0.1, rounding=rounding)
        for _ in range(STEPS):
            W.grad = place(torch.randn(7, 5, dtype=torch.bfloat16))
            optimizer.step()
        return W.detach(), optimizer.state[W]

    for rounding in ROUNDINGS:
        whole, state = end(torch.clone, rounding)
        for placement in (Shard(0), Shard(1), Replicate()):
            shard, own = end(functools.partial(distribute_tensor, device_mesh=mesh, placements=[placement]), rounding)
            assert torch.equal(shard.full_tensor(), whole)
            for name in {"master", "compensation"} & set(state):
                assert own[name].placements == shard.placements
                assert torch.equal(own[name].full_tensor(), state[name])


def fsdp(rank, mode, clip, experts=0, **options):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def start():
        model = make(dtype=torch.float64, experts=experts)
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, LowRankAdamW(low_rank_groups(model, 4), gradients=mode, **OPTIONS | options)

    model, optimizer = start()
    for step in range(STEPS):
        if step == 3:  # save whole, begin anew, load
            whole = StateDictOptions(full_state_dict=True)
            weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
            saved = get_optimizer_state_dict(model, optimizer, options=whole)
            model, optimizer = start()
            for name, value in model.state_dict().items():
                value.copy_(torch.distributed.tensor.distribute_tensor(weights[name], mesh, value.placements))
            ranks = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_optimizer_state_dict(model, optimizer, saved if rank == 0 else {}, options=ranks)
        loss_of(model, half(step, rank)).backward()
        if mode != "keep":
            assert all(isinstance(p.grad, ReleasedGradient) for p in optimizer.param_groups[0]["params"])
        if clip and mode == "project":
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        elif clip:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
    q = model.layers[0].mlp["down_proj"].weight
    assert optimizer.state[q]["exp_avg"].to_local().numel() <= 4 * 48
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    check(whole, clip, experts=experts, **options)


def tensor_parallel(rank, mode, clip, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    model = make(dtype=torch.float64)
    plan = {
        "self_attn.q_proj": ColwiseParallel(output_layouts=Replicate()),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for block in model.layers:
        parallelize_module(block, mesh, plan)
    optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients=mode, **OPTIONS | options)
    train(model, optimizer, batch, clip)
    whole = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in model.state_dict().items()}
    check(whole, clip, **options)


@pytest.mark.parametrize(("method", "clip"), [("svd", None), ("randomized", 0.05)])
def test_ddp(tmp_path, method, clip):
    both(functools.partial(ddp, method=method, clip=clip), tmp_path)


@pytest.mark.parametrize("mode", ["project", "update"])
def test_copies_of_a_model_without_ddps_averages(tmp_path, mode):
    both(functools.partial(released, mode=mode), tmp_path)


def test_gradients_that_ddp_writes_back_are_an_error(tmp_path):
    both(taken_back, tmp_path)


def test_shards_and_replicas_round_as_the_whole(tmp_path):
    both(noise_of_shards, tmp_path)
    both(narrow_shards, tmp_path / "narrow")


@pytest.mark.parametrize(
    ("mode", "method", "clip"), [("keep", "svd", 0.05), ("project", "randomized", 0.05), ("update", "randomized", None)]
)
def test_fsdp(tmp_path, mode, method, clip):
    both(functools.partial(fsdp, mode=mode, method=method, clip=clip), tmp_path)


@pytest.mark.parametrize("experts", [2, 3])
def test_fsdp_with_stacked_experts(tmp_path, experts):
    """Two experts are one for each rank, of three one rank has two."""
    both(functools.partial(fsdp, mode="keep", method="randomized", clip=0.05, experts=experts), tmp_path)


@pytest.mark.parametrize(
    ("method", "mode", "clip"), [("svd", "keep", 0.05), ("randomized", "project", 0.05), ("randomized", "update", None)]
)
def test_tensor_parallel(tmp_path, method, mode, clip):
    both(functools.partial(tensor_parallel, method=method, mode=mode, clip=clip), tmp_path)


def scaled(rank):
    """Copies under DDP and without it, shards of stacks and of either side of matrices."""
    ddp(rank, 0.05, **CHANNEL)
    released(rank, "update", **TENSOR)
    fsdp(rank, "keep", 0.05, experts=3, **CHANNEL)
    tensor_parallel(rank, "update", None, **TENSOR)


def test_gradients_that_are_scaled(tmp_path):
    both(scaled, tmp_path)
