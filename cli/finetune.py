"""What `htsr finetune` does, once its arguments are understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from htsr_cli.output import Target, Words

from htsr.finetuning.reading import check_options, read_keys
from htsr.finetuning.run_folder import check_output
from htsr.ranks import is_first


def finetune(config: str, changes: dict[str, Any], words: Words, target: Target, *, resume: bool) -> int:
    """Read the recipe, run it, and say what came of it on the first process; returns the exit code."""
    recipe = read_keys(config, {key: value for key, value in changes.items() if value is not None})
    check_output(Path(recipe.output), resume)  # before what takes long to import
    first = is_first()
    with words.of_others():
        check_options(recipe)
        from htsr.finetuning.checkpoints import last_checkpoint
        from htsr.finetuning.run import finetune as run

        try:
            result = run(recipe, resume=resume, say=words.say if first else lambda _: None)
        except KeyboardInterrupt:
            last = last_checkpoint(Path(recipe.output))
            words.say(f"htsr: interrupted; --resume {f'goes on from {last.path.name}' if last else 'begins again'}")
            return 130
    if first:
        target.write(result, words)
        if resume:
            words.say("htsr: the train loss is the mean over all steps, those of earlier runs included")
    return 0
