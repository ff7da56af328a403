"""htsr reads the quality of a neural network out of its weight spectra, and trains with it.

import htsr

analysis = htsr.analyze(model_or_path)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from htsr._version import __version__

if TYPE_CHECKING:
    from htsr.analysis import Analysis, Progress, analyze, describe
    from htsr.comparison import Comparison, compare
    from htsr.errors import HtsrError, MatrixError, MissingDependencyError, SourceError, UsageError
    from htsr.matrices.models import Filter, Model, WeightMatrix
    from htsr.outliers import OutlierRow, Outliers, measure_outliers
    from htsr.spectra.esd import ESD, esd
    from htsr.spectra.metrics import LayerMetrics, Options
    from htsr.spectra.projection import project_tail, remove_traps
    from htsr.spectra.tail import PowerLawFit, fit_power_law
    from htsr.spectra.windows import Windows
    from htsr.surgery import project
    from htsr.training.adapters import lora_config
    from htsr.training.callbacks import LayerSamplerCallback, LayerwiseCallback
    from htsr.training.groups import per_group
    from htsr.training.layerwise import layerwise, multipliers, remove_layerwise
    from htsr.training.lowrank import LowRankAdamW
    from htsr.training.lowrank_groups import low_rank_groups
    from htsr.training.memory import MemoryPlan, predict_memory
    from htsr.training.plan import Plan, layerwise_plan
    from htsr.training.policy import Policy
    from htsr.training.sampling import LayerSampler
    from htsr.training.schedulers import LayerwiseLR
    from htsr.training.spectral_projection import spectral_projection

_HOMES = {
    "htsr.analysis": ("Analysis", "Progress", "analyze", "describe"),
    "htsr.comparison": ("Comparison", "compare"),
    "htsr.errors": ("HtsrError", "MatrixError", "MissingDependencyError", "SourceError", "UsageError"),
    "htsr.matrices.models": ("Filter", "Model", "WeightMatrix"),
    "htsr.outliers": ("OutlierRow", "Outliers", "measure_outliers"),
    "htsr.spectra.esd": ("ESD", "esd"),
    "htsr.spectra.metrics": ("LayerMetrics", "Options"),
    "htsr.spectra.projection": ("project_tail", "remove_traps"),
    "htsr.spectra.tail": ("PowerLawFit", "fit_power_law"),
    "htsr.spectra.windows": ("Windows",),
    "htsr.surgery": ("project",),
    "htsr.training.adapters": ("lora_config",),
    "htsr.training.callbacks": ("LayerSamplerCallback", "LayerwiseCallback"),
    "htsr.training.groups": ("per_group",),
    "htsr.training.layerwise": ("layerwise", "multipliers", "remove_layerwise"),
    "htsr.training.plan": ("Plan", "layerwise_plan"),
    "htsr.training.lowrank": ("LowRankAdamW",),
    "htsr.training.lowrank_groups": ("low_rank_groups",),
    "htsr.training.memory": ("MemoryPlan", "predict_memory"),
    "htsr.training.policy": ("Policy",),
    "htsr.training.sampling": ("LayerSampler",),
    "htsr.training.schedulers": ("LayerwiseLR",),
    "htsr.training.spectral_projection": ("spectral_projection",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ESD",
    "Analysis",
    "Comparison",
    "Filter",
    "HtsrError",
    "LayerMetrics",
    "LayerSampler",
    "LayerSamplerCallback",
    "LayerwiseCallback",
    "LayerwiseLR",
    "LowRankAdamW",
    "MatrixError",
    "MemoryPlan",
    "MissingDependencyError",
    "Model",
    "Options",
    "OutlierRow",
    "Outliers",
    "Plan",
    "Policy",
    "PowerLawFit",
    "Progress",
    "SourceError",
    "UsageError",
    "WeightMatrix",
    "Windows",
    "__version__",
    "analyze",
    "compare",
    "describe",
    "esd",
    "fit_power_law",
    "layerwise",
    "layerwise_plan",
    "lora_config",
    "low_rank_groups",
    "measure_outliers",
    "multipliers",
    "per_group",
    "predict_memory",
    "project",
    "project_tail",
    "remove_layerwise",
    "remove_traps",
    "spectral_projection",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'htsr' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
