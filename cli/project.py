"""The `htsr project` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from htsr_cli.options import (
    Block,
    Exclude,
    ExcludeRole,
    Fit,
    Format,
    Include,
    MaxSize,
    MinSize,
    Quiet,
    Revision,
    Role,
    Seed,
    Table,
    Verbose,
)


def project(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .safetensors/.bin/.pt file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.", show_default=False)],
    keep: Annotated[
        str | None,
        typer.Option(metavar="erg|tail|K", help="Directions kept: the ECS, the power-law tail, or the K leading ones."),
    ] = None,
    remove_traps: Annotated[
        bool, typer.Option("--remove-traps", help="First subtract shifted means and clip the entries that make traps.")
    ] = False,
    revision: Revision = None,
    include: Include = None,
    exclude: Exclude = None,
    role: Role = None,
    exclude_role: ExcludeRole = None,
    block: Block = None,
    min_size: MinSize = 1,
    max_size: MaxSize = None,
    fit: Fit = "ks",
    seed: Seed = 0,
    format: Format = None,
    table: Table = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """A copy of a model whose matrices keep their tails only, as a checkpoint that transformers loads.

    For example:  [bold]htsr project ./model --keep erg --role 'mlp.*' --output ./projected[/bold]
    """
    from htsr_cli import run
    from htsr_cli.output import Target, Words

    chosen = run.Choice(include, exclude, role, block, min_size, max_size, exclude_role)
    run.project(
        model, output, run.parse_directions(keep, "--keep"), chosen, Words(quiet, verbose), Target.of(context, "table"),
        traps=remove_traps, fit=fit, seed=seed, revision=revision,
    )  # fmt: skip
