"""Two gloo processes share an analysis of one model, and of nothing else."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from htsr_cli.main import main
from torch import distributed

import htsr
from htsr import meeting, ranks
from htsr.calibration.multiple_choice import multiple_choice_accuracy
from htsr.matrices.checksums import checksum
from htsr.ranks import Ranks
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


class _Uniform(torch.nn.Linear):
    """A language model that finds all tokens equally likely."""

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 256))


def _asked(rank, _folder):
    """Multiple choice, by both ranks and by different ones."""

    def ask(answers, seed=0):
        torch.manual_seed(seed)
        records = [{"question": "Which?", "choices": ["a", "bb"], "answer": answer} for answer in answers]
        try:
            found = multiple_choice_accuracy(_Uniform(3, 4), lambda text: {"input_ids": list(text.encode())}, records)
        except htsr.UsageError as error:
            return str(error)
        return [found.accuracy, found.questions]

    return {"alike": ask([0, 1, 0]), "questions": ask([0, rank]), "model": ask([0, 1, 0], seed=rank)}


def _one_comes(rank, _folder):
    meeting.PATIENCE, meeting.WORRY = 0.5, 0.1
    alone = _refusal(state_dict()) if rank == 0 else ""
    distributed.barrier()
    meeting.PATIENCE = 60.0
    return {"alone": alone, "together": _norms(htsr.analyze(state_dict(), device="cpu"))}


def _failing(rank, _folder):
    """One rank fails in its own part, another is to make something for all."""

    def fail(_progress):
        if rank == 1:
            raise ZeroDivisionError("division by zero\nand more")

    def refuse():
        raise htsr.UsageError("rank 0 will not")

    both, said = Ranks.running(), {}
    for kind, act in {
        "progress": lambda: htsr.analyze(state_dict(), device="cpu", progress=fail),
        "first": lambda: both.of_first(refuse),
        "second": lambda: both.gather_from(lambda: [1 // (1 - rank)]),
        "unpicklable": lambda: both.gather_from(lambda: [(lambda: 1) if rank else 1]),
    }.items():
        try:
            act()
        except Exception as error:
            said[kind] = f"{type(error).__name__}: {error}"
    said["slow"] = _slow(both)
    made = []
    said["made"] = both.of_first(lambda: made.append(rank) or {"by": rank})
    return said | {"here": made, "gathered": both.gather([rank] * (rank + 1)), "first?": ranks.is_first()}


def _slow(both):
    """The second rank works for longer than the group has patience; what the first says of it."""
    warned, warning = [], meeting.logger.warning
    set_timeout = distributed.distributed_c10d._set_pg_timeout
    distributed.barrier()
    set_timeout(timedelta(seconds=1))
    meeting.logger.warning, meeting.WORRY, worry = lambda said, *args: warned.append(said % args), 0.1, meeting.WORRY
    found = both.gather_from(lambda: time.sleep(1.6 * both.rank) or [both.rank])
    meeting.logger.warning, meeting.WORRY = warning, worry
    set_timeout(timedelta(minutes=30))
    return [found, warned]


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
    found = {kind.__name__: kind(rank, folder) for kind in (_different, _asked, _one_comes, _failing, _interrupted)}
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
    assert "the options differ, fit ks on rank 0 and fit hill on rank 1;" in refused[0]["options"]
    for rank, one in enumerate(refused):
        assert one["alone"] == _norms(htsr.analyze(state_dict(seed=rank), device="cpu"))
        assert one["copies"] == _norms(htsr.analyze(str(folder / "copy0"), device="cpu"))
        assert one["compared"] == 13


def test_ranks_ask_one_model_the_same_questions(found):
    first, second = (one["_asked"] for one in found)
    assert first == second
    assert first["alike"] == [pytest.approx(2 / 3), 3]
    assert "the questions differ, question 1, " in first["questions"]
    assert "the weights differ" in first["model"]


def test_a_rank_that_is_alone_is_told(found):
    """`if rank == 0: htsr.analyze(model)`, which hung; and the next analysis of all is none the worse."""
    first, second = (one["_one_comes"] for one in found)
    assert first["alone"].startswith("rank 0 is in htsr.analyze and waits for rank 1")
    assert first["together"] == second["together"] == _norms(htsr.analyze(state_dict(), device="cpu"))


def test_what_fails_on_one_rank_is_raised_on_all(found):
    """The others waited for it until the process group gave up."""
    first, second = (one["_failing"] for one in found)
    assert first["progress"] == first["second"].replace("integer division or modulo", "division")
    assert first["progress"] == "HtsrError: rank 1 failed, ZeroDivisionError: division by zero"
    assert second["progress"].startswith("ZeroDivisionError")
    assert first["first"] == second["first"] == "UsageError: rank 0 will not"
    assert first["unpicklable"].startswith("HtsrError: rank 1 failed, ")
    assert "pickle" in second["unpicklable"]


def test_a_slow_rank_is_waited_for_beyond_the_timeout_of_the_group(found):
    first, second = (one["_failing"] for one in found)
    assert first["slow"] == [[0, 1], ["rank 0 has done its part and waits for rank 1 to do the same"]]
    assert second["slow"] == [[0, 1], []]


def test_a_rank_without_a_launcher_speaks(monkeypatch):
    """RANK is a name that others use too; all output was lost."""
    monkeypatch.setenv("RANK", "1")
    for size, speaks in ((None, True), ("1", True), ("2", False)):
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        assert ranks.is_first() == speaks


def test_what_the_first_makes_and_what_all_have(found):
    first, second = (one["_failing"] for one in found)
    assert first["made"] == second["made"] == {"by": 0}
    assert (first["here"], second["here"]) == ([0], [])
    assert first["gathered"] == second["gathered"] == [0, 1, 1]
    assert (first["first?"], second["first?"]) == (True, False)


@pytest.mark.parametrize("kind", ["first", "second", "first, torchrun's store"])
def test_launched_processes_that_do_not_come_are_told_before_there_is_a_group(monkeypatch, kind):
    """torch waits half an hour for them, without a word."""
    rank = int(kind == "second")
    free = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = free.port
    if "store" not in kind:
        del free
    started = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in started.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str("store" in kind))
    monkeypatch.setattr(meeting, "PATIENCE", 0.2)
    assert ranks.is_first() == (rank == 0)
    with pytest.raises(htsr.UsageError, match=rf"^rank {rank} is in htsr.analyze and waits for rank {1 - rank}: "):
        htsr.analyze(state_dict(), device="cpu")
    assert not distributed.is_initialized()
    assert htsr.analyze(state_dict(), device="cpu", distributed=False)


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


def test_those_that_have_given_up_are_not_counted_and_meetings_leave_no_keys(monkeypatch):
    """Three ranks, two of which come at first; each rank is a thread, all have one store."""
    monkeypatch.setattr(meeting, "PATIENCE", 0.2)
    store, size = distributed.HashStore(), 3

    def meet(present):
        def one(rank):
            try:
                meeting.meet(store, rank, size, "work", "")
            except htsr.UsageError as error:
                return str(error).partition(":")[0]
            return "met"

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(one, present))

    missed = [f"rank {rank} is in work and waits for rank" for rank in range(size)]
    assert all(said.startswith(missed[rank]) for rank, said in enumerate(meet([0, 1])))
    assert meet([2])[0].startswith(missed[2])  # it finds nobody who still waits
    monkeypatch.setattr(meeting, "PATIENCE", 60.0)
    assert meet([0, 1, 2]) == ["met"] * size
    keys = store.num_keys()
    assert [meet([2, 0, 1]) for _ in range(3)] == [["met"] * size] * 3
    assert store.num_keys() == keys


@pytest.mark.parametrize("agent", [True, False])
def test_what_all_ranks_refuse_is_said_once_and_by_all_where_they_cannot_tell(monkeypatch, capsys, agent):
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    launched |= {"TORCHELASTIC_USE_AGENT_STORE": str(agent)}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    codes = []
    for rank in (1, 0, 0):
        monkeypatch.setenv("RANK", str(rank))
        codes.append(main(["compare", "no/such.safetensors", "no/other.safetensors"]))
    assert codes == [1, 1, 1]
    said = capsys.readouterr().err
    assert said.count("htsr: no/such.safetensors") == (1 if agent else 3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    main(["compare", "no/such.safetensors", "no/other.safetensors"])
    assert "htsr: no/such.safetensors" in capsys.readouterr().err
