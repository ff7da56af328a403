"""A three-layer perceptron (784-300-100-10, ReLU) under plain SGD or Adam, in NumPy and BLAS, fast on one thread.

Weights are (out, in), float32. SGD stores no gradients: `sgemm` adds -lr · Δᵀ X straight into W.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.linalg.blas import sgemm

from htsr.errors import MatrixError
from htsr.spectra.nudge import nudge as nudged

SIZES = (784, 300, 100, 10)
HELD_OUT = 6000  # of the 60,000 training images, as SETOL trains on 54,000
MIN_FALL = 1e-4
PATIENCE = 3
NUDGE_EVERY = 100  # steps, the default of htsr.spectral_projection

Floats = npt.NDArray[np.float32]
Network = list[tuple[Floats, Floats]]


@dataclass(frozen=True)
class Digits:
    """Images (n, 784) in [0, 1] and labels (n,)."""

    train: tuple[Floats, npt.NDArray[np.int64]]
    held_out: tuple[Floats, npt.NDArray[np.int64]]
    test: tuple[Floats, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Epoch:
    """What one pass gave: mean loss per image while training, and on the held-out images."""

    train_loss: float
    held_out_loss: float


def read_idx(file: Path) -> npt.NDArray[np.uint8]:
    """An array in MNIST's format: two zero bytes, a type, the number of axes, big-endian sizes, bytes."""
    data = file.read_bytes()
    axes = data[3]
    shape = np.frombuffer(data, ">i4", axes, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(tuple(int(n) for n in shape))


def load_digits(folder: Path, images: int | None = None) -> Digits:
    """MNIST from its four files; only the first `images` for training, if given."""

    def part(name: str) -> tuple[Floats, npt.NDArray[np.int64]]:
        x = read_idx(folder / f"{name}-images-idx3-ubyte").reshape(-1, SIZES[0]).astype(np.float32) / 255
        return x, read_idx(folder / f"{name}-labels-idx1-ubyte").astype(np.int64)

    (x, y), test = part("train"), part("t10k")
    train, held_out = (x[:-HELD_OUT][:images], y[:-HELD_OUT][:images]), (x[-HELD_OUT:], y[-HELD_OUT:])
    return Digits(train, held_out, test)


def drawn_digits(images: int) -> Digits:
    """In place of MNIST, to show that all runs: ten random pictures, each drawn anew with noise, for every part."""
    random = np.random.default_rng(0)
    pictures = random.random((SIZES[-1], SIZES[0]), dtype=np.float32)

    def part(count: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        labels = random.integers(0, len(pictures), count)
        noise = random.random((count, SIZES[0]), dtype=np.float32)
        return ((pictures[labels] + 3 * noise) / 16).astype(np.float32), labels  # as dark as MNIST

    return Digits(part(images), part(images // 6), part(images // 6))


def initial(seed: int) -> Network:
    """Glorot-normal weights and zero biases, different for every seed."""
    random = np.random.default_rng((seed, 0))
    return [
        (
            (random.standard_normal((out, inner)) * (2 / (out + inner)) ** 0.5).astype(np.float32),
            np.zeros(out, np.float32),
        )
        for inner, out in itertools.pairwise(SIZES)
    ]


def train(
    network: Network,
    digits: Digits,
    *,
    lr: float,
    batch: int,
    seed: int,
    optimizer: str = "sgd",
    patience: int = PATIENCE,
    nudge: float = 0.0,
    max_epochs: int = 400,
    on_epoch: Callable[[int, Epoch], None] | None = None,
) -> list[Epoch]:
    """Train in place until the loss of an epoch has fallen by less than 1e-4 below its best, `patience` epochs running.

    Args:
        network: from `initial`.
        digits: the data.
        lr: learning rate of the mean loss of a mini-batch, constant.
        batch: images per step.
        seed: of the order of the images.
        optimizer: "sgd" or "adam" (β 0.9 and 0.999, ε 1e-8).
        patience: epochs without a fall before training stops.
        nudge: strength of the projection towards α = 2, every 100 steps, as `htsr.spectral_projection` has it.
        max_epochs: training stops then at the latest.
        on_epoch: called after each epoch.
    """
    random = np.random.default_rng((seed, 1))
    x, y = digits.train
    update = _Sgd(lr / batch) if optimizer == "sgd" else _Adam(network, lr)
    history: list[Epoch] = []
    best, idle, steps = np.inf, 0, 0
    for number in range(max_epochs):
        order = random.permutation(len(x))
        total = 0.0
        chunk = 64 * batch if batch > 1 else 1024
        for start in range(0, len(x), chunk):
            chosen = order[start : start + chunk]
            images, labels = x[chosen], y[chosen]
            for i in range(0, len(chosen), batch):
                loss, factors = _backward(network, images[i : i + batch], labels[i : i + batch])
                update(factors)
                steps += 1
                if nudge and steps % NUDGE_EVERY == 0:
                    project(network, nudge)
                total += loss
        epoch = Epoch(total / len(x), loss_and_error(network, *digits.held_out)[0])
        history.append(epoch)
        if on_epoch is not None:
            on_epoch(number, epoch)
        if diverged(history):
            break
        idle = 0 if epoch.train_loss < best - MIN_FALL else idle + 1
        best = min(best, epoch.train_loss)
        if idle >= patience:
            break
    return history


def project(network: Network, strength: float) -> None:
    """Nudge the spectra of all layers but the last, in place; those that cannot go towards α = 2 are left."""
    for W, _ in network[:-1]:
        try:
            W[:] = nudged(W, strength)[0]
        except MatrixError:
            continue


Factors = list[tuple[Floats, Floats, Floats, Floats]]


def _backward(network: Network, images: Floats, labels: npt.NDArray[np.int64]) -> tuple[float, Factors]:
    """The summed loss of a mini-batch, and W, b, Δ and X of each layer, where Δᵀ X is the gradient of W."""
    (W1, b1), (W2, b2), (W3, b3) = network
    h1 = images @ W1.T
    h1 += b1
    np.maximum(h1, 0, out=h1)
    h2 = h1 @ W2.T
    h2 += b2
    np.maximum(h2, 0, out=h2)
    logits = h2 @ W3.T
    logits += b3
    logits -= logits.max(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    picked = logits[rows, labels]
    np.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    loss = float(np.log(total).sum() - picked.sum())
    logits /= total
    logits[rows, labels] -= 1
    d3 = logits
    d2 = d3 @ W3
    d2 *= h2 > 0
    d1 = d2 @ W2
    d1 *= h1 > 0
    return loss, [(W3, b3, d3, h2), (W2, b2, d2, h1), (W1, b1, d1, images)]


class _Sgd:
    """A step of plain SGD on the summed loss; `lr` is that of the mean divided by the batch, also in a last short one."""

    def __init__(self, lr: float) -> None:
        self.lr = np.float32(lr)

    def __call__(self, factors: Factors) -> None:
        for W, b, delta, source in factors:
            sgemm(-self.lr, source.T, delta.T, beta=1, c=W.T, trans_b=1, overwrite_c=1)
            b -= self.lr * delta.sum(axis=0)


class _Adam:
    """A step of Adam on the mean loss."""

    def __init__(self, network: Network, lr: float) -> None:
        self.lr, self.steps = lr, 0
        self.moments = {id(p): (np.zeros_like(p), np.zeros_like(p)) for layer in network for p in layer}

    def __call__(self, factors: Factors) -> None:
        self.steps += 1
        size = np.float32(self.lr / (1 - 0.9**self.steps))
        corrected = np.float32(1 / (1 - 0.999**self.steps) ** 0.5)
        for W, b, delta, source in factors:
            for p, gradient in ((W, delta.T @ source), (b, delta.sum(axis=0))):
                gradient /= len(delta)
                first, second = self.moments[id(p)]
                first += np.float32(0.1) * (gradient - first)
                second += np.float32(0.001) * (gradient * gradient - second)
                p -= size * first / (np.sqrt(second) * corrected + np.float32(1e-8))


def logits_of(network: Network, x: Floats) -> Floats:
    """(n, 10)."""
    for i, (W, b) in enumerate(network):
        x = x @ W.T + b
        if i < len(network) - 1:
            np.maximum(x, 0, out=x)
    return x


def loss_and_error(network: Network, x: Floats, y: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Mean cross-entropy and share of wrong answers."""
    loss, wrong = 0.0, 0
    for start in range(0, len(x), 4096):
        logits, labels = logits_of(network, x[start : start + 4096]).astype(np.float64), y[start : start + 4096]
        logits -= logits.max(axis=1, keepdims=True)
        loss += float((np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]).sum())
        wrong += int((logits.argmax(axis=1) != labels).sum())
    return loss / len(x), wrong / len(x)


def diverged(history: list[Epoch]) -> bool:
    """Whether the last epoch's loss is no number, or worse than guessing."""
    return not history[-1].train_loss < np.log(SIZES[-1])
