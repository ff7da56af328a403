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
    from htsr.matrices.sources import Filter, Model, WeightMatrix
    from htsr.spectra.esd import ESD, Windows, esd
    from htsr.spectra.metrics import LayerMetrics, Options
    from htsr.spectra.tail import PowerLawFit, fit_power_law
    from htsr.training.layerwise import layerwise, multipliers
    from htsr.training.policy import Policy
    from htsr.training.schedulers import LayerwiseLR

_HOMES = {
    "htsr.analysis": ("Analysis", "Progress", "analyze", "describe"),
    "htsr.comparison": ("Comparison", "compare"),
    "htsr.errors": ("HtsrError", "MatrixError", "MissingDependencyError", "SourceError", "UsageError"),
    "htsr.matrices.sources": ("Filter", "Model", "WeightMatrix"),
    "htsr.spectra.esd": ("ESD", "Windows", "esd"),
    "htsr.spectra.metrics": ("LayerMetrics", "Options"),
    "htsr.spectra.tail": ("PowerLawFit", "fit_power_law"),
    "htsr.training.layerwise": ("layerwise", "multipliers"),
    "htsr.training.policy": ("Policy",),
    "htsr.training.schedulers": ("LayerwiseLR",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ESD",
    "Analysis",
    "Comparison",
    "Filter",
    "HtsrError",
    "LayerMetrics",
    "LayerwiseLR",
    "MatrixError",
    "MissingDependencyError",
    "Model",
    "Options",
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
    "multipliers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'htsr' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
