"""Digests by which ranks compare what they hold."""

from dataclasses import replace

import torch

import htsr
from htsr.matrices import checksums


def test_what_cannot_be_read_or_copied_has_none(monkeypatch):
    """A rank whose device has no memory left compares nothing, and ends no training."""
    matrix = htsr.describe({"up_proj.weight": torch.ones(4, 4)}).matrices[0]
    assert checksums.checksum(matrix, 3) is not None

    def broken():
        raise ValueError("no")

    assert checksums.checksum(replace(matrix, load=broken)) is None

    def out_of_memory(_values):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(checksums, "as_numpy", out_of_memory)
    assert checksums.checksum(matrix, 3) is None
