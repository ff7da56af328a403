"""The processes that do one piece of work together: how they meet, compare what they hold, and share what they find.

Everything goes through torch's default process group. Each method is a collective: every rank calls it, in the same
order. Nothing here knows of models or results; what is compared are lines of text.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

from htsr.errors import HtsrError, MissingDependencyError, SourceError, UsageError, reason_of
from htsr.meeting import (
    ARRIVALS,
    default_store,
    meet,
    store_of_agent,
    store_of_launcher,
    unfinished,
    wait_for_all,
)

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Ranks:
    """The processes that share some work; by default this one alone.

    Attributes:
        rank: index of this process among them.
        size: number of processes.

    Examples:
        >>> from htsr.ranks import Ranks
        >>> alone = Ranks()
        >>> alone.gather(["mine"])
        ['mine']
        >>> alone.of_first(lambda: "made once, by the first")
        'made once, by the first'
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def running(cls) -> Ranks:
        """The ranks of torch's default process group; this process alone where there is none."""
        if not _is_initialized():
            return cls()
        from torch import distributed

        return cls(distributed.get_rank(), distributed.get_world_size())

    @classmethod
    def launched(cls, call: str, advice: str = "") -> Ranks:
        """The ranks that `accelerate launch` or `torchrun` has started; a process group is begun where there is none.

        Args:
            call: name of what every rank has to call, for the sentence.
            advice: end of that sentence: what else can be done.

        Raises:
            UsageError: other processes were started, and do not come.
        """
        with all_launched(call, advice) as waiting:
            if waiting:
                import torch
                from accelerate import PartialState

                PartialState(cpu=not torch.cuda.is_available())
        return cls.running()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        self.gather([])

    def gather(self, mine: Sequence[Item]) -> list[Item]:
        """The items of all ranks, rank by rank, on every rank.

        Args:
            mine: items of this rank; they are pickled.
        """
        return self.gather_from(lambda: mine)

    def gather_from(self, work: Callable[[], Iterable[Item]]) -> list[Item]:
        """What `work` gives on all ranks, rank by rank, on every rank; what it raises on one is raised on all.

        A rank that takes longer is waited for without limit, whatever the timeout of the process group.

        Args:
            work: function that each rank calls; what it gives is pickled. If it calls collectives, it must call all of
                them even where it raises.

        Raises:
            HtsrError: `work` has failed on another rank; the class and the message are those of that rank.
        """
        if self.size == 1:
            return list(work())
        from torch import distributed

        mine = b""
        failure: Exception | None = None
        try:
            mine = pickle.dumps(list(work()))
        except Exception as error:
            failure = error
        if (store := default_store()) is not None:
            wait_for_all(store, ARRIVALS, self.rank, self.size, partial(unfinished, self.rank))
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, (mine, _said(failure, self.rank)))
        if failure is not None:
            raise failure
        for kind, sentence in filter(None, (said for _, said in found)):
            raise kind(sentence)
        return [item for items, _ in found for item in pickle.loads(items)]

    def of_first(self, make: Callable[[], Made]) -> Made:
        """What `make` makes on the first rank, on every rank; what it raises there is raised on all.

        Args:
            make: function that only the first rank calls; what it returns is pickled.

        Raises:
            HtsrError: `make` has failed on the first rank.
        """
        return self.gather_from(lambda: [make()] if self.is_first else [])[0]

    def difference(self, mine: Sequence[str]) -> str | None:
        """The first line in which two ranks differ, in words that are the same on every rank; None where none differs.

        Args:
            mine: lines that say what this rank holds. They travel only where their digests differ.
        """
        digest = hashlib.sha256("\n".join(mine).encode("utf-8", "surrogateescape")).hexdigest()
        if len(set(self.gather([digest]))) == 1:
            return None
        first, *others = self.gather([list(mine)])
        for rank, other in enumerate(others, 1):
            for a, b in zip_longest(first, other, fillvalue="nothing"):
                if a != b:
                    return f"{a} on rank 0 and {b} on rank {rank}"
        return None

    def meet(self, call: str, advice: str = "") -> None:
        """Wait for the other ranks, and say so, where a collective would hang without a word.

        Args:
            call: name of what every rank has to call, for the sentence.
            advice: end of that sentence: what else can be done.

        Raises:
            UsageError: other ranks have not come; those that came raise it.
        """
        if self.size == 1:
            return
        if (store := default_store()) is not None:
            meet(store, self.rank, self.size, call, advice)


def is_first() -> bool:
    """Whether this process speaks for all processes of its group, or for all that a launcher has started.

    Examples:
        >>> from htsr.ranks import is_first
        >>> is_first()
        True
    """
    return Ranks.running().is_first if _is_initialized() else not _is_launched() or os.environ.get("RANK", "0") == "0"


def is_first_to_say(sentence: str) -> bool:
    """Whether no other process that was launched with this one has said the `sentence`; true where none can be asked.

    What all ranks refuse, they refuse alike, and it is enough to read it once.

    Examples:
        >>> from htsr.ranks import is_first_to_say
        >>> is_first_to_say("there is no such file")
        True
    """
    if not (_is_launched() or _is_initialized()):
        return True
    round_ = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    digest = hashlib.sha256(f"{round_} {sentence}".encode("utf-8", "surrogatepass")).hexdigest()
    try:
        store = default_store() if _is_initialized() else store_of_agent()
        return store is None or int(store.add(f"htsr/said/{digest}", 1)) == 1
    except (RuntimeError, ValueError, KeyError):  # the process that held the store has ended
        return True


@contextmanager
def all_launched(call: str, advice: str = "") -> Iterator[bool]:
    """Within it all processes of the launcher have come, and begin a process group; torch would wait half an hour.

    Args:
        call: name of what every rank has to call, for the sentence.
        advice: end of that sentence: what else can be done.

    Yields:
        Whether there is a group to begin: several processes were launched, and have none.

    Raises:
        UsageError: other processes were started, and do not come.
    """
    if _is_initialized() or not _is_launched():
        yield False
        return
    store = store_of_launcher(call, advice)
    atexit.register(_leave)
    yield True
    del store  # kept until the group has its own


def _is_launched() -> bool:
    """Whether a launcher has started this process with others; RANK alone is a name that many use."""
    size = os.environ.get("WORLD_SIZE", "1")
    return size.isdecimal() and int(size) > 1


def _said(failure: Exception | None, rank: int) -> tuple[type[HtsrError], str] | None:
    """The class and sentence of the error that the other ranks raise when one has failed."""
    if failure is None:
        return None
    if not isinstance(failure, HtsrError):
        return HtsrError, f"rank {rank} failed, {type(failure).__name__}: {reason_of(failure)}"
    kinds = (UsageError, SourceError, MissingDependencyError)
    return next((kind for kind in kinds if isinstance(failure, kind)), HtsrError), str(failure)


def _is_initialized() -> bool:
    """Whether there is a process group; torch is not imported to ask."""
    group = sys.modules.get("torch.distributed")
    return group is not None and group.is_available() and group.is_initialized()


def _leave() -> None:
    """End the process group that was begun here; a process that exits within it may abort."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
