"""The recipes of `htsr finetune` under the name that they had in 0.1.0: `from htsr.recipe import read_recipe`."""

from __future__ import annotations

from htsr.finetuning.reading import read_recipe

__all__ = ["read_recipe"]
