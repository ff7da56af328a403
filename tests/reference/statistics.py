"""Slow, obvious twins of the statistics: the definitions, line by line, in float64."""

import bisect
import functools
import math

import mpmath


def tail_exponent(tail):
    """α = 1 + n / Σ ln(λ/λ_min)."""
    return 1 + len(tail) / sum(math.log(x / tail[0]) for x in tail)


def one_sided_distance(tail, alpha):
    """max | fitted CDF - (j-i)/n |, j the first of equals; of an ascending tail."""
    n = len(tail)
    return max(abs(1 - (x / tail[0]) ** (1 - alpha) - bisect.bisect_left(tail, x) / n) for x in tail)


def ks_fit(eigenvalues):
    """(α, D, λ_min, n) of the candidate λ_min of smallest D."""
    values = sorted(eigenvalues)
    best = None
    for i in range(len(values) - 1):
        tail = values[i:]
        if tail[0] == tail[-1] or (i and tail[0] == values[i - 1]):
            continue
        alpha = tail_exponent(tail)
        D = one_sided_distance(tail, alpha)
        if best is None or best[1] > D:
            best = (alpha, D, tail[0], len(tail))
    return best


def goodness_of_fit(eigenvalues, shares):
    """Clauset et al. 2009, §4.1: the share of semi-parametric samples that fit no better; each from uniform numbers.

    A number u below n/K is an eigenvalue of the fitted tail, above which u·K/n of the tail lies; another is the body's.
    """
    values = sorted(eigenvalues)
    alpha, D, lambda_min, n = ks_fit(values)
    K = len(values)
    worse = 0
    for row in shares:
        sample = []
        for u in row:
            if u < n / K:
                sample.append(lambda_min * (u * K / n) ** (-1 / (alpha - 1)))
            else:
                sample.append(values[int((1 - u) * K)])
        worse += ks_fit(sample)[1] >= D
    return worse / len(shares)


def hill(eigenvalues):
    """LLR's code: n counts the zero term."""
    values = sorted(eigenvalues)
    return tail_exponent(values[len(values) // 2 :])


def hill_paper(eigenvalues):
    """LLR's text: 1 + k / Σ_{i=1..k} ln(λ_{M-i+1} / λ_{M-k}), k = ⌊M/2⌋, λ_1 the smallest."""
    values = sorted(eigenvalues)
    M = len(values)
    k = M // 2
    one_based = [None, *values]
    return 1 + k / sum(math.log(one_based[M - i + 1] / one_based[M - k]) for i in range(1, k + 1))


def erg_count(eigenvalues):
    """Smallest k whose k largest rescaled eigenvalues multiply to less than 1; None if no k does."""
    M, total = len(eigenvalues), sum(eigenvalues)
    logs = 0.0
    for k, x in enumerate(sorted((e for e in eigenvalues if e > 0), reverse=True), start=1):
        logs += math.log(x * M / total)
        if logs < 0:
            return k
    return None


def entropy(eigenvalues):
    """-Σ p ln p / ln(rank)."""
    positive = [x for x in eigenvalues if x > 0]
    total = sum(positive)
    return -sum(x / total * math.log(x / total) for x in positive) / math.log(len(positive))


def mp_density(x, Q):
    """Marchenko-Pastur density of λ/(N σ²), ratio 1/Q."""
    low, high = (1 - Q**-0.5) ** 2, (1 + Q**-0.5) ** 2
    return Q * math.sqrt(max((high - x) * (x - low), 0.0)) / (2 * math.pi * x)


def log_exponential(x, Lambda):
    """ln of Λ exp(-Λ(x-1)), x ≥ 1."""
    return math.log(Lambda) - Lambda * (x - 1)


def log_stretched_exponential(x, Lambda, beta):
    """ln of βΛ (Λx)^(β-1) exp(Λ^β - (Λx)^β), x ≥ 1."""
    return math.log(beta * Lambda) + (beta - 1) * math.log(Lambda * x) + Lambda**beta - (Lambda * x) ** beta


def log_lognormal(x, mu, sigma):
    """ln of √(2/π)/(σ erfc(-μ/√2σ)) exp(-(ln x - μ)²/2σ²)/x, x ≥ 1."""
    return -math.log(x) - ((math.log(x) - mu) / sigma) ** 2 / 2 - _log_half_normal(mu, sigma)


def log_truncated_power_law(x, alpha, Lambda):
    """ln of Λ^(1-α)/Γ(1-α, Λ) x^(-α) exp(-Λx), x ≥ 1; Λ > 0."""
    return -alpha * math.log(x) - Lambda * x - _log_gamma(alpha, Lambda)


@functools.lru_cache(maxsize=64)
def _log_half_normal(mu, sigma):
    return float(mpmath.log(mpmath.sqrt(mpmath.pi / 2) * sigma * mpmath.erfc(-mu / (mpmath.sqrt(2) * sigma))))


@functools.lru_cache(maxsize=64)
def _log_gamma(alpha, Lambda):
    return float(mpmath.log(mpmath.gammainc(1 - alpha, Lambda)) + (alpha - 1) * mpmath.log(Lambda))
