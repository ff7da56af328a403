"""Two gloo processes monitor together what one does alone: the same numbers, one file, and one of them decides."""

from itertools import count

import pytest
import torch
from torch import distributed, nn

import htsr
from htsr.analysis.trajectory import Trajectory
from htsr.training.monitoring import measuring
from htsr.training.monitoring import monitor as module
from htsr.training.monitoring.budget import Budget
from tests.processes import in_two_processes, leave_with, one_thread
from tests.training.models import TinyLM, train

STEPS = 6
ALL = float("inf")


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


WRAPS = {"ddp": nn.parallel.DistributedDataParallel, "fsdp2": sharded}


def watched(model, folder, **options):
    """What every process would log, step by step, and the matrices that this one decomposed."""
    logged, decomposed, inner = [], [], measuring.measure_all

    def noted(matrices, *rest):
        decomposed.extend(matrix.name for matrix in matrices)
        return inner(matrices, *rest)

    measuring.measure_all = noted
    monitor = htsr.SpectralMonitor(every=2, **options)
    monitor._begin(model, 0, folder, lambda values, step: logged.append([step, values]))  # as the Trainer does
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(STEPS), after=lambda _: monitor.step())
    monitor.close()
    measuring.measure_all = inner
    for _, values in logged:
        values.pop("spectrum/share_of_time") if options["share"] == ALL else None
    return {"logged": logged, "decomposed": decomposed}


def _worker(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = {kind: watched(wrap(TinyLM()), folder / kind, share=ALL) for kind, wrap in WRAPS.items()}
    ticks = count(step=1 - rank)  # each look at the clock takes a second, and the second process has no time at all
    module.Budget = lambda share: Budget(share, clock=lambda: float(next(ticks)))
    results["short"] = watched(WRAPS["fsdp2"](TinyLM()), folder / "short", share=1.0)
    module.Budget = Budget
    for kind, make in {
        "other models": lambda: (TinyLM(seed=rank), True),
        "own shards": lambda: (WRAPS["fsdp2"](TinyLM()), False),
    }.items():
        model, together = make()
        try:
            htsr.SpectralMonitor(model, distributed=together)
        except htsr.HtsrError as error:
            results[kind] = str(error)
    htsr.SpectralMonitor(TinyLM(seed=rank), distributed=False)
    leave_with(results, rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("monitored")


@pytest.fixture(scope="module")
def found(folder):
    return in_two_processes(_worker, folder)


@pytest.fixture(scope="module")
def alone(folder):
    with one_thread():
        return watched(TinyLM(), folder / "alone", share=ALL)


@pytest.mark.parametrize("kind", WRAPS)
def test_every_process_knows_what_one_would(found, alone, folder, kind):
    assert [step for step, _ in alone["logged"]] == [2, 4, 6]
    for rank in found:
        assert [step for step, _ in rank[kind]["logged"]] == [2, 4, 6]
        for (_, here), (_, there) in zip(rank[kind]["logged"], alone["logged"], strict=True):
            assert here == pytest.approx(there, rel=1e-4)
    here, there = (Trajectory.load(folder / name / "trajectory.jsonl").to_pandas() for name in (kind, "alone"))
    keys = ["step", "name"]
    assert here.sort_values(keys)[keys].values.tolist() == there.sort_values(keys)[keys].values.tolist()


@pytest.mark.parametrize("kind", WRAPS)
def test_the_processes_share_the_matrices(found, alone, kind):
    both = [rank[kind]["decomposed"] for rank in found]
    assert sorted(both[0] + both[1]) == sorted(alone["decomposed"])
    assert min(map(len, both)) == 12


def test_the_first_process_decides_for_both(found):
    first, second = (rank["short"] for rank in found)
    assert first["logged"] == second["logged"]
    assert 0 < len(first["decomposed"]) + len(second["decomposed"]) < 24
    assert [logged[0] for logged in first["logged"]] == [2, 4, 6][: len(first["logged"])] != []


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [("other models", "the processes do not train one model"), ("own shards", "they monitor it together")],
)
def test_what_cannot_be_monitored_is_refused_by_both(found, kind, sentence):
    assert sentence in found[0][kind]
    assert found[0][kind] == found[1][kind]
