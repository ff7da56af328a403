"""The length of a change from two sketches, against the length itself."""

import numpy as np
import pytest
import torch

from htsr.arrays import Product
from htsr.spectra.sketch import SIZE, STANDARD_ERROR, relative_change, sketch

RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((60, 2 * SIZE)).astype("float32")


def one_column():
    change = np.zeros_like(W)
    change[:, 5] = RANDOM.standard_normal(60)
    return change


CHANGES = {
    "dense": lambda: 1e-2 * RANDOM.standard_normal(W.shape).astype("float32"),
    "rank one": lambda: np.outer(RANDOM.standard_normal(60), RANDOM.standard_normal(2 * SIZE)).astype("float32"),
    "one column": one_column,
    "constant": lambda: np.full_like(W, 0.1),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_length_of_a_change_is_unbiased_and_has_the_stated_error(kind):
    """Over seeds the squares of the ratios have mean 1 and a standard deviation of at most √(2 / SIZE)."""
    after = W + CHANGES[kind]()
    exact = np.linalg.norm(after.astype(float) - W) / np.linalg.norm(W.astype(float))
    seeds = 60
    ratios = np.array([relative_change(sketch(after, s), sketch(W, s)) / exact for s in range(seeds)])
    deviation = (2 / SIZE) ** 0.5
    assert abs(np.mean(ratios**2) - 1) < 4 * deviation / seeds**0.5
    assert np.std(ratios**2) < 1.4 * deviation
    assert np.std(ratios) < 1.4 * STANDARD_ERROR


def test_one_matrix_has_one_sketch_in_every_form():
    whole = sketch(W, 3)
    assert whole.norm == pytest.approx(np.linalg.norm(W), rel=1e-6)
    for form in (torch.tensor(W), torch.tensor(W).requires_grad_(), W.astype("float64"), np.asfortranarray(W)):
        assert sketch(form, 3).same(whole)
    assert not sketch(W, 4).same(whole)
    left, right = RANDOM.standard_normal((8, 2)), RANDOM.standard_normal((2, 9))
    assert np.allclose(sketch(Product(left, right), 0).sums, sketch(left @ right, 0).sums)
    stack = W.reshape(3, 20, -1)
    assert np.allclose(sketch(stack, 3).sums, whole.sums)
    narrow = torch.tensor(W).bfloat16()
    assert sketch(narrow, 3).same(sketch(narrow.double(), 3))


def test_parts_of_a_large_matrix_are_drawn_for_alone(monkeypatch):
    """Two rows that are equal do not fall into the same sums: their difference would be invisible."""
    from htsr.spectra import sketch as module

    monkeypatch.setattr(module, "_CHUNK", W.shape[1])
    moved = W.copy()
    moved[0] += 1
    moved[1] -= 1
    exact = np.linalg.norm(moved - W) / np.linalg.norm(W)
    assert relative_change(sketch(moved, 0), sketch(W, 0)) == pytest.approx(exact, rel=5 * STANDARD_ERROR)


def test_what_has_no_length_has_no_number():
    nothing, broken = sketch(np.zeros((4, 4)), 0), sketch(np.full((4, 4), np.nan), 0)
    some = sketch(np.eye(4), 0)
    assert relative_change(some, nothing) is None
    assert relative_change(some, broken) is None
    assert relative_change(broken, some) is None
