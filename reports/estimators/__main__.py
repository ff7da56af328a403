"""How α behaves as an estimator of a known exponent, and what a difference between two layers must be to mean something.

python -m reports.estimators            about 2 minutes of processor time on one core
python -m reports.estimators --quick    few draws, nothing kept
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from htsr.spectra.esd import Windows, esd
from htsr.spectra.resampling import bootstrap_alpha
from htsr.spectra.tail import FitMethod, fit_power_law
from reports import common
from reports.estimators import samples

HERE = Path(__file__).parent
METHODS = get_args(FitMethod)
NORMAL_95 = 1.96
POWER_80 = 0.84

Estimate = tuple[float, float, int]  # α, σ, eigenvalues in the tail


def main() -> None:
    """Run the study."""
    args = common.arguments(str(__doc__))
    warnings.filterwarnings("ignore")
    share = 0.03 if args.quick else 1.0

    def draws(count: int) -> int:
        return max(6, round(count * share))

    results = {
        "pure": pure(draws),
        "contaminated": contaminated(draws),
        "matrices": matrices(draws),
        "bootstrap": bootstrap(draws),
        "cpu_minutes": 0.0,
    }
    import time

    results["cpu_minutes"] = time.process_time() / 60
    if args.quick:
        print(f"{len(results['matrices'])} ensembles, {results['cpu_minutes']:.1f} minutes of processor time")
        print(common.table(MATRIX_HEAD, [matrix_row(row) for row in results["matrices"][:14]]))
        return
    common.keep(HERE, results)
    from reports.estimators.writing import write_up

    write_up(json.loads((HERE / "results.json").read_text()))


def fit(values: Any, method: str) -> Estimate:
    """α, σ and tail size."""
    found = fit_power_law(values, method)  # type: ignore[arg-type]
    return found.alpha, found.sigma, found.num_tail


def summary(estimates: list[Estimate], truth: float) -> dict[str, float]:
    """Bias, spread, the σ that the fit states, coverage of α ± 1.96 σ, and false alarms between equal layers.

    A false alarm is a pair of draws of the same law whose α differ by more than 1.96·√(σ₁² + σ₂²).
    """
    alpha, sigma, tail = (np.array(column, dtype=float) for column in zip(*estimates, strict=True))
    first, second = alpha[0::2][: alpha.size // 2], alpha[1::2][: alpha.size // 2]
    pooled = np.hypot(sigma[0::2][: first.size], sigma[1::2][: first.size])
    return {
        "truth": truth,
        "median": float(np.median(alpha)),
        "bias": float(alpha.mean() - truth),
        "sd": float(alpha.std(ddof=1)),
        "sigma": float(np.median(sigma)),
        "coverage": float((np.abs(alpha - truth) <= NORMAL_95 * sigma).mean()),
        "false_alarms": float((np.abs(first - second) > NORMAL_95 * pooled).mean()),
        "detectable": (NORMAL_95 + POWER_80) * 2**0.5 * float(alpha.std(ddof=1)),
        "tail": float(np.median(tail)),
        "draws": alpha.size,
    }


def pure(draws: Callable[[int], int]) -> list[dict[str, Any]]:
    """Independent samples of a power law that is all tail."""
    rows = []
    for size in (50, 100, 200, 400, 800):
        for alpha in (2.0, 3.0, 5.0):
            for method in METHODS:
                random = np.random.default_rng((1, size, round(10 * alpha)))
                count = draws(60 if method == "clip_xmax" and size > 200 else 300)
                taken = [fit(samples.pareto(random, alpha, size), method) for _ in range(count)]
                rows.append({"size": size, "method": method, **summary(taken, alpha)})
        print(f"pure, {size} eigenvalues: done", flush=True)
    return rows


def contaminated(draws: Callable[[int], int]) -> list[dict[str, Any]]:
    """A bulk below the tail."""
    rows = []
    for share in (0.1, 0.25, 0.5):
        for alpha in (2.0, 3.0, 5.0):
            for method in METHODS:
                random = np.random.default_rng((2, round(100 * share), round(10 * alpha)))
                count = draws(40 if method == "clip_xmax" else 120)
                taken = [fit(samples.contaminated(random, alpha, 400, share), method) for _ in range(count)]
                rows.append(
                    {"share": share, "true_tail": round(400 * share), "method": method, **summary(taken, alpha)}
                )
        print(f"contaminated, tail {share:.0%}: done", flush=True)
    return rows


ENSEMBLES: dict[str, Callable[..., Any]] = {
    "power-law population": samples.power_law_population,
    "heavy entries": samples.heavy_entries,
}


def matrices(draws: Callable[[int], int]) -> list[dict[str, Any]]:
    """Eigenvalues of random matrices, which repel each other, by ensemble, exponent and shape."""
    rows = []
    cases = [("power-law population", a, M, Q) for a in (2.0, 3.0, 5.0) for M, Q in ((256, 1), (256, 4))]
    cases += [("power-law population", 3.0, M, Q) for M, Q in ((256, 2), (256, 8), (100, 1), (768, 1), (768, 4))]
    cases += [("heavy entries", a, 256, Q) for a in (1.5, 2.5) for Q in (1, 4)]
    for ensemble, alpha, M, Q in cases:
        random = np.random.default_rng((3, M, Q, round(10 * alpha)))
        taken: dict[str, list[Estimate]] = {}
        for number in range(draws(80 if M <= 256 else 24)):
            W = ENSEMBLES[ensemble](random, alpha, M, Q * M)
            values = esd(W).positive
            windows = esd(W, windows=Windows(M // 2, 4)).positive
            for method in METHODS:
                if method != "clip_xmax" or number < 40:
                    taken.setdefault(method, []).append(fit(values, method))
            taken.setdefault("FARMS + hill", []).append(fit(windows, "hill"))
            if number < 24:
                taken.setdefault("FARMS + ks", []).append(fit(windows, "ks"))
        for method, estimates in taken.items():
            rows.append({"ensemble": ensemble, "M": M, "Q": Q, "method": method, **summary(estimates, alpha)})
        print(f"{ensemble}, α = {alpha}, {Q * M}×{M}: done", flush=True)
    return rows


def bootstrap(draws: Callable[[int], int]) -> list[dict[str, Any]]:
    """How often the 95 % bootstrap interval holds the exponent, and the α that the same fit has on average."""
    rows = []

    def population(random: np.random.Generator, alpha: float, M: int) -> Any:
        return esd(samples.power_law_population(random, alpha, M, M)).positive

    sources: dict[str, Callable[..., Any]] = {
        "independent, all tail": samples.pareto,
        "power-law population": population,
    }
    for source, make in sources.items():
        for size in (100, 200):
            for method in ("ks", "hill"):
                random = np.random.default_rng((4, size))
                spectra = [make(random, 3.0, size) for _ in range(draws(100))]
                alphas = np.array([fit(values, method)[0] for values in spectra])
                bounds = [bootstrap_alpha(values, method, resamples=100, seed=i) for i, values in enumerate(spectra)]
                low, high = np.array(bounds).T
                rows.append(
                    {
                        "source": source,
                        "size": size,
                        "method": method,
                        "holds_truth": float(((low <= 3.0) & (high >= 3.0)).mean()),
                        "holds_mean": float(((low <= alphas.mean()) & (high >= alphas.mean())).mean()),
                        "width": float(np.median(high - low)),
                        "needed": 2 * NORMAL_95 * float(alphas.std(ddof=1)),
                        "draws": len(spectra),
                    }
                )
            print(f"bootstrap, {source}, {size}: done", flush=True)
    return rows


MATRIX_HEAD = [
    "ensemble",
    "N×M",
    "true α",
    "estimator",
    "mean α",
    "bias",
    "sd",
    "stated σ",
    "coverage",
    "false alarms",
    "tail",
]


def matrix_row(row: dict[str, Any]) -> list[Any]:
    """One line of the table of matrices."""
    return [
        row["ensemble"], f"{row['Q'] * row['M']}×{row['M']}", row["truth"], row["method"], f"{row['truth'] + row['bias']:.2f}",
        f"{row['bias']:+.2f}", f"{row['sd']:.2f}", f"{row['sigma']:.2f}", f"{row['coverage']:.0%}",
        f"{row['false_alarms']:.0%}", int(row["tail"]),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
