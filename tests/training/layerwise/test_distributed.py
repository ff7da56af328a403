"""Two gloo processes: the same multipliers on both, each decomposing its share, and equal to one process, bit for bit.

Both ranks see the same batch, so that the mean of their gradients is the gradient of one process exactly.
"""

import pytest
import torch
from torch import distributed

import htsr
from htsr.training.layerwise import live_scores
from tests.processes import in_two_processes, leave_with, one_thread
from tests.training.models import MATRICES, SpyingAdamW, TinyLM, train

STEPS = 7


def run(wrap=lambda model: model):
    model = TinyLM()
    wrapped = wrap(model)
    optimizer = SpyingAdamW(model.parameters(), lr=3e-3)
    htsr.layerwise(optimizer, wrapped, interval=3, ramp=2)
    train(wrapped, optimizer, range(STEPS))
    return [{name: lr for name, (lr, _) in seen.items()} for seen in optimizer.seen]


def _data_parallel(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def _sharded(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _tensor_parallel(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        parallelize_module(layer, mesh, {"mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()})
    return model


def _worker(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    decomposed = []
    inner = live_scores.scores
    live_scores.scores = lambda matrices, policy: decomposed.extend(m.name for m in matrices) or inner(matrices, policy)
    results = {}
    for kind, wrap in {"ddp": _data_parallel, "fsdp2": _sharded, "tp": _tensor_parallel}.items():
        decomposed.clear()
        results[kind] = {"rates": run(wrap), "decomposed": list(decomposed)}
    results["failing"] = _run_that_fails_on_one_rank(rank)
    leave_with(results, rank, folder)


def _run_that_fails_on_one_rank(rank):
    """The second rank has no memory left at the second event."""
    events, inner, decompose = [], live_scores.scores, live_scores.esd_batch

    def out_of_memory(*args, **kwargs):
        if rank == 1 and len(events) == 2:
            raise torch.OutOfMemoryError("no memory")
        return decompose(*args, **kwargs)

    live_scores.scores = lambda matrices, policy: events.append(0) or inner(matrices, policy)
    live_scores.esd_batch = out_of_memory
    model = TinyLM()
    optimizer = SpyingAdamW(_data_parallel(model).parameters(), lr=3e-3)
    htsr.layerwise(optimizer, model, interval=3, ramp=0)
    status = []
    train(
        model,
        optimizer,
        range(STEPS),
        after=lambda _: status.append({g["name"]: g["status"] for g in optimizer.param_groups}),
    )
    return {"rates": [{n: lr for n, (lr, _) in seen.items()} for seen in optimizer.seen], "status": status}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return in_two_processes(_worker, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    with one_thread():
        return run()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_agree_with_each_other_and_with_one_process(two_processes, alone, kind):
    first, second = (result[kind] for result in two_processes)
    assert first["rates"] == second["rates"] == alone
    assert alone[0] != alone[-1]


def test_tensor_parallel_ranks_agree_with_one_process(two_processes, alone):
    first, second = (result["tp"]["rates"] for result in two_processes)
    assert first == second
    for mine, expected in zip(first, alone, strict=True):
        assert mine == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp"])
def test_each_matrix_is_decomposed_once(two_processes, kind):
    first, second = (result[kind]["decomposed"] for result in two_processes)
    events = 3
    assert sorted(first + second) == sorted(MATRICES * events)
    assert len(first) == len(second)


def test_an_event_that_fails_on_one_rank_ends_no_training(two_processes):
    """Its matrices keep their multipliers, on both ranks, until the next event."""
    first, second = (result["failing"] for result in two_processes)
    assert first == second
    kept = [name for name, status in first["status"][2].items() if "no memory" in status]
    assert 0 < len(kept) < len(MATRICES)
    rates, moved = first["rates"], set(MATRICES) - set(kept)
    assert all(rates[2][name] == rates[1][name] for name in kept)
    assert any(rates[2][name] != rates[1][name] for name in moved)
    assert any(rates[5][name] != rates[4][name] for name in kept)
    assert set(first["status"][5].values()) == {"ok"}
