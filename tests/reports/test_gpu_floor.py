"""The floor of the analysis on a device: operations and bytes, counted by hand and by torch."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from htsr.spectra.lanczos import lanczos_esd
from reports.gpu.floor import Stage, exact, lanczos, model

LLAMA_2_7B = [(4096, 4096, 128), (11008, 4096, 64), (4096, 11008, 32)]


def test_a_7b_model_takes_almost_5e13_operations():
    found = model(LLAMA_2_7B, [exact(rows, columns) for rows, columns, _ in LLAMA_2_7B])
    assert sum(stage.flops for stage in found) == pytest.approx(4.7e13, rel=0.02)
    gram, reduction, _ = found
    assert reduction.flops == pytest.approx(224 * 4 / 3 * 4096**3)
    # on an H100 (67 Tflop/s in float64, 3.35 TB/s) the reduction waits for memory
    assert reduction.seconds(67e12, 3.35e12) == pytest.approx(reduction.bytes / 3.35e12) == pytest.approx(6.1, abs=0.1)
    assert gram.seconds(67e12, 3.35e12) == pytest.approx(gram.flops / 67e12)


def test_products_are_those_that_torch_counts():
    W = torch.randn(60, 90)
    with FlopCounterMode(display=False) as counter:
        W @ W.T
    assert counter.get_total_flops() == 2 * exact(60, 90)[0].flops  # torch computes both triangles
    with FlopCounterMode(display=False) as counter:
        lanczos_esd(W, steps=20, probes=3)
    assert counter.get_total_flops() == lanczos(60, 90, steps=20, probes=3)[0].flops  # on a CPU, NumPy does the rest


def test_the_reduction_reads_a_triangle_of_what_is_left():
    M = 200
    entries = sum(k * (k + 1) / 2 for k in range(1, M + 1))
    assert exact(M, 300)[1].bytes == pytest.approx(8 * entries, rel=0.02)


def test_orthogonalisation_reads_what_is_there():
    steps, probes, M = 100, 4, 30
    numbers = sum(4 * probes * (k + 1) * M for k in range(steps))  # two passes, each with two products
    assert lanczos(M, 40, steps=steps, probes=probes)[1].bytes == pytest.approx(8 * numbers, rel=0.02)
    assert np.isclose(Stage("x", 6.0, 8.0).times(2).seconds(2.0, 100.0), 6.0)
