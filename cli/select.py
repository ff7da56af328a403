"""The `htsr select` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from htsr_cli.options import (
    Block,
    Device,
    Exclude,
    ExcludeRole,
    Format,
    Include,
    MaxSize,
    MinSize,
    Output,
    Quiet,
    Revision,
    Role,
    Verbose,
)

if TYPE_CHECKING:
    from htsr_cli.output import Words

    from htsr.analysis.result import Analysis
    from htsr.analysis.selection import Selection
    from htsr.calibration.outliers import Outliers
    from htsr.matrices.models import Filter


def select(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, folder or checkpoint file; a saved analysis (.npz); with --by outliers, a file of `htsr "
            "outliers`.",
        ),
    ],
    top: Annotated[float, typer.Option(help="Share of each role that trains.")] = 0.25,
    by: Annotated[str, typer.Option(help="snr, alpha, erg, stable_rank, outliers.")] = "snr",
    reverse: Annotated[bool, typer.Option("--reverse", help="Take those with the least signal.")] = False,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Roles or names that train whatever their score, as in embed or head. Repeatable."),
    ] = None,
    threshold: Annotated[float, typer.Option(help="τ of --by outliers.")] = 13.0,
    tool: Annotated[
        str | None,
        typer.Option("--for", help="Write what this tool takes instead of a table: peft, axolotl, spectrum, regex."),
    ] = None,
    rank: Annotated[
        int, typer.Option(min=1, help="With --for peft: the rank on all matrices whose parameters those chosen share.")
    ] = 8,
    revision: Revision = None,
    include: Include = None,
    exclude: Exclude = None,
    role: Role = None,
    exclude_role: ExcludeRole = None,
    block: Block = None,
    min_size: MinSize = 0,
    max_size: MaxSize = None,
    device: Device = "auto",
    format: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Which matrices to train: the share of each role with the most signal above noise.

    For example:  [bold]htsr select ./model --top 0.25 --by snr --for axolotl --output unfrozen.yaml[/bold]
    """
    from htsr_cli.output import Target, Words
    from htsr_cli.run import Choice

    from htsr.analysis.selection import By, Tool, select
    from htsr.errors import UsageError
    from htsr.files import check_writable, written
    from htsr.ranks import is_first

    words = Words(quiet, verbose)
    if tool is None:
        target = Target.of(context)
    elif tool not in get_args(Tool):
        raise UsageError(f"--for takes {', '.join(get_args(Tool))}, not {tool!r}")
    elif format is not None:
        raise UsageError(f"--for {tool} has a format of its own: leave out --format {format}")
    elif output is not None:
        check_writable(Path(output))
    if by not in get_args(By):
        raise UsageError(f"--by takes {', '.join(get_args(By))}, not {by!r}")
    chosen = Choice(include, exclude, role, block, min_size, max_size, exclude_role)
    source = _outliers(model) if by == "outliers" else _analysis(model, chosen.filter, revision, device, words)
    found: Selection = select(
        source, top, cast("By", by), reverse=reverse, also=tuple(also or ()), threshold=threshold
    )  # fmt: skip
    if not is_first():
        return
    if tool is None:
        target.write(found, words)
        return
    text = found.export(cast("Tool", tool), rank)
    if output is None:
        sys.stdout.write(text)
    else:
        with written(Path(output)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for remark in found.remarks():
        words.say(f"htsr: {remark}")


def _outliers(name: str) -> Outliers:
    from htsr.calibration.outliers import Outliers

    return Outliers.load(name)


def _analysis(name: str, where: Filter, revision: str | None, device: str, words: Words) -> Analysis:
    """The analysis that a file holds, or that of a model, with a bar."""
    from htsr.analysis.analyze import analyze_model, make_options
    from htsr.analysis.comparing import filtered_together, saved_or_source
    from htsr.analysis.result import Analysis
    from htsr.matrices.sources import open_model

    saved = saved_or_source(name)
    if isinstance(saved, Analysis):
        found = filtered_together([saved], where)[0]
        assert isinstance(found, Analysis)
        return found
    model = open_model(name, revision=revision).filtered(where)
    with words.progress(model.label) as progress:
        return analyze_model(model, make_options(device=device, null=False), progress=progress)
