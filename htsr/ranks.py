"""The processes that share an analysis, and whether they look at one model."""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import sys
import time
from collections.abc import Collection, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from htsr.arrays import Array, Product, as_numpy
from htsr.errors import MatrixError, UsageError
from htsr.matrices.models import Model, WeightMatrix
from htsr.matrices.roles import whole_name
from htsr.spectra.metrics import Options

logger = logging.getLogger(__name__)

PATIENCE = 300.0  # seconds until processes that do not come are given up
_WORRY = 20.0  # seconds until they are asked for
_SAMPLED = 4096  # entries of a matrix that ranks compare
_CHUNK = 1 << 22  # entries at a time


class Ranks:
    """The processes that share this analysis: those of `accelerate launch` or `torchrun`, or this one alone.

    Args:
        distributed: whether to share it where there are several.
    """

    def __init__(self, distributed: bool = True) -> None:
        self.rank, self.size = 0, 1
        if not distributed:
            return
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _is_initialized():
            import torch
            from accelerate import PartialState

            atexit.register(_leave)
            PartialState(cpu=not torch.cuda.is_available())
        if _is_initialized():
            from torch import distributed as group

            self.rank, self.size = group.get_rank(), group.get_world_size()

    def gather(self, mine: list[Any]) -> list[Any]:
        """The items of all ranks, on every rank."""
        if self.size == 1:
            return mine
        from torch import distributed as group

        found: list[list[Any]] = [[] for _ in range(self.size)]
        group.all_gather_object(found, mine)
        return [item for items in found for item in items]

    def agree(self, model: Model, options: Options, shards: Collection[str] = ()) -> None:
        """Make sure that all ranks are about to share one piece of work.

        Names, shapes and options are compared, then the files by path, size and date; where those differ or the model
        is in memory, entries of every matrix.

        Args:
            model: what this rank is about to analyze.
            options: and how.
            shards: tensors of which each rank holds a part.

        Raises:
            UsageError: on every rank, they differ; or on those that came, others have not come.
        """
        if self.size == 1:
            return
        self._meet()
        self._same("options", [str(vars(options) | {"device": device_type(options)})])
        self._same("matrices", [f"{m.name} {m.pieces}×{m.shape[0]}×{m.shape[1]} {m.dtype}" for m in model])
        prints = self.gather([model.fingerprint])
        if None in prints or len(set(prints)) > 1:
            whole = [matrix for matrix in model if whole_name(matrix.name) not in shards]
            self._same("weights", [f"{m.name} {checksum(m, _SAMPLED)}" for m in whole])

    def _same(self, what: str, mine: Sequence[str]) -> None:
        digest = hashlib.sha256("\n".join(mine).encode("utf-8", "surrogateescape")).hexdigest()
        if len(set(self.gather([digest]))) == 1:
            return
        first, *others = self.gather([mine])
        for rank, other in enumerate(others, 1):
            for a, b in zip_longest(first, other, fillvalue="nothing"):
                if a != b:
                    raise UsageError(
                        f"the processes do not analyze one model: the {what} differ, {a} on rank 0 and {b} on rank "
                        f"{rank}; with distributed=False each process analyzes its own"
                    )

    def _meet(self) -> None:
        """Wait for the other ranks, and say so, where a collective would hang without a word."""
        import torch

        try:
            store = torch.distributed.distributed_c10d._get_default_store()
            store.add(f"htsr/{self.rank}", 1)
        except (AttributeError, RuntimeError, ValueError):  # a backend without a store
            return
        started, worried = time.monotonic(), False
        mine = store.add(f"htsr/{self.rank}", 0)
        while late := [rank for rank in range(self.size) if store.add(f"htsr/{rank}", 0) < mine]:
            waited = time.monotonic() - started
            sentence = (
                f"rank {self.rank} is in htsr.analyze and waits for rank {', '.join(map(str, late))}: every process "
                "has to call it, or one alone with distributed=False"
            )
            if waited > PATIENCE:
                store.add(f"htsr/{self.rank}", -1)
                raise UsageError(sentence)
            if waited > _WORRY and not worried:
                logger.warning("%s", sentence)
                worried = True
            time.sleep(0.01 if waited < 1 else 0.25)


def device_type(options: Options) -> str:
    """The kind of device that options name: which one of its kind changes no number."""
    return options.device.partition(":")[0]


def checksum(matrix: WeightMatrix, entries: int | None = None) -> str | None:
    """A digest of what a matrix holds.

    Args:
        matrix: is read.
        entries: how many of them, evenly spread, tell; all by default.

    Returns:
        None where it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=12)
    try:
        values = matrix.read()
        for part in (values.left, values.right) if isinstance(values, Product) else (values,):
            _update(digest, part, entries)
    except MatrixError:
        return None
    return digest.hexdigest()


def _update(digest: Any, values: Array, entries: int | None) -> None:
    rows = values.reshape(-1, values.shape[-1])
    if entries is None:
        step = max(1, _CHUNK // rows.shape[1])
        parts = [rows[i : i + step] for i in range(0, rows.shape[0], step)]
    else:
        flat = rows.reshape(-1)
        parts = [flat[:: max(1, flat.shape[0] // entries)]]
    for part in parts:
        digest.update(np.ascontiguousarray(as_numpy(part)).tobytes())


def _is_initialized() -> bool:
    """Whether there is a process group; torch is not imported to ask."""
    group = sys.modules.get("torch.distributed")
    return group is not None and group.is_available() and group.is_initialized()


def _leave() -> None:
    """End the process group that was begun here; a process that exits within it may abort."""
    from torch import distributed as group

    if group.is_initialized():
        group.destroy_process_group()
