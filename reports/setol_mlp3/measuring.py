"""What is measured of a trained perceptron: spectra of its layers, and its error after surgery."""

from __future__ import annotations

from typing import Any

import numpy as np

import htsr
from htsr.errors import MatrixError
from htsr.spectra.erg import erg
from reports.setol_mlp3.training import Digits, Network, loss_and_error

LAYERS = ("FC1", "FC2")
DIRECTIONS = (10, 20, 40, 80)
_FIELDS = (
    "alpha", "sigma", "D", "num_pl_tail", "trace_log", "delta_lambda_min", "erg_num", "erg_gap_fraction",
    "quality_tail_norm", "quality_log", "quality_schatten", "quality_cumulant", "num_traps", "mean_shift",
    "mean_shift_threshold", "lambda_max", "alpha_hat", "stable_rank", "norm",
)  # fmt: skip


def layer_metrics(network: Network) -> dict[str, dict[str, float]]:
    """α, ERG, quality estimates and traps of FC1 and FC2."""
    import torch

    state = {f"{name}.weight": torch.from_numpy(W) for name, (W, _) in zip(LAYERS, network, strict=False)}
    analysis = htsr.analyze(state, permuted=True, quality=True, null=False, device="cpu")
    return {row.name: {field: getattr(row, field) for field in _FIELDS} for row in analysis}


def march(network: Network) -> list[float]:
    """α and Δλ_min of FC1, cheap enough for every epoch."""
    values = htsr.esd(network[0][0]).eigenvalues
    fit = htsr.fit_power_law(values)
    return [fit.alpha, erg(values, fit.lambda_min).delta_lambda_min]


def errors_after_surgery(network: Network, digits: Digits) -> dict[str, dict[str, Any]]:
    """Train and test error with FC1 and FC2 projected, without their tails, and without traps.

    "without the tail" is W minus its projection: what is left when the effective correlation space is taken out.
    """

    def error(changed: dict[int, Any]) -> dict[str, float]:
        other = [(changed.get(i, W), b) for i, (W, b) in enumerate(network)]
        return {"train": loss_and_error(other, *digits.train)[1], "test": loss_and_error(other, *digits.test)[1]}

    def projected(keep: Any, *, complement: bool = False) -> tuple[dict[int, Any], list[int]]:
        found = [htsr.project_tail(W, keep) for W, _ in network[:2]]
        return (
            {
                i: W - p.matrix if complement else p.matrix
                for i, ((W, _), p) in enumerate(zip(network, found, strict=False))
            },
            [p.kept for p in found],
        )

    result: dict[str, dict[str, Any]] = {"as trained": error({})}
    for name, keep, complement in (
        ("ECS", "erg", False),
        ("power-law tail", "tail", False),
        ("without the ECS", "erg", True),
        ("without the tail", "tail", True),
        *((f"{k} directions", k, False) for k in DIRECTIONS),
    ):
        try:
            changed, kept = projected(keep, complement=complement)
        except MatrixError:
            continue
        result[name] = {**error(changed), "kept": kept}
        if name == "ECS":
            result["ECS of FC1 only"] = error({0: changed[0]})
    cleaned = [htsr.remove_traps(W) for W, _ in network[:2]]
    if any(c.mean_removed or c.clipped for c in cleaned):
        result["without traps"] = {
            **error({i: np.asarray(c.matrix) for i, c in enumerate(cleaned)}),
            "traps": [[c.traps_before, c.traps_after] for c in cleaned],
            "mean_removed": [c.mean_removed for c in cleaned],
            "clipped": [c.clipped for c in cleaned],
        }
    return result
