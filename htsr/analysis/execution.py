"""Running the measurements in one process: in its threads on a CPU, one after the other on an accelerator."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from htsr.arrays import Array, Difference, Product
from htsr.matrices.models import WeightMatrix
from htsr.spectra.device import BATCHED_UP_TO, on_device, solving_device
from htsr.spectra.esd import BATCH_UP_TO
from htsr.spectra.measure import Decomposed, Measured, decompose_batch, measure_batch
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.tridiagonal import load_solver

logger = logging.getLogger(__name__)

# Matrices whose float32 copy and Gram matrix take less are worked on side by side, one BLAS thread each, as many as
# there are threads and together at most AT_ONCE; larger ones one after the other with all threads.
SIDE_BY_SIDE = 160 << 20
AT_ONCE = 1 << 30
_PINNED_FROM = 1 << 20  # entries; smaller matrices are copied in no time

Progress = Callable[[int, Measured], None]
Result = TypeVar("Result")


class _Sized(Protocol):
    """What has the size of a matrix, and costs as much."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def pieces(self) -> int: ...
    @property
    def parameters(self) -> int: ...
    @property
    def cost(self) -> float: ...


Unit = TypeVar("Unit", bound=_Sized)
Work = Callable[[Sequence[WeightMatrix]], Sequence[Result]]
Job: TypeAlias = "tuple[Callable[[], Array | Product], LayerMetrics]"


def measure_all(
    matrices: Sequence[WeightMatrix], options: Options, on_measured: Progress | None = None
) -> list[Measured]:
    """Measure `matrices`; results in their order, `on_measured(index, result)` in the order of completion."""
    results: dict[int, Measured] = {}
    found: Iterator[tuple[int, Measured]]
    if solving_device(options.device) != "cpu":
        work = partial(_with_rows, decompose_batch, options)
        found = _described(for_each(matrices, work, options.device), options)
    else:
        found = for_each(matrices, partial(_with_rows, measure_batch, options))
    if options.dtype == "float32" or options.permuted:
        load_solver()  # before threads are limited
    for index, result in found:
        results[index] = result
        if result.row.status != "ok":
            logger.info("%s: %s", result.row.name, result.row.warning)
        if on_measured is not None:
            on_measured(index, result)
    return [results[i] for i in range(len(matrices))]


def for_each(
    matrices: Sequence[WeightMatrix],
    work: Work[Result],
    device: str = "cpu",
    read: Callable[[WeightMatrix], Array | Product] = WeightMatrix.opened,
) -> Iterator[tuple[int, Result]]:
    """(index, result) of each matrix, in the order of completion.

    On a CPU small matrices are worked on in several threads, and large ones one after the other. On an accelerator all
    are, in this thread, while another reads the next: the device holds one matrix.

    Args:
        matrices: matrices to work on.
        work: function that gives the results of a few matrices of one shape.
        device: device that computes.
        read: function that reads a matrix in the way that `work` will: `WeightMatrix.opened` or `WeightMatrix.read`.
    """
    if solving_device(device) != "cpu":
        yield from _in_turn(matrices, _costliest_first(matrices), work, read)
    else:
        yield from on_host(matrices, work)


def on_host(units: Sequence[Unit], work: Callable[[Sequence[Unit]], Sequence[Result]]) -> Iterator[tuple[int, Result]]:
    """(index, result) of each of `units`, in the order of completion: small ones in several threads of the host.

    Args:
        units: matrices, or other things of that many entries, to work on.
        work: function that gives the results of a few units of one shape.
    """
    order = _costliest_first(units)
    small = [i for i in order if _footprint(units[i]) <= SIDE_BY_SIDE]
    yield from _in_threads(units, small, work)
    for index in order:
        if _footprint(units[index]) > SIDE_BY_SIDE:
            yield index, work([units[index]])[0]


def _costliest_first(units: Sequence[_Sized]) -> list[int]:
    return sorted(range(len(units)), key=lambda i: -units[i].cost)


def unmeasured_row(matrix: WeightMatrix) -> LayerMetrics:
    """The row of a matrix before anything is computed."""
    return LayerMetrics(
        name=matrix.name,
        role=matrix.role,
        block=matrix.block,
        kind=matrix.kind,
        stored=matrix.dtype,
        rows=matrix.shape[0],
        columns=matrix.shape[1],
        warning=matrix.warning,
    )


def _with_rows(
    step: Callable[[list[Job], Options], list[Result]], options: Options, matrices: Sequence[WeightMatrix]
) -> list[Result]:
    """What `measure_batch` or `decompose_batch` gives for these matrices."""
    return step([(matrix.opened, unmeasured_row(matrix)) for matrix in matrices], options)


