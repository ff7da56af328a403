"""The `htsr analyze` command."""

from __future__ import annotations

from typing import Annotated

import typer
from htsr_cli.options import (
    Alternatives,
    Block,
    Bootstrap,
    Bulk,
    Device,
    Dtype,
    Exclude,
    ExcludeRole,
    FailOn,
    Fit,
    Format,
    Full,
    Gof,
    Html,
    Include,
    MaxSize,
    MinSize,
    Model,
    Null,
    Output,
    Permuted,
    Quality,
    Quiet,
    Resume,
    Revision,
    Role,
    Route,
    Save,
    Seed,
    Sort,
    Top,
    Verbose,
    WindowsOption,
    Xmax,
    Xmin,
)


def analyze(
    context: typer.Context,
    model: Model,
    revision: Revision = None,
    against: Annotated[str | None, typer.Option(metavar="BASE", help="Analyze MODEL - BASE.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="For an adapter: analyze this model + ΔW (auto: the one that the adapter names)."),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    role: Role = None,
    exclude_role: ExcludeRole = None,
    block: Block = None,
    min_size: MinSize = 0,
    max_size: MaxSize = None,
    fit: Fit = "ks",
    xmin: Xmin = None,
    xmax: Xmax = None,
    full: Full = False,
    bulk: Bulk = False,
    permuted: Permuted = False,
    alternatives: Alternatives = False,
    quality: Quality = False,
    bootstrap: Bootstrap = 0,
    gof: Gof = 0,
    null: Null = True,
    windows: WindowsOption = None,
    route: Route = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    sort: Sort = None,
    top: Top = None,
    format: Format = None,
    output: Output = None,
    html: Html = None,
    save: Save = None,
    fail_on: FailOn = None,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Power-law α, ERG and the other spectral metrics of every weight matrix.

    For example:  [bold]htsr analyze ./model --html report.html --fail-on 'status==nan'[/bold]
    """
    from htsr_cli import run
    from htsr_cli.conditions import parse_conditions
    from htsr_cli.order import parse_order
    from htsr_cli.output import Target, Words

    from htsr.spectra.metrics import LayerMetrics

    chosen = run.Choice(include, exclude, role, block, min_size, max_size, exclude_role)
    options = {
        "fit": fit,
        "xmin": xmin,
        "xmax": xmax,
        "route": route,
        "dtype": dtype,
        "device": device,
        "windows": run.parse_windows(windows),
        "null": null,
        "bulk": bulk or full,
        "permuted": permuted or full,
        "alternatives": alternatives or full,
        "quality": quality,
        "bootstrap": bootstrap,
        "gof": gof,
        "seed": seed,
    }
    words = Words(quiet, verbose)
    conditions = parse_conditions(fail_on)
    target = Target.of(context)
    target.order = parse_order(sort, top, LayerMetrics.__dataclass_fields__)
    code = run.analyze(
        model, chosen, options, words, target, conditions,
        revision=revision, against=against, base=base, html=html, save=save, resume=resume,
    )  # fmt: skip
    raise typer.Exit(code)
