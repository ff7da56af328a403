from dataclasses import replace

import numpy as np
import pytest
import torch

from reports.setol_mlp3.training import Digits, Epoch, diverged, initial, logits_of, loss_and_error, read_idx, train


@pytest.fixture
def digits():
    random = np.random.default_rng(0)
    x = random.random((97, 784), dtype=np.float32)
    y = random.integers(0, 10, 97)
    return Digits((x, y), (x[:20], y[:20]), (x[:20], y[:20]))


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_an_epoch_is_that_of_torch_on_the_mean_loss(digits, batch):
    network = initial(3)
    layers = [torch.nn.Linear(W.shape[1], W.shape[0]) for W, _ in network]
    with torch.no_grad():
        for layer, (W, b) in zip(layers, network, strict=True):
            layer.weight.copy_(torch.from_numpy(W))
            layer.bias.copy_(torch.from_numpy(b))
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    order = np.random.default_rng((7, 1)).permutation(97)
    total = 0.0
    for start in range(0, 97, batch):
        chosen = order[start : start + batch]
        x, y = (torch.from_numpy(part[chosen]) for part in digits.train)
        loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
        total += float(loss.detach())
        optimizer.zero_grad()
        (loss / batch).backward()
        optimizer.step()
    (epoch,) = train(network, digits, lr=0.05, batch=batch, seed=7, max_epochs=1)
    assert epoch.train_loss == pytest.approx(total / 97, rel=1e-4)
    for layer, (W, b) in zip(layers, network, strict=True):
        np.testing.assert_allclose(W, layer.weight.detach(), atol=2e-6)
        np.testing.assert_allclose(b, layer.bias.detach(), atol=2e-6)
    x, y = digits.test
    expected = torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
    assert loss_and_error(network, x, y)[0] == pytest.approx(float(expected.detach()), rel=1e-4)


def test_adam_is_that_of_torch(digits):
    network = initial(3)
    expected = [torch.from_numpy(part.copy()).requires_grad_() for layer in network for part in layer]
    (x, y), adam = digits.train, torch.optim.Adam(expected, lr=1e-3)
    order = np.random.default_rng((7, 1)).permutation(97)
    for start in range(0, 97, 32):
        chosen = order[start : start + 32]
        activations = torch.from_numpy(x[chosen])
        for i in range(3):
            activations = activations @ expected[2 * i].T + expected[2 * i + 1]
            activations = activations.relu() if i < 2 else activations
        adam.zero_grad()
        torch.nn.functional.cross_entropy(activations, torch.from_numpy(y[chosen])).backward()
        adam.step()
    train(network, digits, lr=1e-3, batch=32, seed=7, optimizer="adam", max_epochs=1)
    for ours, theirs in zip((part for layer in network for part in layer), expected, strict=True):
        assert float(np.abs(ours - theirs.detach().numpy()).mean()) < 1e-6


def test_training_stops_when_the_loss_no_longer_falls(digits):
    network = initial(0)
    x, _ = digits.train
    own = replace(digits, train=(x, logits_of(network, x).argmax(axis=1)))  # better than guessing without training
    history = train(network, own, lr=1e-9, batch=32, seed=0, patience=3)
    assert len(history) == 4  # the first is the best, then three idle ones
    assert not diverged(history)
    assert diverged([Epoch(float("nan"), 0.0)])


def test_seeds_give_different_weights_and_the_same_seed_the_same():
    first, again, other = initial(0), initial(0), initial(1)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert abs(np.corrcoef(first[0][0].ravel(), other[0][0].ravel())[0, 1]) < 0.01
    assert first[0][0].std() == pytest.approx((2 / 1084) ** 0.5, rel=0.01)


def test_idx_files(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + np.array(values.shape, ">i4").tobytes()
    (tmp_path / "images").write_bytes(header + values.tobytes())
    np.testing.assert_array_equal(read_idx(tmp_path / "images"), values)
