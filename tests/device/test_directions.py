"""Directions of two matrices on the device are those of the CPU."""

import dataclasses

import numpy as np
import pytest
import torch

from htsr.spectra import leading as leading_module
from htsr.spectra.subspaces import directions


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("products", [False, True])
def test_directions(device, stored, shape, products, monkeypatch):
    if products:
        monkeypatch.setattr(leading_module, "_DENSE_UP_TO", 16)
    random = np.random.default_rng(0)
    A = random.standard_normal(shape) * (1 - random.random(shape[1])) ** -0.4
    B = A + random.standard_normal(shape)
    A, B = (torch.from_numpy(W).to(getattr(torch, stored)) for W in (A, B))
    here, there = directions(A, B, 2), directions(A.to(device), B.to(device), 2)
    for field in dataclasses.fields(here):
        value = getattr(here, field.name)
        if field.name == "notes":
            assert there.notes == value
        elif field.name != "error":
            assert getattr(there, field.name) == pytest.approx(value, rel=1e-5, abs=1e-8), field.name
