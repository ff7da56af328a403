"""What changes matrices works where they lie, and gives what it gives on a CPU."""

import numpy as np
import pytest
import torch

import htsr
from htsr.spectra.nudge import nudge
from htsr.training.spectral_projection import nudge_model


def heavy_matrix(rows, columns, dtype=torch.float32):
    random = np.random.default_rng(rows)
    left, _ = np.linalg.qr(random.standard_normal((rows, min(rows, columns))))
    right, _ = np.linalg.qr(random.standard_normal((columns, min(rows, columns))))
    scale = (1 - random.random(min(rows, columns))) ** -0.4
    return torch.from_numpy((left * scale) @ right.T).to(dtype)


@pytest.mark.parametrize("keep", ["tail", "erg", 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections(device, keep, dtype):
    W = heavy_matrix(60, 80, dtype)
    expected, found = htsr.project_tail(W, keep), htsr.project_tail(W.to(device), keep)
    assert found.matrix.device.type == device.type
    assert found.kept == expected.kept
    torch.testing.assert_close(found.matrix.cpu(), expected.matrix)


def test_traps(device):
    W = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    W[3, 5] = 40.0
    expected, found = htsr.remove_traps(W), htsr.remove_traps(W.to(device))
    assert found.matrix.device.type == device.type
    assert (found.traps_before, found.traps_after, found.clipped) == (1, 0, 1)
    assert torch.equal(found.matrix.cpu(), expected.matrix)


def test_a_nudge(device):
    W = heavy_matrix(60, 80)
    expected, found = nudge(W, 0.3)[0], nudge(W.to(device), 0.3)[0]
    assert found.device.type == device.type
    torch.testing.assert_close(found.cpu(), expected)


def test_a_model_is_nudged_where_it_is(device, synchronisations):
    def model():
        net = torch.nn.Sequential(torch.nn.Linear(80, 60), torch.nn.ReLU(), torch.nn.Linear(60, 70))
        for layer in net[::2]:
            layer.weight.data.copy_(heavy_matrix(*layer.weight.shape))
            layer.bias.data.zero_()
        return net

    here, there = model(), model().to(device)
    expected = nudge_model(torch.optim.SGD(here.parameters()), here, 0.3)
    optimizer = torch.optim.SGD(there.parameters())
    with synchronisations() as counted:
        found = nudge_model(optimizer, there, 0.3)
    assert found.keys() == expected.keys() >= {"0"}
    for a, b in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b)
    assert counted.count is None or counted.count <= 10, counted.names  # of each: equal, finite, eigh, values, ratios
