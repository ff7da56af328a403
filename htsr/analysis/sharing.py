"""How the ranks share the matrices of a model: whether all hold the same, which rank reads which, and the results."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

from htsr.errors import UsageError
from htsr.matrices.checksums import checksum
from htsr.matrices.models import Model, WeightMatrix, by_tensor
from htsr.matrices.roles import whole_name
from htsr.matrices.sharded import Shard, in_rounds
from htsr.ranks import Ranks
from htsr.spectra.metrics import Options

CALL, ADVICE = "htsr.analyze", ", or one alone with distributed=False"

_SAMPLED = 4096  # entries of a matrix that ranks compare

Result = TypeVar("Result")


def launched_ranks(distributed: bool = True) -> Ranks:
    """The processes that share an analysis: those of the launcher, or this one alone unless `distributed`.

    Raises:
        UsageError: other processes were launched, and do not come.
    """
    return Ranks.launched(CALL, ADVICE) if distributed else Ranks()


def agree(ranks: Ranks, model: Model, options: Options, shards: Collection[str] = ()) -> None:
    """Make sure that all ranks are about to share one piece of work.

    Args:
        ranks: processes that share the work.
        model: model that this rank is about to analyze.
        options: options of its analysis; no number depends on the device, which may differ.
        shards: names of the tensors of which each rank holds a part.

    Raises:
        UsageError: the ranks differ, and every one raises it; or some have not come, and those that came raise it.
    """
    if ranks.size == 1:
        return
    ranks.meet(CALL, ADVICE)
    differ = ranks.difference([f"{name} {value}" for name, value in vars(options).items() if name != "device"])
    what = f"the options differ, {differ}" if differ else model_difference(ranks, model, shards)
    if what:
        raise UsageError(
            f"the processes do not analyze one model: {what}; with distributed=False each process analyzes its own"
        )


def model_difference(ranks: Ranks, model: Model, shards: Collection[str] = ()) -> str | None:
    """How the models of the ranks differ, in words; None where all hold one model.

    Names and shapes are compared, then the files by path, size and date; where those differ or the model is in memory,
    entries of every matrix.

    Args:
        ranks: processes to compare; each of them calls this.
        model: model of this rank.
        shards: names of the tensors of which each rank holds a part; their entries are not compared.
    """
    if differ := ranks.difference([*described(model), *(f"{name} sharded" for name in sorted(shards))]):
        return f"the matrices differ, {differ}"
    prints = ranks.gather([model.fingerprint])
    if None not in prints and len(set(prints)) == 1:
        return None
    whole = [matrix for matrix in model if whole_name(matrix.name) not in shards]
    differ = entries_difference(ranks, whole, _SAMPLED)
    return f"the weights differ, {differ}" if differ else None


def entries_difference(ranks: Ranks, matrices: Sequence[WeightMatrix], entries: int) -> str | None:
    """The first matrix that differs between two ranks, in words; None where none does.

    A matrix that a rank cannot read is left out: its own row or status says so.

    Args:
        ranks: processes to compare; each of them calls this.
        matrices: the matrices, on all ranks the same ones in the same order, none of a sharded tensor.
        entries: number of entries of each, evenly spread, that are compared.
    """
    prints = ranks.gather_from(lambda: [[checksum(matrix, entries) for matrix in matrices]])
    for matrix, found in zip(matrices, zip(*prints, strict=True), strict=True):
        for rank, other in enumerate(found):
            if None not in (found[0], other) and other != found[0]:
                return f"{matrix.name} {found[0]} on rank 0 and {matrix.name} {other} on rank {rank}"
    return None


def described(matrices: Iterable[WeightMatrix]) -> list[str]:
    """Names, shapes and dtypes of `matrices`, one line for each."""
    return [f"{m.name} {m.pieces}×{m.shape[0]}×{m.shape[1]} {m.dtype}" for m in matrices]


def share(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices for each of `ranks` workers, their sums of `costs` nearly equal (longest first to the least loaded).

    Examples:
        >>> from htsr.analysis.sharing import share
        >>> share([5.0, 4.0, 3.0, 3.0], ranks=2)
        [[0, 3], [1, 2]]
    """
    loads = [(0.0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [sorted(indices) for indices in shares]


def shared_out(
    matrices: Sequence[WeightMatrix], shards: Collection[str], ranks: Ranks
) -> tuple[list[WeightMatrix], list[list[WeightMatrix]]]:
    """How the ranks share the work, some of it on tensors that are spread over them.

    Args:
        matrices: all matrices, the same on every rank.
        shards: names of the tensors that are spread over the ranks.
        ranks: processes that share the work.

    Returns:
        The whole matrices that this rank reads, and the matrices of each spread tensor, the costliest tensor first.
    """
    whole = [matrix for matrix in matrices if whole_name(matrix.name) not in shards]
    spread = by_tensor(matrix for matrix in matrices if whole_name(matrix.name) in shards)
    mine = [whole[i] for i in share([matrix.cost for matrix in whole], ranks.size)[ranks.rank]]
    return mine, sorted(spread, key=lambda parts: -sum(matrix.cost for matrix in parts))


def results_of_all(
    whole: Sequence[WeightMatrix],
    spread: Sequence[list[WeightMatrix]],
    shards: Mapping[str, Shard],
    ranks: Ranks,
    work: Callable[[Sequence[WeightMatrix]], Iterable[Result]],
) -> list[Result]:
    """What `work` gives for the matrices of all ranks, on every rank. Where it raises on one, all raise alike.

    Args:
        whole: matrices that this rank reads, from `shared_out`.
        spread: matrices of each spread tensor, from `shared_out`; the tensors are gathered one round after the other.
        shards: the spread tensors by name.
        ranks: processes that share the work.
        work: function that gives the results of `whole`, and of the matrices of each of this rank's tensors.

    Raises:
        HtsrError: `work` has failed on another rank.
    """

    def mine() -> list[Result]:
        results: list[Result] = []
        failure: Exception | None = None
        for matrices in chain([whole], in_rounds(spread, shards, ranks)):
            if failure is not None:
                continue  # the other ranks count on this one in the rounds to come
            try:
                results.extend(work(matrices))
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure
        return results

    return ranks.gather_from(mine)
