"""Two gloo processes: the same multipliers on both, each decomposing its share, and equal to one process, bit for bit.

Both ranks see the same batch, so that the mean of their gradients is the gradient of one process exactly.
"""

import pytest
import torch
from torch import distributed

import htsr
from htsr import meeting
from htsr.training.layerwise import live_scores
from tests.processes import in_two_processes, leave_with, one_thread
from tests.training.models import INNER, MATRICES, WIDTH, SpyingAdamW, TinyLM, train

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
    live_scores.scores = lambda matrices, *how: decomposed.extend(m.name for m in matrices) or inner(matrices, *how)
    results = {}
    for kind, wrap in {"ddp": _data_parallel, "fsdp2": _sharded, "tp": _tensor_parallel}.items():
        decomposed.clear()
        results[kind] = {"rates": run(wrap), "decomposed": list(decomposed)}
    results["failing"] = _run_that_fails_on_one_rank(rank)
    live_scores.scores = inner
    results["no_room"] = _run_without_room_on_one_rank(rank)
    results["alone"] = _layerwise_on_one_rank(rank)
    results["refused"] = _trained_unlike(rank)
    results["refused"] = _trained_unlike(rank)  # and the ranks still meet
    results["own"] = _models_of_their_own(rank, distributed=False)
    leave_with(results, rank, folder)


def _run_that_fails_on_one_rank(rank):
    """The second rank has no memory left at the second event."""
    events, inner, decompose = [], live_scores.scores, live_scores.esd_batch

    def out_of_memory(*args, **kwargs):
        if rank == 1 and len(events) == 2:
            raise torch.OutOfMemoryError("no memory")
        return decompose(*args, **kwargs)

    live_scores.scores = lambda matrices, *how: events.append(0) or inner(matrices, *how)
    live_scores.esd_batch = out_of_memory
    model = TinyLM()
    optimizer = SpyingAdamW(_data_parallel(model).parameters(), lr=3e-3)
    htsr.layerwise(optimizer, model, interval=3, ramp=0)
    status = []
    train(model, optimizer, range(STEPS), after=lambda _: status.append(_status(optimizer)))
    return {"rates": [{n: lr for n, (lr, _) in seen.items()} for seen in optimizer.seen], "status": status}


def _run_without_room_on_one_rank(rank):
    """The second rank has no memory to put the first up_proj together at the second event."""
    status, failed, empty = [], [], torch.empty

    def out_of_memory(shape, **kwargs):
        if rank == 1 and len(status) == 2 and not failed and shape == (2, INNER, WIDTH):
            failed.append(shape)
            raise torch.OutOfMemoryError("no memory")
        return empty(shape, **kwargs)

    torch.empty = out_of_memory
    model = _sharded(TinyLM())
    optimizer = SpyingAdamW(model.parameters(), lr=3e-3)
    htsr.layerwise(optimizer, model, interval=3, ramp=0)
    try:
        train(model, optimizer, range(STEPS), after=lambda _: status.append(_status(optimizer)))
    finally:
        torch.empty = empty
    return {"rates": [{n: lr for n, (lr, _) in seen.items()} for seen in optimizer.seen], "status": status}


def _layerwise_on_one_rank(rank):
    meeting.PATIENCE, patience = 0.3, meeting.PATIENCE
    said = _refusal(torch.nn.Linear(64, 60)) if rank == 0 else ""
    distributed.barrier()
    meeting.PATIENCE = patience
    return said


def _trained_unlike(rank):
    frozen = TinyLM()
    if rank:
        frozen.layers[0].requires_grad_(False)
    return {
        "matrices": _refusal(torch.nn.ModuleDict({("up_proj", "down_proj")[rank]: torch.nn.Linear(64, 60)})),
        "policy": _refusal(torch.nn.Linear(64, 60), reverse=rank == 1),
        "frozen": _refusal(frozen),
        "total_steps": _refusal(torch.nn.Linear(64, 60), interval=10, total_steps=(100, 150)[rank]),
        "weights": _refusal(_of_its_own(rank)),
        "gradients": _refusal(_of_its_own(rank), spectrum="gradients"),
    }


def _of_its_own(rank):
    """Three matrices, of which that of the rank's own number has a heavy tail, and gradients that are all alike."""
    torch.manual_seed(rank)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(3)])
    with torch.no_grad():
        model[rank].weight.mul_(torch.arange(1.0, 65.0) ** -1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def _models_of_their_own(rank, **options):
    """Multipliers of one model for each process, by `htsr.layerwise` and by `LayerwiseLR`."""
    found = []
    for make in (htsr.layerwise, htsr.LayerwiseLR):
        model = _of_its_own(rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        make(optimizer, model, embeddings="measured", **options)
        if make is htsr.layerwise:
            optimizer.step()
        found.append(htsr.multipliers(optimizer))
    return found


def _refusal(model, **changes):
    optimizer = htsr.layerwise(torch.optim.SGD(model.parameters(), lr=0.1), model, **changes)
    try:
        optimizer.step()
    except htsr.HtsrError as error:
        return str(error)
    return "not refused"


def _status(optimizer):
    return {group["name"]: group["status"] for group in optimizer.param_groups}


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


def test_ranks_that_do_not_train_alike_are_refused_on_each(two_processes):
    first, second = (result["refused"] for result in two_processes)
    assert first == second
    assert all(sentence.startswith("the processes do not train one model") for sentence in first.values())
    assert "up_proj 1×60×64 float32 on rank 0 and down_proj 1×60×64 float32 on rank 1" in first["matrices"]
    assert "with reverse False on rank 0 and with reverse True on rank 1" in first["policy"]
    assert "layers.0" in first["frozen"]
    assert "with total_steps 100 on rank 0 and with total_steps 150 on rank 1" in first["total_steps"]
    for kind in ("weights", "gradients"):
        assert first[kind].startswith("the processes do not train one model: they measure 0 "), kind
        assert first[kind].endswith("with distributed=False each process measures its own")


def test_each_process_may_train_a_model_of_its_own(two_processes):
    for rank, result in enumerate(two_processes):
        with one_thread():
            assert result["own"] == _models_of_their_own(rank)
        assert result["own"][0][str(rank)] == 1.0


def test_layerwise_on_one_rank_only_is_told(two_processes):
    first, second = (result["alone"] for result in two_processes)
    assert first.startswith("rank 0 is in htsr.layerwise and waits for rank 1")
    assert second == ""


def test_a_sharded_tensor_that_one_rank_cannot_hold_keeps_its_multiplier(two_processes):
    """A rank that fails inside of torch's collective would leave the others in it."""
    first, second = (result["no_room"] for result in two_processes)
    assert first == second
    kept = {name for name, status in first["status"][2].items() if "rank 1 has no memory" in status}
    assert len(kept) == 1
    assert kept < {"layers.0.mlp.up_proj", "layers.1.mlp.up_proj"}
    rates = first["rates"]
    assert all(rates[2][name] == rates[1][name] for name in kept)
    assert set(first["status"][5].values()) == {"ok"}
