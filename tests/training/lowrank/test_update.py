"""Updates of many parameters together: against a slow loop, and against torch's own AdamW."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from htsr.training.lowrank import update
from htsr.training.lowrank.optimizer import LowRankAdamW
from tests.reference import lowrank_loop

SHAPES = [(12, 8), (8, 12), (12, 8), (9, 9), (3, 10, 6), (3, 6, 10), (7, 5), (11,), (11,), (), (40, 6)]
RANKED = 6


def parameters(dtype, device="cpu"):
    random = np.random.default_rng(0)
    return [nn.Parameter(torch.from_numpy(random.standard_normal(shape)).to(device, dtype)) for shape in SHAPES]


def groups(params):
    """As after a wrapper that gives each parameter a learning rate of its own, in part."""
    return [
        {"params": params[:3], "rank": 3, "refresh_every": 2},
        *({"params": [p], "rank": 4, "lr": 0.01 * i, "weight_decay": 0.1 * i} for i, p in enumerate(params[3:RANKED])),
        {"params": params[RANKED:8], "weight_decay": 0.0},
        {"params": params[8:], "betas": (0.8, 0.95)},
    ]


def set_gradients(params, step):
    """Every fifth one is missing, another at each step, so that steps differ."""
    random = np.random.default_rng((1, step))
    for i, parameter in enumerate(params):
        G = torch.from_numpy(random.standard_normal(tuple(parameter.shape))).to(parameter)
        parameter.grad = None if (i + step) % 5 == 0 else G


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "rounding"),
    [
        *itertools.product((torch.float32, torch.float64), ("float32", "bfloat16", "8bit"), ("stochastic",)),
        *itertools.product((torch.bfloat16, torch.float16), ("float32",), ("stochastic", "kahan", "master", "nearest")),
    ],
)
@pytest.mark.parametrize("piece", [2**22, 150])
def test_together_is_one_after_the_other(dtype, state_dtype, rounding, piece, monkeypatch):
    """Up to the order of three multiplications, of which each may be off by half a unit in the last place."""
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(update, "PIECE", piece)
    monkeypatch.setattr(update, "BATCH", piece)
    monkeypatch.setattr(update, "STACK", piece // 2)
    together, apart = parameters(dtype), parameters(dtype)
    optimizers = [
        LowRankAdamW(groups(params), lr=0.02, weight_decay=0.1, state_dtype=state_dtype, rounding=rounding)
        for params in (together, apart)
    ]
    narrow = dtype in (torch.bfloat16, torch.float16)
    eps = torch.finfo(dtype if state_dtype == "float32" else torch.float32).eps
    tolerance = {"rtol": 2 * eps, "atol": 0} if narrow else {"rtol": 30 * eps, "atol": 30 * eps}
    for step in range(7):
        for params in (together, apart):
            set_gradients(params, step)
        optimizers[0].step()
        lowrank_loop.step(optimizers[1])
        for ours, theirs in zip(together, apart, strict=True):
            # a narrow weight may go to the other neighbour, if hardly ever, and then both go on from where they are
            torch.testing.assert_close(ours, theirs, **tolerance)
    same = torch.cat([(a == b).flatten() for a, b in zip(together, apart, strict=True)])
    assert same.float().mean() > (0.98 if narrow else 0.5 if state_dtype == "float32" else 0.0)
    for ours, theirs in zip(together, apart, strict=True):
        a, b = optimizers[0].state[ours], optimizers[1].state[theirs]
        assert a.keys() == b.keys()
        assert a["step"].equal(b["step"])
        assert all(a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_rank_it_is_bit_for_bit_adamw(dtype):
    ours, theirs = parameters(dtype), parameters(dtype)

    def plain(params):
        return [
            {key: value for key, value in group.items() if key not in ("rank", "refresh_every")}
            for group in groups(params)
        ]

    mine = LowRankAdamW(plain(ours), lr=0.02, weight_decay=0.1)
    other = torch.optim.AdamW(plain(theirs), lr=0.02, weight_decay=0.1, foreach=True)
    for step in range(7):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        mine.step()
        other.step()
    assert all(map(torch.equal, ours, theirs))


def test_a_batch_is_bounded_and_its_gradients_are_projected_as_late_as_it():
    taken = []

    def pending():
        for parameter in params:
            constants = update.Constants.of(optimizer.param_groups[0])
            taken.append(parameter.numel())
            yield update.Pending(parameter, {}, optimizer.param_groups[0], constants, 0, 0, parameter.detach())

    params = [
        nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (5, 9, 30, 3, 8) for dtype in (torch.float32, torch.float64)
    ]
    optimizer = LowRankAdamW(params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "BATCH", 10)
        sizes = []
        for batch in update.in_batches(pending()):
            assert len({(one.parameter.dtype, one.R.device) for one in batch}) == 1
            sizes.append([one.R.numel() for one in batch])
            assert sum(sizes[-1]) <= 10 or len(batch) == 1
            assert sum(taken) - sum(map(sum, sizes)) < 2 * 10 + 30
    assert sorted(itertools.chain(*sizes)) == sorted([5, 9, 30, 3, 8] * 2)
