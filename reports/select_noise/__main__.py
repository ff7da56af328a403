"""What two signal-to-noise ratios say of pure noise, and of noise with planted directions.

    python -m reports.select_noise                        a minute on one core
    python -m reports.select_noise --spectrum FOLDER      beside Spectrum's own script, in a clone of its repository
    python -m reports.select_noise --quick                a few seconds

Spectrum (arXiv 2406.06623) picks the matrices to train by the sum of the singular values above an edge over the sum of
those below, divided by the largest. Its edge is q·(1 + √(M/N)), q the interquartile range of the singular values over
1.349. The edge of Marchenko and Pastur is σ(√N + √M), σ the standard deviation of the entries.
"""

from __future__ import annotations

import itertools
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import htsr
from htsr.spectra.signal import signal
from reports import common

HERE = Path(__file__).parent
SHAPES = ((192, 576), (512, 512), (512, 2048), (576, 1536), (1024, 4096))
SEEDS = 5
MATRICES, PLANTED = 30, ((256, 256), (256, 768), (256, 1024))
Vector = npt.NDArray[np.float64]
Published = Callable[[Vector, int, int], tuple[float, float]]


def published(singular: Vector, M: int, N: int) -> tuple[float, float]:
    """Spectrum's edge and score of descending singular values, in its own formulas."""
    low, high = np.quantile(singular, [0.25, 0.75])
    edge = float((high - low) / 1.349 * (1 + (M / N) ** 0.5))
    return edge, _score(singular, edge)


def from_clone(folder: Path) -> Published:
    """The same by the script in a clone of Spectrum's repository."""
    source = (folder / "spectrum.py").read_text()
    for name in ("prompt_toolkit", "prompt_toolkit.shortcuts"):  # its dialogue
        module = sys.modules.setdefault(name, types.ModuleType(name))
        module.checkboxlist_dialog = module.input_dialog = None  # type: ignore[attr-defined]
    script: dict[str, Any] = {"__name__": "spectrum"}
    exec(compile(source, "spectrum.py", "exec"), script)
    modifier = script["ModelModifier"]

    def both(singular: Vector, M: int, N: int) -> tuple[float, float]:
        import torch

        sigma = modifier.estimate_sigma_with_full_iqr(torch.from_numpy(singular))
        edge = float(modifier.marchenko_pastur_threshold(sigma, M, N))
        return edge, _score(singular, edge)

    return both


def _score(singular: Vector, edge: float) -> float:
    above = singular > edge
    below = float(singular[~above].sum()) or 1.0  # as the script has it
    return float(singular[above].sum()) / below / float(singular[0])


def noise(shapes: tuple[tuple[int, int], ...], seeds: int, theirs: Published) -> list[dict[str, Any]]:
    """Share of the singular values of noise above each edge, and both scores, at two scales of the entries."""
    found = []
    for M, N in shapes:
        for scale in (1.0, 0.02):
            rows = []
            for seed in range(seeds):
                W = scale * np.random.default_rng((seed, M, N)).standard_normal((M, N))
                singular = np.linalg.svd(W, compute_uv=False)
                edge, score = theirs(singular, M, N)
                bulk = htsr.select({"layers.0.up_proj.weight": W}, top=1.0).rows[0]
                ours = _above(singular, M, N)
                rows.append([float((singular > edge).mean()), score, ours, float(bulk.value or 0.0)])
            shares = np.mean(rows, axis=0)
            names = ("their_share", "their_score", "our_share", "our_score")
            found.append({"M": M, "N": N, "scale": scale} | dict(zip(names, map(float, shares), strict=True)))
    return found


def _above(singular: Vector, M: int, N: int) -> float:
    from htsr.spectra.bulk import fit_bulk

    values = singular[::-1] ** 2
    return float((values > fit_bulk(values, M, N).threshold).mean())


def planted(matrices: int, seeds: int, theirs: Published) -> list[dict[str, Any]]:
    """Spearman's correlation of both scores with the number of planted directions, weights of one scale and of many."""
    found = []
    for (M, N), spread in itertools.product(PLANTED, (0.0, 0.3)):
        rows = []
        for seed in range(seeds):
            random = np.random.default_rng((seed, 7))
            scores = []
            for k in range(matrices):
                W = random.standard_normal((M, N))
                left = np.linalg.qr(random.standard_normal((M, max(k, 1))))[0][:, :k]
                right = np.linalg.qr(random.standard_normal((N, max(k, 1))))[0][:, :k]
                W += 1.5 * (N**0.5 + M**0.5) * left @ right.T
                W *= np.exp(spread * random.standard_normal())
                singular = np.linalg.svd(W, compute_uv=False)
                scores.append([theirs(singular, M, N)[1], signal(singular[::-1] ** 2, M, N, 1)[2]])
            order = np.argsort(np.argsort(np.array(scores), axis=0), axis=0)
            rows.append([float(np.corrcoef(order[:, i], np.arange(matrices))[0, 1]) for i in (0, 1)])
        means, spreads = np.mean(rows, axis=0), np.std(rows, axis=0)
        found.append(
            {"M": M, "N": N, "spread": spread, "theirs": float(means[0]), "their_sd": float(spreads[0])}
            | {"ours": float(means[1]), "our_sd": float(spreads[1])}
        )
    return found


