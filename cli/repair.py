"""The `htsr repair` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from htsr_cli.options import (
    Block,
    Exclude,
    ExcludeRole,
    Format,
    Include,
    MaxSize,
    MinSize,
    Quiet,
    Revision,
    Role,
    Table,
    Verbose,
)


def repair(
    context: typer.Context,
    tuned: Annotated[
        str, typer.Argument(metavar="FINE_TUNED", help="Hub id, folder, .safetensors/.bin/.pt file, or LoRA adapter.")
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="What it was fine-tuned from; an adapter's is the one that it names."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.", show_default=False)
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="denoise (Gavish-Donoho threshold), ecs, leading (K directions), intruders (shrink them), interpolate."
        ),
    ] = "denoise",
    factor: Annotated[
        float | None, typer.Option(help="Of the change (interpolate: 0.5) or of the intruders (0.75).")
    ] = None,
    k: Annotated[
        int | None,
        typer.Option("--k", metavar="K", help="Leading directions kept (leading) or looked at (intruders): 10."),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Cosine with the base's directions below which one is an intruder: 0.5.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; say what would change, and count intruders.")
    ] = False,
    revision: Revision = None,
    include: Include = None,
    exclude: Exclude = None,
    role: Role = None,
    exclude_role: ExcludeRole = None,
    block: Block = None,
    min_size: MinSize = 1,
    max_size: MaxSize = None,
    format: Format = None,
    table: Table = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """A fine-tuned model with less of its change, as a checkpoint (or adapter) that loads.

    For example:  [bold]htsr repair ./fine-tuned --against BASE --method denoise --output ./repaired[/bold]
    """
    from htsr_cli import run
    from htsr_cli.output import Target, Words

    from htsr.analysis.repair import repair as operate
    from htsr.errors import UsageError

    if dry_run == (output is not None):
        raise UsageError(
            "a dry run writes nothing: leave --output or --dry-run out" if dry_run
            else "say where to write: --output DIR, or --dry-run to see what would change"
        )  # fmt: skip
    words, target = Words(quiet, verbose), Target.of(context, "table")
    where = run.Choice(include, exclude, role, block, min_size, max_size, exclude_role).filter
    result = operate(
        tuned, against, output, method,  # type: ignore[arg-type]
        factor=factor, k=k, epsilon=epsilon, where=where, revision=revision,
    )  # fmt: skip
    target.write(result, words)
