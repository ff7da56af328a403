"""Slow, obvious twin of the low-rank optimizer: one matrix, float64, line by line as in the paper."""

import numpy as np


def adamw(W, gradients, lr, beta1, beta2, eps, weight_decay):
    """AdamW on a list of gradients; the weight after each."""
    W, m, v = W.copy(), np.zeros_like(W), np.zeros_like(W)
    after = []
    for t, G in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * G
        v = beta2 * v + (1 - beta2) * G**2
        W = W - lr * weight_decay * W
        W = W - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        after.append(W)
    return after


def galore(W, gradients, lr, beta1, beta2, eps, weight_decay, rank, scale, every, rotate):
    """GaLore's AdamW on a list of gradients, projectors by exact SVD; the weight after each."""
    rows, columns = W.shape
    if rows < columns:
        transposed = galore(
            W.T, [G.T for G in gradients], lr, beta1, beta2, eps, weight_decay, rank, scale, every, rotate
        )
        return [after.T for after in transposed]
    W, P = W.copy(), None
    m = v = np.zeros((rows, rank))
    after = []
    for t, G in enumerate(gradients, 1):
        if (t - 1) % every == 0:
            old, P = P, np.linalg.svd(G, full_matrices=False)[2][:rank].T
            if rotate and old is not None:
                C = P.T @ old
                m, v = m @ C.T, v @ (C.T**2)
        R = G @ P
        m = beta1 * m + (1 - beta1) * R
        v = beta2 * v + (1 - beta2) * R**2
        W = W - lr * weight_decay * W
        W = W - lr * scale * ((m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)) @ P.T
        after.append(W)
    return after


def apollo(W, gradients, projections, lr, beta1, beta2, eps, weight_decay, scale, every, by):
    """APOLLO's AdamW on a list of gradients, with the given projection in each period; the weight after each."""
    rows, columns = W.shape
    if rows < columns:
        transposed = apollo(
            W.T, [G.T for G in gradients], projections, lr, beta1, beta2, eps, weight_decay, scale, every, by
        )
        return [after.T for after in transposed]
    W, before, after = W.copy(), None, []
    m = v = np.zeros((rows, projections[0].shape[1]))
    for t, G in enumerate(gradients, 1):
        R = G @ projections[(t - 1) // every]
        m = beta1 * m + (1 - beta1) * R
        v = beta2 * v + (1 - beta2) * R**2
        D = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        if by == "channel":
            s = np.linalg.norm(D, axis=1, keepdims=True) / (np.linalg.norm(R, axis=1, keepdims=True) + 1e-8)
        else:
            s = np.linalg.norm(D) / (np.linalg.norm(R) + 1e-8)
        update = s * G
        uncorrected = np.linalg.norm(update) * (1 - beta1**t) / np.sqrt(1 - beta2**t)
        if before:
            limiter = max(uncorrected / (before + 1e-8), 1.01) / 1.01
            update, uncorrected = update / limiter, uncorrected / limiter
        before = uncorrected
        W = W - lr * weight_decay * W
        W = W - lr * scale * update
        after.append(W)
    return after
