"""htsr reads the quality of a neural network out of its weight spectra, and trains with it.

import htsr

analysis = htsr.analyze(model_or_path)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from htsr._version import __version__

if TYPE_CHECKING:
    from htsr.analysis.analyze import Progress, analyze, describe
    from htsr.analysis.comparing import compare
    from htsr.analysis.comparison import Comparison
    from htsr.analysis.repair import repair
    from htsr.analysis.repair_result import Repair
    from htsr.analysis.result import Analysis
    from htsr.analysis.selection import Selection, SelectionRow, select
    from htsr.analysis.standouts import Standout
    from htsr.analysis.surgery import project
    from htsr.analysis.tracking import track
    from htsr.analysis.trajectory import Trajectory
    from htsr.calibration.outlier_scores import measure_outliers
    from htsr.calibration.outliers import OutlierRow, Outliers
    from htsr.errors import HtsrError, MatrixError, MissingDependencyError, SourceError, UsageError
    from htsr.matrices.models import Filter, Model, WeightMatrix
    from htsr.spectra.bulk import signal_to_noise
    from htsr.spectra.density import ESD
    from htsr.spectra.directions import project_tail
    from htsr.spectra.esd import esd
    from htsr.spectra.metrics import LayerMetrics, Options
    from htsr.spectra.tail import PowerLawFit, fit_power_law
    from htsr.spectra.traps import remove_traps
    from htsr.spectra.windows import Windows
    from htsr.training.callbacks import LayerSamplerCallback, LayerwiseCallback
    from htsr.training.layerwise.groups import per_group
    from htsr.training.layerwise.plan import Plan, layerwise_plan
    from htsr.training.layerwise.policy import Policy
    from htsr.training.layerwise.schedulers import LayerwiseLR
    from htsr.training.layerwise.wrapper import layerwise, log_values, multipliers, remove_layerwise
    from htsr.training.lora import lora_config
    from htsr.training.lowrank.groups import low_rank_groups
    from htsr.training.lowrank.gum import GUM
    from htsr.training.lowrank.gum_groups import gum_groups
    from htsr.training.lowrank.optimizer import LowRankAdamW
    from htsr.training.memory.plan import MemoryPlan
    from htsr.training.memory.prediction import predict_memory
    from htsr.training.monitoring.monitor import SpectralMonitor
    from htsr.training.sampling.sampler import LayerSampler
    from htsr.training.spectral_projection import spectral_projection
    from htsr.training.streaming.streaming import Streaming, stream_frozen

_HOMES = {
    "htsr.analysis.analyze": ("Progress", "analyze", "describe"),
    "htsr.analysis.result": ("Analysis",),
    "htsr.analysis.selection": ("Selection", "SelectionRow", "select"),
    "htsr.analysis.standouts": ("Standout",),
    "htsr.analysis.comparing": ("compare",),
    "htsr.analysis.comparison": ("Comparison",),
    "htsr.errors": ("HtsrError", "MatrixError", "MissingDependencyError", "SourceError", "UsageError"),
    "htsr.matrices.models": ("Filter", "Model", "WeightMatrix"),
    "htsr.calibration.outlier_scores": ("measure_outliers",),
    "htsr.calibration.outliers": ("OutlierRow", "Outliers"),
    "htsr.spectra.density": ("ESD",),
    "htsr.spectra.esd": ("esd",),
    "htsr.spectra.metrics": ("LayerMetrics", "Options"),
    "htsr.spectra.bulk": ("signal_to_noise",),
    "htsr.spectra.directions": ("project_tail",),
    "htsr.spectra.traps": ("remove_traps",),
    "htsr.spectra.tail": ("PowerLawFit", "fit_power_law"),
    "htsr.spectra.windows": ("Windows",),
    "htsr.analysis.surgery": ("project",),
    "htsr.analysis.repair": ("repair",),
    "htsr.analysis.repair_result": ("Repair",),
    "htsr.analysis.tracking": ("track",),
    "htsr.analysis.trajectory": ("Trajectory",),
    "htsr.training.lora": ("lora_config",),
    "htsr.training.callbacks": ("LayerSamplerCallback", "LayerwiseCallback"),
    "htsr.training.layerwise.groups": ("per_group",),
    "htsr.training.layerwise.wrapper": ("layerwise", "log_values", "multipliers", "remove_layerwise"),
    "htsr.training.layerwise.plan": ("Plan", "layerwise_plan"),
    "htsr.training.lowrank.optimizer": ("LowRankAdamW",),
    "htsr.training.lowrank.groups": ("low_rank_groups",),
    "htsr.training.lowrank.gum": ("GUM",),
    "htsr.training.lowrank.gum_groups": ("gum_groups",),
    "htsr.training.memory.prediction": ("MemoryPlan", "predict_memory"),
    "htsr.training.layerwise.policy": ("Policy",),
    "htsr.training.monitoring.monitor": ("SpectralMonitor",),
    "htsr.training.sampling.sampler": ("LayerSampler",),
    "htsr.training.layerwise.schedulers": ("LayerwiseLR",),
    "htsr.training.spectral_projection": ("spectral_projection",),
    "htsr.training.streaming.streaming": ("Streaming", "stream_frozen"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ESD",
    "GUM",
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
    "Repair",
    "Selection",
    "SelectionRow",
    "SourceError",
    "SpectralMonitor",
    "Standout",
    "Streaming",
    "Trajectory",
    "UsageError",
    "WeightMatrix",
    "Windows",
    "__version__",
    "analyze",
    "compare",
    "describe",
    "esd",
    "fit_power_law",
    "gum_groups",
    "layerwise",
    "layerwise_plan",
    "log_values",
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
    "repair",
    "select",
    "signal_to_noise",
    "spectral_projection",
    "stream_frozen",
    "track",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'htsr' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
