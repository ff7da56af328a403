"""The `htsr track` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from htsr_cli.options import (
    Block,
    Device,
    Dtype,
    Exclude,
    ExcludeRole,
    Format,
    Full,
    Html,
    Include,
    MaxSize,
    MinSize,
    Null,
    Output,
    Quiet,
    Role,
    Route,
    Seed,
    Verbose,
    is_given,
)


def track(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="A folder with checkpoints, or models as in `analyze`, also as owner/name@revision; or a saved "
            "trajectory (.jsonl).",
        ),
    ],
    against: Annotated[str | None, typer.Option(metavar="BASE", help="Spectra of the changes from BASE.")] = None,
    revision: Annotated[
        list[str] | None, typer.Option(help="Branch, tag or commit of a hub id, as in step1000. Repeatable.")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    role: Role = None,
    exclude_role: ExcludeRole = None,
    block: Block = None,
    min_size: MinSize = 0,
    max_size: MaxSize = None,
    fit: Annotated[
        str | None,
        typer.Option(
            help="How the tail is chosen: ks, hill …; by default as in the file of --save, else hill for steps of one "
            "run, and ks for models.",
            show_default=False,
        ),
    ] = None,
    full: Full = False,
    null: Null = True,
    route: Route = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    format: Format = None,
    output: Output = None,
    html: Html = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Append to this file what is measured, and measure nothing that is in it.",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The checkpoints of a run, or several models: every metric of every matrix, from the first to the last.

    For example:  [bold]htsr track runs/mine --save runs/mine/spectra.jsonl --html track.html[/bold]
    """
    from htsr_cli import run
    from htsr_cli.conditions import say_error
    from htsr_cli.output import Target, Words

    from htsr.analysis.tracking import track as measure
    from htsr.errors import UsageError
    from htsr.files import check_writable
    from htsr.matrices.models import Filter
    from htsr.ranks import is_first
    from htsr.reporting.html import require_plotly

    target, words = Target.of(context), Words(quiet, verbose)
    if html is not None:
        check_writable(html)
        require_plotly()
    if revision and (len(sources) > 1 or "@" in sources[0]):
        raise UsageError("--revision belongs to one hub id; of several, say which by owner/name@revision")
    if revision:
        sources = [f"{sources[0]}@{name}" for name in revision]
    every = {"fit": fit, "full": full, "null": null, "route": route, "dtype": dtype, "device": device, "seed": seed}
    options: dict[str, Any] = {name: value for name, value in every.items() if is_given(context, name)}
    chosen = run.Choice(include, exclude, role, block, min_size, max_size, exclude_role).filter
    where = None if chosen == Filter() else chosen
    one_or_more: Any = sources[0] if len(sources) == 1 else sources
    try:
        with words.progress(sources[0]) as progress:
            trajectory = measure(one_or_more, against=against, save=save, where=where, progress=progress, **options)
    except KeyboardInterrupt:
        words.say(f"htsr: interrupted; the same command goes on from {save}" if save else "htsr: interrupted")
        raise typer.Exit(130) from None
    if not is_first():
        return
    if html is not None:
        trajectory.to_html(html)
    target.write(trajectory, words)
    if html is not None:
        words.say(f"htsr: the page is in {html}")
    if trajectory.points and all(point.row.num_eigenvalues is None for point in trajectory):
        first = trajectory.points[0].row
        say_error(f"no matrix of {trajectory.label} could be analyzed; {first.name} is {first.status}: {first.warning}")
        raise typer.Exit(1)
    raise typer.Exit(1 if trajectory.problems else 0)
