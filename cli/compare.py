"""The `htsr compare` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from htsr_cli.options import (
    Block,
    Device,
    Dtype,
    Exclude,
    ExcludeRole,
    Fit,
    Format,
    Full,
    Include,
    MaxSize,
    MinSize,
    Output,
    Quiet,
    Role,
    Route,
    Seed,
    Sort,
    Top,
    Verbose,
    is_given,
)


def compare(
    context: typer.Context,
    a: Annotated[
        str, typer.Argument(metavar="A", help="The first model, as in `analyze`, or a saved analysis (.npz).")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The second model, or a saved analysis.")],
    include: Include = None,
    exclude: Exclude = None,
    role: Role = None,
    exclude_role: ExcludeRole = None,
    block: Block = None,
    min_size: MinSize = 0,
    max_size: MaxSize = None,
    base: Annotated[
        str | None,
        typer.Option(help="For an adapter of the two: compare this model + ΔW; beside a model, the one that it names."),
    ] = None,
    directions: Annotated[
        str | None,
        typer.Option(metavar="K|erg|tail", help="Compare the leading singular vectors too: K of them, or of a tail."),
    ] = None,
    fit: Fit = "hill",
    full: Full = False,
    route: Route = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    sort: Sort = None,
    top: Top = None,
    format: Format = None,
    output: Output = None,
    html: Annotated[Path | None, typer.Option(help="Write the page, one self-contained HTML file.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Two models matrix by matrix: metrics of both, and how far their weights are apart.

    A model is analyzed with the options of the saved analysis beside it, where they are not given.

    For example:  [bold]htsr compare ./base ./fine-tuned --role 'attn.*'[/bold]
    """
    from htsr_cli import run
    from htsr_cli.order import parse_order
    from htsr_cli.output import Target, Words

    chosen = run.Choice(include, exclude, role, block, min_size, max_size, exclude_role)
    every = {"fit": fit, "full": full, "route": route, "dtype": dtype, "device": device, "seed": seed}
    options = {name: value for name, value in every.items() if is_given(context, name)}
    target = Target.of(context)
    target.order = parse_order(sort, top)
    run.compare(
        a, b, chosen, options, Words(quiet, verbose), target,
        base=base, directions=run.parse_directions(directions, "--directions"), html=html,
    )  # fmt: skip