def _described(decomposed: Iterator[tuple[int, Decomposed]], options: Options) -> Iterator[tuple[int, Measured]]:
    """Rows of spectra, computed in threads of the host while the device is at work on the next matrices."""
    with ThreadPoolExecutor(workers()) as host:
        waiting: deque[tuple[int, Future[Measured]]] = deque()
        try:
            for index, spectrum in decomposed:
                waiting.append((index, host.submit(spectrum.measured, options)))
                while waiting and waiting[0][1].done():
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BaseException:
            host.shutdown(cancel_futures=True)
            raise


def _footprint(matrix: _Sized) -> int:
    return 4 * matrix.parameters + 16 * min(matrix.shape) ** 2


def workers() -> int:
    """Threads for this process: OMP_NUM_THREADS where set, else its share of the processors."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if threads.isdecimal():
        return max(1, int(threads))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _in_threads(
    matrices: Sequence[Unit], indices: Sequence[int], work: Callable[[Sequence[Unit]], Sequence[Result]]
) -> Iterator[tuple[int, Result]]:
    if not indices:
        return
    waiting = _batches(matrices, indices, BATCH_UP_TO)[::-1]
    threads = workers()

    def footprint(batch: list[int]) -> int:
        return sum(_footprint(matrices[i]) for i in batch)

    with _one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        running: dict[Future[Sequence[Result]], list[int]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < 2 * threads:  # some wait in line, so that no thread does
                    if running and sum(map(footprint, running.values())) + footprint(waiting[-1]) > AT_ONCE:
                        break
                    batch = waiting.pop()
                    running[pool.submit(work, [matrices[i] for i in batch])] = batch
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield from zip(running.pop(future), future.result(), strict=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _in_turn(
    matrices: Sequence[WeightMatrix],
    indices: Sequence[int],
    work: Work[Result],
    read: Callable[[WeightMatrix], Array | Product],
) -> Iterator[tuple[int, Result]]:
    """What one thread computes on an accelerator, a second one reading ahead: on the host lie two matrices at most."""
    batches = _batches(matrices, indices, BATCHED_UP_TO)
    with ThreadPoolExecutor(1) as reader:

        def ahead(batch: list[int]) -> list[WeightMatrix]:
            coming = [reader.submit(_staged, matrices[i], read) for i in batch]
            return [_as_read(matrices[i], future) for i, future in zip(batch, coming, strict=True)]

        try:
            coming = ahead(batches[0]) if batches else []
            for position, batch in enumerate(batches):
                current = coming
                coming = ahead(batches[position + 1]) if position + 1 < len(batches) else []
                results = work(current)
                del current
                yield from zip(batch, results, strict=True)
        except BaseException:
            reader.shutdown(cancel_futures=True)
            raise


def _as_read(matrix: WeightMatrix, future: Future[Any]) -> WeightMatrix:
    return replace(matrix, load=future.result, factors=None, problem=None)


def _staged(matrix: WeightMatrix, read: Callable[[WeightMatrix], Array | Product]) -> Array | Product:
    """The matrix, in memory that the device copies from at the speed of the bus, where that can be had."""
    found = read(matrix)
    if isinstance(found, (Product, Difference)) or matrix.parameters < _PINNED_FROM:
        return found
    try:
        tensor = on_device(found, "cpu") if isinstance(found, np.ndarray) else found
        return tensor.pin_memory() if tensor.device.type == "cpu" else tensor
    except (RuntimeError, TypeError) as error:
        logger.debug("%s is copied from plain memory: %s", matrix.name, error)
        return found


def _batches(matrices: Sequence[_Sized], indices: Sequence[int], up_to: int) -> list[list[int]]:
    """`indices` in batches of one shape, of matrices with M ≤ `up_to`: just as many as make a call of the solver long
    enough, on a CPU to work without the interpreter's lock.
    """
    batches: list[list[int]] = []
    growing: dict[tuple[int, int], list[int]] = {}
    for i in indices:
        matrix = matrices[i]
        M = max(1, min(matrix.shape))
        size = BATCH_UP_TO // M + 1 if up_to >= M else 1
        if size == 1 or matrix.pieces > 1 or size * _footprint(matrix) > SIDE_BY_SIDE:
            batches.append([i])
            continue
        batch = growing.get(matrix.shape)
        if batch is None or len(batch) == size:
            batch = growing[matrix.shape] = []
            batches.append(batch)
        batch.append(i)
    return batches


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        yield
