"""One whole matrix at a time out of parameters that are spread over processes.

DDP keeps every parameter whole on every rank: nothing to do. FSDP2 (`fully_shard`) and tensor parallelism keep
DTensors, DeepSpeed's ZeRO-3 keeps partitions: both are put together by a collective in which all ranks take part, in
the same order, and which only the rank that asked for it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from htsr.errors import UsageError, reason_of
from htsr.matrices.apart import matrices_of
from htsr.matrices.models import WeightMatrix
from htsr.matrices.modules import is_sharded, module_config, module_tensors, whole_shape
from htsr.matrices.parametrized import computed
from htsr.matrices.quantized import dequantized
from htsr.matrices.roles import stem, whole_name
from htsr.matrices.stored_tensors import StoredTensor, base_names, unshared
from htsr.matrices.tuners import without_peft
from htsr.ranks import Ranks

if TYPE_CHECKING:
    import torch

View = Callable[[Any], Any]


class Shard:
    """A tensor of which this process holds a part, and for a while the whole.

    Args:
        tensor: a DTensor, or a parameter that ZeRO-3 has partitioned.
    """

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self._whole: torch.Tensor | None = None
        self._problem = "a sharded tensor is read between gather and release"

    def gather(self, ranks: Ranks, *, keep: bool) -> None:
        """Put the tensor together. A collective, after which `read` gives the whole, or says why it cannot.

        A rank that fails within torch's own collective leaves the others waiting in it. What fails there is memory, so
        each rank sees first whether it has enough, and none begins where one of them has not.

        Args:
            ranks: all of them call this.
            keep: whether this rank is to read it.
        """
        lacking = ranks.gather([self._lacks_memory()])
        if any(lacking):
            why = next(filter(None, lacking))
            self._problem = f"rank {lacking.index(why)} has no memory to put it together: {why}"
            return
        if hasattr(self.tensor, "ds_id"):
            import deepspeed  # its `zero` is an attribute, no module

            with deepspeed.zero.GatheredParameters([self.tensor]):
                self._whole = self.tensor.detach().clone() if keep else None
            return
        whole = self.tensor.detach().full_tensor()
        self._whole = whole if keep else None

    def _lacks_memory(self) -> str | None:
        """What an allocation says that is as large as what a gather takes: what arrives, and the whole in its order."""
        import torch

        part = self.tensor.to_local() if hasattr(self.tensor, "to_local") else self.tensor
        try:
            torch.empty((2, *whole_shape(self.tensor)), dtype=part.dtype, device=part.device)
        except (RuntimeError, MemoryError) as error:
            return reason_of(error)
        return None

    def release(self) -> None:
        """Forget the whole."""
        self._whole = None

    def read(self, index: int | None = None) -> torch.Tensor:
        """The whole tensor, in its full shape, or its slice [`index`] of the first axis."""
        if self._whole is None:
            raise RuntimeError(self._problem)
        return self._whole if index is None else self._whole[index]


@dataclass(frozen=True)
class LiveModel:
    """The matrices of a module in training.

    Attributes:
        matrices: the matrices, as `htsr.matrices.sources.open_model` gives them. Those of a sharded tensor can be read
            while their shard is gathered.
        shards: the sharded tensors by name: the name of a matrix without what follows in brackets.
    """

    matrices: tuple[WeightMatrix, ...]
    shards: dict[str, Shard]


def open_live(module: torch.nn.Module, view: View | None = None) -> LiveModel:
    """The matrices of `module`, of which some may be sharded.

    Args:
        module: the model, wrapped or not.
        view: function that gives what to read in place of a parameter, such as its gradient: a tensor of the same
            shape, or None where there is nothing.
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    names = base_names(named)
    parameters = {without_peft(names[name]): p for name, p in named.items() if "modules_to_save." in name}  # if active
    parameters |= {names[name]: p for name, p in named.items()}
    shards: dict[str, Shard] = {}
    tensors = []
    for tensor in module_tensors(module):
        parameter = parameters.get(tensor.name)
        shown = parameter if view is None or parameter is None else view(parameter)
        if parameter is None and view is not None:
            why = f"{tensor.name} is computed from other parameters, and has no gradient or momentum of its own"
            tensor = replace(tensor, problem=("absent", why), storage=None)
        elif parameter is not None and shown is None:
            tensor = replace(tensor, problem=("absent", f"{tensor.name} has nothing of the kind yet"))
        elif is_sharded(shown):
            shard = shards[stem(tensor.name)] = Shard(shown)
            tensor = replace(tensor, read=shard.read, problem=None, storage=("sharded", id(parameter)))
        elif shown is not parameter:
            tensor = _viewed(tensor, shown)
        tensors.append(tensor)
    config = module_config(module)
    matrices = tuple(matrices_of(unshared(dequantized(computed(tensors), config)), config))
    return LiveModel(matrices, shards)


def refuse_flat(module: torch.nn.Module) -> None:
    """Refuse a `module` in which FSDP1 has flattened parameters, so that no whole matrix is left.

    Raises:
        UsageError: FSDP1 has wrapped the module, or a part of it.
    """
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        raise UsageError("FSDP1 flattens parameters, and no matrix is left: take FSDP2 (fully_shard, fsdp_version 2)")


def in_rounds(
    tensors: Sequence[list[WeightMatrix]], shards: Mapping[str, Shard], ranks: Ranks
) -> Iterator[list[WeightMatrix]]:
    """What this rank can read, one tensor at a time; a round gathers one for each rank, so all ranks go on together.

    All ranks go through to the end, or those that do wait for those that do not.

    Args:
        tensors: the matrices of each tensor, the same list on all ranks; this rank reads every `ranks.size`-th tensor,
            from number `ranks.rank` on.
        shards: the sharded tensors by name.
        ranks: processes that share the work.
    """
    for first in range(0, len(tensors), ranks.size):
        mine: list[WeightMatrix] = []
        for owner, parts in enumerate(tensors[first : first + ranks.size]):
            shards[whole_name(parts[0].name)].gather(ranks, keep=owner == ranks.rank)
            if owner == ranks.rank:
                mine = parts
        if mine:
            yield mine
            shards[whole_name(mine[0].name)].release()


def _viewed(tensor: StoredTensor, shown: Any) -> StoredTensor:
    def read(index: int | None = None) -> Any:
        return shown.detach() if index is None else shown.detach()[index]

    return replace(tensor, read=read, dtype=str(shown.dtype).removeprefix("torch."), problem=None)
