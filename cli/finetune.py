"""What `htsr finetune` does, once its arguments are understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from htsr_cli.output import Words, console, is_first

from htsr.finetuning.reading import check_options, read_keys
from htsr.finetuning.run_folder import check_output


def finetune(config: str, changes: dict[str, Any], words: Words, *, resume: bool) -> None:
    """Read the recipe, run it, and print what came of it on the first process."""
    recipe = read_keys(config, {key: value for key, value in changes.items() if value is not None})
    check_output(Path(recipe.output), resume)  # before what takes long to import
    check_options(recipe)
    from htsr.finetuning.run import finetune as run

    first = is_first()
    result = run(recipe, resume=resume, say=words.say if first else lambda _: None)
    if first:
        out = console()
        for key, value in result.metrics.items():
            if key != "peak_of":
                label, shown = _line(key, value, result.metrics, resume)
                out.print(f"{label:24} {shown}")
        out.print(f"{'model':24} {result.output}")


def _line(key: str, value: Any, metrics: dict[str, Any], resumed: bool) -> tuple[str, str]:
    """A metric in words."""
    if key == "peak_mib":
        return "peak memory", f"{value:.0f} MiB ({metrics['peak_of']})"
    shown = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return key.replace("_", " "), shown + " over all steps" * (resumed and key == "train_loss")