def files(folder: Path) -> list[dict[str, Any]]:
    """How many scores of the value matrices in Spectrum's published files are infinite."""
    found = []
    for path in sorted((folder / "model_snr_results").glob("*.json")):
        content = json.loads(path.read_text())
        values = {name: info for name, info in content.items() if name.endswith("v_proj") and "snr" in info}
        scores = [info["snr"] for info in values.values()]
        if infinite := sum(np.isinf(score) for score in scores):
            name = path.stem.removeprefix("snr_results_")
            median = float(np.median(scores))
            found.append(
                {
                    "file": name,
                    "infinite": int(infinite),
                    "of": len(scores),
                    "median": str(median) if np.isinf(median) else median,
                }
            )
    return found


def main() -> None:
    """Measure, and print or write."""
    args = common.arguments(str(__doc__), ("--spectrum", {"type": Path, "help": "a clone of Spectrum's repository"}))
    theirs = from_clone(args.spectrum) if args.spectrum else published
    if args.quick:
        rows = noise(((128, 512),), 1, theirs)
        print(json.dumps({"noise": rows, "planted": planted(6, 1, theirs)}, indent=1))
        sys.exit(not (rows[0]["their_share"] == 1.0 and rows[0]["our_share"] == 0.0))
    results = {
        "machine": common.machine(),
        "script": args.spectrum is not None,
        "noise": noise(SHAPES, SEEDS, theirs),
        "planted": planted(MATRICES, SEEDS, theirs),
        "files": files(args.spectrum) if args.spectrum else [],
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_up(results)


def write_up(results: dict[str, Any]) -> None:
    """README.md from the results."""
    rows = [
        [
            f"{r['M']} × {r['N']}", f"{r['scale']:g}", f"{r['their_share']:.0%}", f"{r['their_score']:.3g}",
            f"{r['our_share']:.1%}", f"{r['our_score']:.3g}",
        ]
        for r in results["noise"]
    ]  # fmt: skip
    order = [
        [
            f"{r['M']} × {r['N']}", f"{r['spread']:g}", f"{r['theirs']:.2f} ± {r['their_sd']:.2f}",
            f"{r['ours']:.2f} ± {r['our_sd']:.2f}",
        ]
        for r in results["planted"]
    ]  # fmt: skip
    by = "by the script of its repository" if results["script"] else "by its formulas"
    text = f"""# Signal and noise in a selection

`python -m reports.select_noise` makes this page. Spectrum (arXiv 2406.06623) trains the matrices with the most signal
above noise. Its edge of noise lacks a factor √N, so **the share of pure noise that is signal to it goes by the shape, and is
all of it where one side is four times the other**. The edge of `htsr select` is Marchenko and Pastur's, and it takes no
noise. Spectrum's numbers are computed {by}.

Gaussian noise, means of {SEEDS} draws: the share of the singular values above the edge, and the score.

{common.table(["shape", "sd of entries", "above Spectrum's edge", "its score", "above ours", "our score"], rows)}
Where everything is above the edge, Spectrum's script divides by 1 instead of by what is below, and scores of such a matrix
and of another do not compare. Where something is below, the division by the largest singular value gives the score the
units of 1/weight.

{MATRICES} matrices with 0 … {MATRICES - 1} planted directions at 1.5 times the edge of noise, in one scale and in scales that
differ by a standard deviation of 0.3 in the logarithm, as the layers of a role do. Spearman's correlation of the score with
the number of directions, mean and standard deviation of {SEEDS} seeds:

{common.table(["shape", "sd of ln(scale)", "Spectrum", "htsr select"], order)}
"""
    if results["files"]:
        listed = [[r["file"], f"{r['infinite']} of {r['of']}", str(r["median"])[:8]] for r in results["files"]]
        text += f"""The files of scores that Spectrum publishes hold infinite ones for value matrices, and where those are more than are taken,
the order of the file decides:

{common.table(["model", "infinite", "median"], listed)}"""
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    main()
