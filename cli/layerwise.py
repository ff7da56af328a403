"""The `htsr layerwise` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from htsr_cli.options import Format, Output, Quiet, Verbose

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Layerwise learning rates, before any training.")


@app.callback()
def _root() -> None:
    pass


@app.command()
def plan(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, or checkpoint file.")],
    policy: Annotated[str, typer.Option(help="llr, ends, tempbalance, alphadecay, model_balancing.")] = "llr",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    score: Annotated[
        str | None,
        typer.Option(help="alpha, alpha_null, alpha_minus_null, erg_gap, trace_log, stable_rank, or none."),
    ] = None,
    fit: Annotated[str | None, typer.Option(help="How the tail is chosen: hill, ks …")] = None,
    windows: Annotated[str | None, typer.Option(metavar="ROWSxCOUNT", help="FARMS windows, as in 2000x10.")] = None,
    map: Annotated[
        str | None, typer.Option(help="linear, sqrt, log2, sigmoid, sigmoid_std, rank, model_balancing.")
    ] = None,
    bounds: Annotated[str | None, typer.Option(metavar="S1,S2", help="Least and largest multiplier.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="Favour small scores.")] = False,
    unit: Annotated[str | None, typer.Option(help="What shares a multiplier: matrix, block, role.")] = None,
    embeddings: Annotated[str | None, typer.Option(help="max, measured, leave, or a multiplier.")] = None,
    head: Annotated[str | None, typer.Option(help="The same of the output head; by default as --embeddings.")] = None,
    min_size: Annotated[int | None, typer.Option(min=1, help="Smaller matrices stay at 1.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Roles or names that stay at 1. Repeatable.")] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=M", help="Multiplier of these roles or names. Repeatable."),
    ] = None,
    format: Format = None,
    output: Output = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the multipliers (.png, .svg, .pdf).")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The multipliers that a model would get at the first step.

    For example:  [bold]htsr layerwise plan ./model --policy llr --bounds 1,3 --picture plan.png[/bold]
    """
    from htsr_cli.output import Target, Words
    from htsr_cli.run import parse_windows

    from htsr.reporting.plots import check_picture, write_picture
    from htsr.training.layerwise.plan import layerwise_plan

    target, words = Target.of(context), Words(quiet, verbose)
    if picture is not None:
        check_picture(picture)
    changes: dict[str, Any] = {
        "score": score,
        "fit": fit,
        "windows": parse_windows(windows),
        "map": map,
        "bounds": _bounds(bounds),
        "reverse": reverse or None,
        "unit": unit,
        "embeddings": _number(embeddings) if embeddings else None,
        "head": _number(head) if head else None,
        "min_size": min_size,
        "exclude": tuple(exclude) if exclude else None,
        "pin": _pins(pin),
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if score == "none":
        changes["score"] = None
    result = layerwise_plan(model, policy, revision=revision, **changes)
    if picture is not None:
        write_picture(result.plot(), picture)
    target.write(result, words)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _bounds(text: str | None) -> tuple[float, float] | None:
    from htsr.errors import UsageError

    if text is None:
        return None
    parts = [_number(part) for part in text.split(",")]
    if len(parts) != 2 or any(isinstance(part, str) for part in parts):
        raise UsageError(f"--bounds takes S1,S2 such as 1,5, not {text!r}")
    return float(parts[0]), float(parts[1])


def _pins(texts: list[str] | None) -> dict[str, float] | None:
    from htsr.errors import UsageError

    pins = {}
    for text in texts or []:
        pattern, _, value = text.rpartition("=")
        if not pattern or isinstance(_number(value), str):
            raise UsageError(f"--pin takes PATTERN=MULTIPLIER such as 'attn.*=2', not {text!r}")
        pins[pattern] = float(value)
    return pins or None
