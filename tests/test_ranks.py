"""Two gloo processes share an analysis of one model, and of nothing else."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import distributed

import htsr
from htsr import ranks
from htsr.ranks import checksum
from tests.models import save_folder, state_dict
from tests.processes import in_two_processes, leave_with


def _norms(analysis):
    return [row.norm for row in analysis]


def _refusal(*args, **options):
    try:
        htsr.analyze(*args, device="cpu", **options)
    except htsr.UsageError as error:
        return str(error)
    return ""


def _changed(state, name, factor):
    return state | {name: factor * state[name]}


def _different(rank, folder):
    own = state_dict(seed=rank)
    embedding = "model.embed_tokens.weight"
    return {
        "weights": _refusal(own),
        "one weight": _refusal(_changed(state_dict(), embedding, 1 + rank)),
        "names": _refusal({f"{name}{rank}" if name == embedding else name: t for name, t in state_dict().items()}),
        "options": _refusal(state_dict(), fit=("ks", "hill")[rank]),
        "files": _refusal(str(folder / f"model{rank}")),
        "alone": _norms(htsr.analyze(own, device="cpu", distributed=False)),
        "copies": _norms(htsr.analyze(str(folder / f"copy{rank}"), device="cpu")),
        "compared": len(htsr.compare(own, own, device="cpu", distributed=False)),
    }


def _one_comes(rank, _folder):
    ranks.PATIENCE, ranks._WORRY = 0.5, 0.1
    alone = _refusal(state_dict()) if rank == 0 else ""
    distributed.barrier()
    ranks.PATIENCE = 60.0
    return {"alone": alone, "together": _norms(htsr.analyze(state_dict(), device="cpu"))}


def _interrupted(_rank, folder):
    """Both ranks are interrupted after their first matrix; then the analysis is run again."""
    journal, source = folder / "journal.jsonl", str(folder / "model0")

    def stop(_progress):
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        htsr.analyze(source, device="cpu", journal=journal, progress=stop)
    distributed.barrier()
    left = sorted(file.name for file in folder.glob("journal*"))
    done = []
    again = htsr.analyze(source, device="cpu", journal=journal, progress=lambda p: done.append(p.row.name))
    distributed.barrier()
    after = sorted(file.name for file in folder.glob("journal*"))
    return {"left": left, "after": after, "done": done, "norms": _norms(again)}


def _worker(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {kind.__name__: kind(rank, folder) for kind in (_different, _one_comes, _interrupted)}
    leave_with(found, rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for rank in range(2):
        save_folder(folder / f"model{rank}", state_dict(seed=rank))
        save_folder(folder / f"copy{rank}", state_dict())
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What each rank has found, by rank and kind."""
    return in_two_processes(_worker, folder)


def test_ranks_with_different_models_are_refused_on_each(found, folder):
    refused = [one["_different"] for one in found]
    for kind in ("weights", "one weight", "names", "options", "files"):
        assert refused[0][kind] == refused[1][kind]
        assert "the processes do not analyze one model" in refused[0][kind], kind
        assert "distributed=False" in refused[0][kind]
    assert "model.embed_tokens" in refused[0]["one weight"]
    for rank, one in enumerate(refused):
        assert one["alone"] == _norms(htsr.analyze(state_dict(seed=rank), device="cpu"))
        assert one["copies"] == _norms(htsr.analyze(str(folder / "copy0"), device="cpu"))
        assert one["compared"] == 13


def test_a_rank_that_is_alone_is_told(found):
    """`if rank == 0: htsr.analyze(model)`, which hung; and the next analysis of all is none the worse."""
    first, second = (one["_one_comes"] for one in found)
    assert first["alone"].startswith("rank 0 is in htsr.analyze and waits for rank 1")
    assert first["together"] == second["together"] == _norms(htsr.analyze(state_dict(), device="cpu"))


def test_ranks_take_up_what_all_of_them_have_left_and_leave_nothing(found, folder):
    alone = htsr.analyze(str(folder / "model0"), device="cpu")
    done = 0
    for one in (one["_interrupted"] for one in found):
        assert one["left"] == ["journal.jsonl", "journal.rank1.jsonl"]
        assert one["after"] == []
        assert one["norms"] == _norms(alone)
        done += len(one["done"])
    assert done <= len(alone) - 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksums_tell_one_entry(dtype):
    state = {"a.weight": torch.randn(300, 200).to(dtype), "b.weight": torch.randn(40, 30).T}
    matrices = htsr.describe(state).matrices
    before = [checksum(matrix) for matrix in matrices]
    assert before == [checksum(matrix) for matrix in htsr.describe(state)]
    state["a.weight"][150, 77] += 1
    assert checksum(matrices[0]) != before[0]
    assert checksum(matrices[1]) == before[1]
    broken = htsr.WeightMatrix("x", (4, 4), 1, "other", None, "linear", "float32", lambda: 1 / 0, matrices[0].position)
    assert checksum(broken) is None
    assert checksum(matrices[0], 16) is not None
    assert np.unique([checksum(matrix, 16) for matrix in matrices]).size == 2
