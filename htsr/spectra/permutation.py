"""Permuted weights: the entries of a matrix in random order, which keeps them and destroys all correlation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BUCKETS = 64
_CHUNK = 1 << 18  # entries that are shuffled at a time
_DEAL_FROM = 1 << 22  # smaller matrices are shuffled whole


def permute_entries(matrix: npt.NDArray[np.floating], seed: int | tuple[int, ...]) -> npt.NDArray[np.floating]:
    """The entries of a matrix in random order.

    It is drawn and applied on the CPU, so that one seed gives one permutation whatever device then decomposes it.

    Args:
        matrix: (m, n); or (pieces, m, n), each piece permuted within itself.
        seed: seed of the permutation; the same seed and shape give the same permutation.

    Returns:
        A new array of the same shape and dtype.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.permutation import permute_entries
        >>> W = np.arange(6.0).reshape(2, 3)
        >>> noise = permute_entries(W, seed=0)
        >>> noise.shape, np.sort(noise, axis=None).tolist()
        ((2, 3), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    """
    random = np.random.Generator(np.random.SFC64(seed))
    if matrix.ndim == 3:
        return np.stack([_shuffled(piece, random) for piece in matrix])
    return _shuffled(matrix, random)


def _shuffled(matrix: npt.NDArray[np.floating], random: np.random.Generator) -> npt.NDArray[np.floating]:
    """A uniformly random permutation, worked within the cache (Rao 1961, Sandelius 1962).

    Chunks are shuffled and dealt to buckets in multinomial shares, so each entry's bucket is independent of all others;
    then the buckets are shuffled. On a large matrix half the time of one shuffle of the whole.
    """
    flat = matrix.ravel()
    if flat.size <= _DEAL_FROM:
        return _in_random_order(flat, random).reshape(matrix.shape)
    buckets: list[list[npt.NDArray[np.floating]]] = [[] for _ in range(_BUCKETS)]
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        shares = random.multinomial(chunk.size, np.full(_BUCKETS, 1 / _BUCKETS))
        parts = np.split(_in_random_order(chunk, random), np.cumsum(shares)[:-1])
        for bucket, part in zip(buckets, parts, strict=True):
            bucket.append(part)
    dealt = (np.concatenate(bucket) for bucket in buckets)
    return np.concatenate([_in_random_order(part, random) for part in dealt]).reshape(matrix.shape)


def _in_random_order(flat: npt.NDArray[np.floating], random: np.random.Generator) -> npt.NDArray[np.floating]:
    """A copy, shuffled as float64: NumPy swaps items of 8 bytes twice as fast as those of 4, and no index is made and
    followed, as `flat[random.permutation(flat.size)]` would, with the same result.
    """
    copy = flat.astype(np.float64)
    random.shuffle(copy)
    return copy.astype(flat.dtype)
