"""The `htsr finetune` command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from htsr_cli.options import Format, Quiet, Table, Verbose

if TYPE_CHECKING:
    from htsr_cli.output import Words

    from htsr.finetuning.recipe import Recipe


def finetune(
    context: typer.Context,
    config: Annotated[
        str, typer.Option(help="The recipe: a YAML file, or one that htsr carries (`htsr recipe` lists them).")
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="Method in place of the recipe's: full, lora, qlora, lisa, owlore, galore, apollo, gum; or auto, the "
            "first that fits into the memory."
        ),
    ] = None,
    layerwise: Annotated[
        str | None, typer.Option(help="Policy in place of the recipe's: none, ends, llr, tempbalance, alphadecay.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder in place of the recipe's.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any key in place of the recipe's, as in training.learning_rate=1e-4; the value is YAML. Repeatable.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Train nothing: show the recipe, records as the model sees them, steps and memory."
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            help="For --check and --method auto: memory of the accelerator that will be used, as in 24GB.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")] = False,
    format: Format = None,
    table: Table = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a causal language model by a recipe; also as `accelerate launch -m htsr.finetune`.

    For example:  [bold]htsr finetune --config recipe.yaml --set training.learning_rate=1e-4 --check[/bold]
    """
    from htsr_cli.live import Live
    from htsr_cli.output import Target, Words

    from htsr.errors import UsageError
    from htsr.finetuning.reading import check_options, read_keys, read_recipe
    from htsr.finetuning.run_folder import check_output
    from htsr.ranks import is_first

    words, target = Words(quiet, verbose), Target.of(context, "table")
    given = {"method": method, "layerwise": layerwise, "output": output}
    changes = {key: value for key, value in given.items() if value is not None}
    if memory is not None and not (check or method == "auto"):
        raise UsageError("--memory is for --check, and for --method auto")
    if method == "auto":
        recipe = _chosen(config, changes, overrides or (), memory, words)
    elif check:  # everything that is wrong, which takes what is long to import
        with words.of_others():
            recipe = read_recipe(config, changes, overrides or ())
    else:
        recipe = read_keys(config, changes, overrides or ())
    if check:
        from htsr_cli.check import check as look

        raise typer.Exit(look(recipe, words, target, resume=resume, memory=memory))
    check_output(Path(recipe.output), resume)  # before what takes long to import
    first, live = is_first(), Live(words)
    with words.of_others():
        check_options(recipe)
        from htsr.finetuning.checkpoints import last_checkpoint
        from htsr.finetuning.run import finetune as run

        try:
            result = run(recipe, resume=resume, say=live.say, show=live.show)
        except KeyboardInterrupt:
            last = last_checkpoint(Path(recipe.output))
            live.say(f"htsr: interrupted; --resume {f'goes on from {last.path.name}' if last else 'begins again'}")
            raise typer.Exit(130) from None
        finally:
            live.clear()
    if first:
        target.write(result, words)
        if resume:
            words.say("htsr: the train loss is the mean over all steps, those of earlier runs included")


def _chosen(config: str, changes: dict[str, Any], overrides: Sequence[str], memory: str | None, words: Words) -> Recipe:
    """The recipe with the method that the memory is enough for; why that one goes to stderr."""
    from htsr.finetuning.auto import choose
    from htsr.finetuning.budget import parse_memory
    from htsr.ranks import is_first

    with words.of_others():
        choice = choose(config, changes, overrides, memory=None if memory is None else parse_memory(memory))
    if is_first():
        words.say(f"htsr: {choice.why}")
    return choice.recipe
