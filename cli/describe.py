"""The `htsr describe` command."""

from __future__ import annotations

import typer
from htsr_cli.options import (
    Block,
    Exclude,
    ExcludeRole,
    Format,
    Include,
    MaxSize,
    MinSize,
    Model,
    Output,
    Quiet,
    Revision,
    Role,
    Verbose,
)


def describe(
    context: typer.Context,
    model: Model,
    revision: Revision = None,
    include: Include = None,
    exclude: Exclude = None,
    role: Role = None,
    exclude_role: ExcludeRole = None,
    block: Block = None,
    min_size: MinSize = 0,
    max_size: MaxSize = None,
    format: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The weight matrices of a model, without reading them: names, roles, shapes.

    For example:  [bold]htsr describe ./model --role 'mlp.*'[/bold]
    """
    from htsr_cli import run
    from htsr_cli.output import Target, Words

    chosen = run.Choice(include, exclude, role, block, min_size, max_size, exclude_role)
    run.describe(model, chosen, Words(quiet, verbose), Target.of(context), revision=revision)
