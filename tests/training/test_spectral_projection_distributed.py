"""Two gloo processes share the tensors that are nudged, and end bit for bit alike, with the weights of one process."""

import hashlib

import numpy as np
import pytest
import torch
from torch import distributed, nn

import htsr
from htsr.training import spectral_projection
from htsr.training.spectral_projection import nudge_model
from tests.models import heavy_matrix
from tests.processes import in_two_processes, leave_with, one_thread


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(80, 61), nn.ReLU(), nn.Linear(61, 71), nn.ReLU(), nn.Linear(71, 90)).bfloat16()
    with torch.no_grad():
        for i, layer in enumerate(net[::2]):
            layer.weight.copy_(heavy_matrix(np.random.default_rng(i), *layer.weight.shape))
    return net


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


def digest(net):
    content = b"".join(whole(p).contiguous().view(torch.uint8).numpy().tobytes() for p in net.parameters())
    return hashlib.sha256(content).hexdigest()


def nudged(wrap=lambda net: net, **options):
    """Names of what was moved, and a digest of all weights."""
    net = wrap(model())
    moved = nudge_model(torch.optim.SGD(net.parameters(), lr=0.1), net, 0.5, **options)
    return {"moved": list(moved), "weights": digest(net)}


def _sharded(net):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(net)


def _worker(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    decomposed, inner = [], spectral_projection.nudge

    def noted(matrix, *args, **kwargs):
        decomposed.append(tuple(matrix.shape))
        return inner(matrix, *args, **kwargs)

    def failing_on_one_rank(matrix, *args, **kwargs):
        if rank == 1:
            raise torch.OutOfMemoryError("out of memory")
        return inner(matrix, *args, **kwargs)

    results = {}
    spectral_projection.nudge = noted
    wraps = {"ddp": nn.parallel.DistributedDataParallel, "fsdp2": _sharded}
    for kind, wrap in wraps.items():
        decomposed.clear()
        results[kind] = nudged(wrap) | {"decomposed": list(decomposed)}
    decomposed.clear()
    results["own"] = nudged(distributed=False) | {"decomposed": list(decomposed)}
    spectral_projection.nudge = failing_on_one_rank
    results |= {f"{kind}, failing": nudged(wrap) for kind, wrap in wraps.items()}
    try:
        nudge_model(torch.optim.SGD((net := model()).parameters(), lr=0.1), net, 0.1 * (1 + rank))
    except htsr.UsageError as error:
        results["refused"] = str(error)
    leave_with(results, rank, folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_two_processes(_worker, tmp_path_factory.mktemp("nudged"))


@pytest.fixture(scope="module")
def alone():
    with one_thread():
        return nudged()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "own"])
def test_every_rank_ends_with_the_weights_of_one_process(found, alone, kind):
    assert alone["moved"] == ["0", "2", "4"]
    for rank in found:
        assert rank[kind]["moved"] == alone["moved"]
        assert rank[kind]["weights"] == alone["weights"]


def test_the_ranks_share_the_tensors(found):
    for kind in ("ddp", "fsdp2"):
        shapes = [[tuple(shape) for shape in rank[kind]["decomposed"]] for rank in found]
        assert sorted(shapes[0] + shapes[1]) == [(61, 80), (71, 61), (90, 71)]
        assert len(shapes[0]) == 2
    assert all(len(rank["own"]["decomposed"]) == 3 for rank in found)


@pytest.mark.parametrize("kind", ["ddp, failing", "fsdp2, failing"])
def test_what_fails_on_one_rank_is_left_as_it_is_on_all(found, alone, kind):
    """The second rank, with the second costliest tensor, has no memory left."""
    assert found[0][kind] == found[1][kind]
    assert len(found[0][kind]["moved"]) == 2
    assert found[0][kind]["weights"] != alone["weights"]


def test_ranks_that_nudge_otherwise_are_refused_alike(found):
    assert found[0]["refused"] == found[1]["refused"]
    assert "strength 0.1 on rank 0 and strength 0.2 on rank 1" in found[0]["refused"]
