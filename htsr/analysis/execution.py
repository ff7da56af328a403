"""Running the measurements in the threads of one process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from htsr.errors import UsageError
from htsr.matrices.models import WeightMatrix
from htsr.spectra.esd import BATCH_UP_TO
from htsr.spectra.measure import Measured, measure_batch
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.tridiagonal import load_solver

logger = logging.getLogger(__name__)

# Matrices whose float32 copy and Gram matrix take less are worked on side by side, one BLAS thread each, as many as
# there are threads and together at most AT_ONCE; larger ones one after the other with all threads.
SIDE_BY_SIDE = 160 << 20
AT_ONCE = 1 << 30

Progress = Callable[[int, Measured], None]
Result = TypeVar("Result")
Work = Callable[[Sequence[WeightMatrix]], Sequence[Result]]


def measure_all(
    matrices: Sequence[WeightMatrix], options: Options, on_measured: Progress | None = None
) -> list[Measured]:
    """Measure `matrices`; results in their order, `on_measured(index, result)` in the order of completion."""
    results: dict[int, Measured] = {}
    if options.dtype == "float32" or options.permuted:
        load_solver()  # before threads are limited
    for index, result in for_each(matrices, partial(_measure, options)):
        results[index] = result
        if result.row.status != "ok":
            logger.info("%s: %s", result.row.name, result.row.warning)
        if on_measured is not None:
            on_measured(index, result)
    return [results[i] for i in range(len(matrices))]


def for_each(matrices: Sequence[WeightMatrix], work: Work[Result]) -> Iterator[tuple[int, Result]]:
    """(index, result) of each matrix, in the order of completion.

    Args:
        matrices: matrices to work on.
        work: function that gives the results of a few matrices of one shape; it is called in several threads.
    """
    order = sorted(range(len(matrices)), key=lambda i: -matrices[i].cost)
    small = [i for i in order if _footprint(matrices[i]) <= SIDE_BY_SIDE]
    yield from _in_threads(matrices, small, work)
    for index in order:
        if _footprint(matrices[index]) > SIDE_BY_SIDE:
            yield index, work([matrices[index]])[0]


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


def _measure(options: Options, matrices: Sequence[WeightMatrix]) -> list[Measured]:
    return measure_batch([(matrix.opened, unmeasured_row(matrix)) for matrix in matrices], options)


def _footprint(matrix: WeightMatrix) -> int:
    return 4 * matrix.parameters + 16 * min(matrix.shape) ** 2


def workers() -> int:
    """Threads for this process: OMP_NUM_THREADS where set, else its share of the processors."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if threads.isdecimal():
        return max(1, int(threads))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _in_threads(
    matrices: Sequence[WeightMatrix], indices: Sequence[int], work: Work[Result]
) -> Iterator[tuple[int, Result]]:
    if not indices:
        return
    waiting = _batches(matrices, indices)[::-1]
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


def _batches(matrices: Sequence[WeightMatrix], indices: Sequence[int]) -> list[list[int]]:
    """`indices` in batches of one shape, just as many as make LAPACK work without the interpreter's lock."""
    batches: list[list[int]] = []
    growing: dict[tuple[int, int], list[int]] = {}
    for i in indices:
        matrix = matrices[i]
        size = BATCH_UP_TO // max(1, min(matrix.shape)) + 1
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


def pick_device(device: str) -> str:
    """`device`, with ``auto`` as this process's accelerator where there is one.

    torch is asked only where a driver shows: a machine without an accelerator needs it for nothing else here, and
    importing it takes longer than many an analysis.

    Raises:
        UsageError: this machine has no such device.
    """
    if device == "cpu":
        return device
    if device != "auto":
        import torch

        try:
            if torch.zeros(1, device=device).is_meta:
                raise UsageError("device 'meta' computes nothing")
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UsageError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
        return device
    drivers = ("/proc/driver/nvidia/version", "/dev/kfd", "/dev/nvidiactl", "/dev/dxg")
    if not any(os.path.exists(driver) for driver in drivers):
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
