"""`htsr finetune` for launchers that start a module, and for Python.

accelerate launch -m htsr.finetune --config recipe.yaml

from htsr.finetune import finetune, read_recipe
result = finetune(read_recipe("recipe.yaml"))
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htsr.finetuning.reading import read_recipe
    from htsr.finetuning.run import finetune

__all__ = ["finetune", "read_recipe"]


def __getattr__(name: str) -> Any:  # what they import takes seconds, and the command refuses bad arguments before
    if name == "finetune":
        from htsr.finetuning.run import finetune

        return finetune
    if name == "read_recipe":
        from htsr.finetuning.reading import read_recipe

        return read_recipe
    raise AttributeError(f"module 'htsr.finetune' has no attribute {name!r}")


if __name__ == "__main__":
    from htsr_cli.main import main

    sys.exit(main(["finetune", *sys.argv[1:]]))
