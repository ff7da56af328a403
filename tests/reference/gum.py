"""Slow, obvious twin of GUM: one matrix, float64, line by line as in algorithm 2 of arXiv 2510.17802."""

import numpy as np


def newton_schulz(M):
    if M.shape[0] > M.shape[1]:
        return newton_schulz(M.T).T
    X = M / np.linalg.norm(M)
    for _ in range(5):
        X = 3.4445 * X - 4.775 * (X @ X.T) @ X + 2.0315 * (X @ X.T) @ (X @ X.T) @ X
    return X


def gum(W, gradients, lr, rank, every, drawn, q, base):
    """The weight after each gradient; `drawn`: whether the matrix is drawn, for each period.

    With ``muon`` the momentum is the paper's, β·R + G without (1 - β) and without Nesterov.
    """
    rows, columns = W.shape
    if rows < columns:
        transposed = gum(W.T, [G.T for G in gradients], lr, rank, every, drawn, q, base)
        return [after.T for after in transposed]
    W, after = W.copy(), []
    for t, G in enumerate(gradients):
        if t % every == 0:
            P = np.linalg.svd(G, full_matrices=False)[2][:rank].T
            full = drawn[t // every]
            R = m = v = 0.0
            k = 0
        k += 1
        used = (G - G @ P @ P.T) / q if full else G @ P / (1 - q)
        if base == "muon":
            R = 0.95 * R + used
            step = 0.2 * np.sqrt(max(rows, columns)) * newton_schulz(R)
        else:
            m, v = 0.9 * m + 0.1 * used, 0.999 * v + 0.001 * used**2
            step = m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
        W = W - lr * (step if full else step @ P.T)
        after.append(W)
    return after
