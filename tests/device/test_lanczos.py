"""The Lanczos route keeps all that is large on the device, and waits for it once in 32 steps."""

import numpy as np
import pytest
import torch

from htsr.spectra.lanczos import lanczos_esd


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(200, 260), (260, 200), (20, 30)])
def test_it_equals_the_cpu(device, dtype, shape):
    W = torch.from_numpy(np.random.default_rng(0).standard_t(3, shape)).to(dtype)
    expected, found = lanczos_esd(W), lanczos_esd(W.to(device), device=str(device))
    assert found.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-3)
    assert found.eigenvalues[-10:] == pytest.approx(expected.eigenvalues[-10:], rel=1e-5)
    assert found.error == pytest.approx(expected.error, abs=1e-4)


def test_it_waits_for_the_device_once_in_32_steps(device, synchronisations):
    W = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).to(device)
    with synchronisations() as counted:
        lanczos_esd(W, device=str(device))
    assert counted.count is None or counted.count <= 2 + 128 / 32, counted.names  # start, trace, coefficients


def test_memory_is_the_matrix_and_the_basis(device, memory):
    W = torch.randn(300, 4000, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    with memory() as used:
        lanczos_esd(W, device=str(device))
    basis, wide = 8 * 129 * 300 * 8, 4 * W.numel()
    assert used.peak < 1.2 * (basis + wide)
