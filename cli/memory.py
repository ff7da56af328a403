"""The `htsr memory` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from htsr_cli.options import (
    Format,
    Output,
    Quiet,
    Revision,
    Verbose,
)

if TYPE_CHECKING:
    from htsr_cli.output import Words

    from htsr.training.memory.plan import MemoryPlans, TrainingMethod


def memory(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hub id, folder with a config.json, or .gguf file; weights are not read."),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(help="full, lora, qlora, galore, apollo, gum, lisa, owlore; repeatable, and all by default."),
    ] = None,
    seq: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per backward pass.")] = 1,
    accumulation: Annotated[int, typer.Option(min=1, help="Backward passes of a step.")] = 1,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rank of the adapters (8), or of the gradients' subspaces (128, apollo 256; less in a small model).",
            show_default=False,
        ),
    ] = None,
    active_blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Blocks that lisa, owlore, gum and, if given, lora and qlora train at a time (2).",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the weights: float32, bfloat16, float16; by default the model's.")
    ] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Activation checkpointing.")] = False,
    state_dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of Adam's moments: float32, bfloat16, 8bit; by default as the optimizer makes them."),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="Embedding and head: freeze (default of lisa and owlore), train, "
            "lowrank (galore, apollo, gum, owlore)."
        ),
    ] = None,
    gradients: Annotated[
        str, typer.Option(help="Gradients of galore, apollo, gum and owlore, as in a recipe: keep, project, update.")
    ] = "keep",
    rounding: Annotated[
        str | None,
        typer.Option(help="Rounding of narrow weights, as in a recipe: stochastic (default), kahan, master, nearest."),
    ] = None,
    frozen_weights: Annotated[
        str,
        typer.Option(
            help="Where frozen blocks of lora, lisa and owlore live: device; host or disk to stream them from."
        ),
    ] = "device",
    logits: Annotated[
        str,
        typer.Option(
            help="How the loss reads logits: whole (a loop of your own); in `htsr finetune` fused (GPU), chunked (CPU)."
        ),
    ] = "whole",
    revision: Revision = None,
    format: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Peak memory of training, by part, without loading the model.

    For example:  [bold]htsr memory meta-llama/Llama-2-7b-hf --batch 1 --seq 1024 --checkpointing[/bold]
    """
    from htsr_cli.output import Target, Words

    options = {
        "sequence": seq,
        "batch": batch,
        "accumulation": accumulation,
        "rank": rank,
        "active_blocks": active_blocks,
        "dtype": dtype,
        "checkpointing": checkpointing,
        "state_dtype": state_dtype,
        "embeddings": embeddings,
        "gradients": gradients,
        "rounding": rounding,
        "frozen_weights": frozen_weights,
        "logits": logits,
        "revision": revision,
    }
    words = Words(quiet, verbose)
    Target.of(context).write(_plans(model, method, options, words), words)


def _plans(name: str, methods: list[str] | None, options: dict[str, Any], words: Words) -> MemoryPlans:
    """A plan for each method; an option goes to those that it has a meaning for, unless one alone is asked for."""
    from htsr.errors import UsageError
    from htsr.training.memory.plan import DRAWN, METHODS, STREAMED, MemoryPlans
    from htsr.training.memory.prediction import embeddings_fit, gradients_fit, predict_memory

    asked = cast("list[TrainingMethod]", methods or list(METHODS))
    plans = []
    for method in asked:
        mine = dict(options)
        wanted = mine["embeddings"]
        if len(asked) > 1 and method in METHODS and wanted and not embeddings_fit(method, wanted):
            mine["embeddings"] = None
        if len(asked) > 1 and method in METHODS and not gradients_fit(method, mine["gradients"]):
            mine["gradients"] = "keep"
        if len(asked) > 1 and method in METHODS and method not in STREAMED:
            mine["frozen_weights"] = "device"
        if len(asked) > 1 and method in METHODS and method not in DRAWN:
            mine["active_blocks"] = None
        try:
            with words.of_others():
                plans.append(predict_memory(name, method, **mine))
        except UsageError as error:
            if methods or method != "gum":  # what the others take is no fault: a model of one block has none to draw
                raise
            words.say(f"htsr: gum is left out: {error}")
    stay = [method for method in asked if method not in STREAMED]
    if stay and options["frozen_weights"] != "device":
        words.say(f"htsr: the weights of {', '.join(stay)} are on the device: --frozen-weights is for sampled blocks")
    return MemoryPlans(name, tuple(plans))
