"""How the processes of a piece of work meet: the stores in which they count each other, and waiting with a sentence."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from htsr.errors import UsageError, reason_of

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

logger = logging.getLogger(__name__)

PATIENCE = 300.0  # seconds until processes that do not come are given up
WORRY = 20.0  # seconds until they are asked for
ARRIVALS = "htsr/arrivals"


def default_store() -> Store | None:
    """The store of the default process group; None for a backend without one."""
    from torch import distributed

    try:
        store = distributed.distributed_c10d._get_default_store()
        store.add(ARRIVALS, 0)
    except (AttributeError, RuntimeError, ValueError):
        return None
    return store


def store_of_agent() -> Store | None:
    """The store that torchrun and accelerate keep while processes come and go; None where there is no such agent."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is there

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=WORRY), wait_for_workers=False)


def store_of_launcher(call: str, advice: str) -> Store | None:
    """The store in which launched processes meet, all of them come; torch alone waits for half an hour, silently.

    Args:
        call: name of what every rank has to call, for the sentence.
        advice: end of that sentence: what else can be done.

    Returns:
        The store; None where the environment does not say where it is.

    Raises:
        UsageError: other processes were started, and do not come.
    """
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):  # accelerate finds them elsewhere, or says what is missing
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is there

    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            address,
            port,
            size,
            is_master=hosts,
            timeout=timedelta(seconds=PATIENCE),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        if hosts:
            raise UsageError(
                f"rank 0 cannot open {address}:{port} for the other processes: {reason_of(error)}"
            ) from error
        raise UsageError(_absent(rank, ["0"], call, advice)) from error
    meet(store, rank, size, call, advice)
    return store


def wait_for_all(
    store: Store, place: str, rank: int, size: int, late: Callable[[Sequence[str]], str], patience: float | None = None
) -> None:
    """Wait until all ranks have come to a place as often as this one.

    The `store` counts how often each came there, and all together. No rank comes again before the others have come, so
    that the number of all tells whether they have.

    Args:
        store: store of all ranks.
        place: name of the place, under which the store counts.
        rank: index of this process.
        size: number of processes.
        late: function that makes a sentence of the ranks that have not come; it is logged once.
        patience: seconds after which they are given up; None for never.

    Raises:
        UsageError: ranks have not come; it says the sentence.
    """
    own = f"{place}/{rank}"
    turn = store.add(own, 1)
    come = store.add(place, 1)

    def said() -> str:
        return late([str(other) for other in range(size) if store.add(f"{place}/{other}", 0) < turn])

    started, worried = time.monotonic(), False
    try:
        while come < size * turn:
            waited = time.monotonic() - started
            if patience is not None and waited > patience:
                if store.add(place, -1) < size * turn - 1:  # from now on nobody counts on this rank
                    sentence = said()
                    store.add(own, -1)
                    raise UsageError(sentence)
                store.add(place, 1)  # the last one came this moment
            if waited > WORRY and not worried:
                logger.warning("%s", said())
                worried = True
            time.sleep(min(0.25, max(0.001, waited / 8)))
            come = store.add(place, 0)
    except KeyboardInterrupt:
        store.add(own, -1)
        store.add(place, -1)
        raise


def meet(store: Store, rank: int, size: int, call: str, advice: str) -> None:
    """Wait until all ranks have come to a meeting as often as this one, and give up those that do not.

    Args:
        store: store of all ranks.
        rank: index of this process.
        size: number of processes.
        call: name of what every rank has to call, for the sentence.
        advice: end of that sentence: what else can be done.

    Raises:
        UsageError: ranks have not come.
    """
    wait_for_all(store, "htsr/meetings", rank, size, lambda late: _absent(rank, late, call, advice), PATIENCE)


def unfinished(rank: int, late: Sequence[str]) -> str:
    """The sentence of a `rank` that has done its part, of those that are `late`."""
    return f"rank {rank} has done its part and waits for rank {_some(late)} to do the same"


def _absent(rank: int, late: Sequence[str], call: str, advice: str) -> str:
    return (
        f"rank {rank} is in {call} and waits for rank {_some(late)}: every process has to call it{advice}; or it "
        "failed there"
    )


def _some(ranks: Sequence[str]) -> str:
    return ", ".join(ranks[:8]) + ", …" * (len(ranks) > 8)
