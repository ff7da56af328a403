"""Short trainings, in this process and in two."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.processes import leave, start
from tests.transformer import llama


def batches(number: int, size: int = 4, length: int = 9) -> list[torch.Tensor]:
    """Random token batches (size, length), always the same."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, 64, (size, length), generator=generator) for _ in range(number)]


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Language modeling loss, or the mean square of an encoder's output."""
    if hasattr(getattr(model, "module", model), "lm_head"):
        return model(input_ids=tokens, labels=tokens).loss
    return model(input_ids=tokens).last_hidden_state.square().mean()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> None:
    """One optimizer step a batch."""
    for tokens in data:
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


class KilledError(Exception):
    """Of `killed_after`."""


@contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """The fine-tuning inside stops after that many optimizer steps, as a crash would stop it."""
    from htsr.finetuning.trainer import FinetuneTrainer

    original = FinetuneTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == steps:
            raise KilledError
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FinetuneTrainer, "training_step", step)
        with pytest.raises(KilledError):
            yield


SAMPLED = {  # wrapper, and what its sampler is made with, of one active block's size
    "ddp": ("increase", {}),
    "fsdp2": ("increase", {}),
    "ddp, matrices": ("gradient_norm", {"unit": "matrix"}),
    "fsdp2, matrices": ("increase", {"unit": "matrix"}),
}


def run_distributed(folder: Path, ranks: int) -> list[dict]:
    """`_rank` in `ranks` gloo processes; what each of them found."""
    start(_rank, (ranks, str(folder)), ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    from htsr.training.sampling.sampler import LayerSampler

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1")
    store = torch.distributed.FileStore(f"{folder}/store", ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    mine = [tokens.chunk(ranks)[rank] for tokens in batches(8)]
    found = {}
    for wrapper, (strategy, options) in SAMPLED.items():
        inner = llama(3).double()
        sampler = LayerSampler(inner, strategy, active=1, interval=2, seed=1, **options)
        if wrapper.startswith("ddp"):
            model = DistributedDataParallel(inner, find_unused_parameters=True)
        else:
            model = inner
            mesh = torch.distributed.init_device_mesh("cpu", (ranks,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        sampler.attach(optimizer)
        train(model, optimizer, mine)
        weights = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in inner.state_dict().items()
        }
        found[wrapper] = weights, sampler.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    leave()
