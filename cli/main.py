"""The `htsr` command: what it understands, and how it ends.

Data goes to stdout, words and progress to stderr. Exit codes: 0 done, 1 could not, 2 wrong usage, 3 a `--fail-on`
condition is met, 130 interrupted.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer
from htsr_cli import chat, export, finetune, layerwise, recipe, repair, select, track
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
    Table,
    Top,
    Verbose,
    WindowsOption,
    Xmax,
    Xmin,
    is_given,
)

from htsr._version import __version__

app = typer.Typer(
    name="htsr",
    help="Read the quality of a neural network out of its weight spectra.\n\nFor example:  [bold]htsr analyze "
    "HuggingFaceTB/SmolLM2-135M --html report.html[/bold]",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(layerwise.app, name="layerwise")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"htsr {__version__}")
        raise typer.Exit


_SHARED = (
    "analyze",
    "compare",
    "finetune",
    "select",
    "track",
)  # what several processes do together; the rest is done by the first


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    from htsr.ranks import is_first

    if context.invoked_subcommand not in _SHARED and not is_first():
        raise typer.Exit


@app.command()
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


@app.command()
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


app.command()(track.track)
app.command()(select.select)


@app.command()
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


@app.command()
def memory(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hub id, folder with a config.json, or .gguf file; weights are not read."),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(help="full, lora, qlora, galore, apollo, lisa, owlore; repeatable, and all by default."),
    ] = None,
    seq: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per backward pass.")] = 1,
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
            help="Embedding and head: freeze (default of lisa and owlore), train, lowrank (galore, apollo, owlore)."
        ),
    ] = None,
    gradients: Annotated[
        str, typer.Option(help="Gradients of galore, apollo and owlore, as in a recipe: keep, project, update.")
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
    revision: Revision = None,
    format: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Peak memory of training, by part, without loading the model.

    For example:  [bold]htsr memory meta-llama/Llama-2-7b-hf --batch 1 --seq 1024 --checkpointing[/bold]
    """
    from htsr_cli import run
    from htsr_cli.output import Target, Words

    options = {
        "sequence": seq,
        "batch": batch,
        "rank": rank,
        "active_blocks": active_blocks,
        "dtype": dtype,
        "checkpointing": checkpointing,
        "state_dtype": state_dtype,
        "embeddings": embeddings,
        "gradients": gradients,
        "rounding": rounding,
        "frozen_weights": frozen_weights,
        "revision": revision,
    }
    run.memory(model, method, options, Words(quiet, verbose), Target.of(context))


@app.command()
def outliers(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, or .gguf file of a transformer.")],
    data: Annotated[
        str, typer.Option(help="Calibration text: .jsonl, .txt, or a data set of the hub as in org/name:train.")
    ],
    threshold: Annotated[
        list[float] | None, typer.Option(help="τ, multiples of the mean score; 3 5 7 10 13 if none. Repeatable.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Records of the calibration set, drawn by the seed.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Longest sample in tokens.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time; the result does not depend on it.")] = 8,
    revision: Revision = None,
    device: Device = "auto",
    seed: Seed = 0,
    save: Annotated[Path | None, typer.Option(help="Save the result (.json) for training and for Python.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it, as .png, .svg or .pdf.")] = None,
    format: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Layer outlier distribution: which blocks hold the outliers of |W|·‖X‖ on a calibration text.

    For example:  [bold]htsr outliers ./model --data train.jsonl --threshold 13 --save outliers.json[/bold]
    """
    from htsr_cli.outliers import outliers as measure
    from htsr_cli.output import Target, Words

    from htsr.calibration.outliers import THRESHOLDS

    measure(
        model, data, threshold or list(THRESHOLDS), Words(quiet, verbose), Target.of(context),
        revision=revision, samples=samples, length=length, batch_size=batch_size,
        device=device, seed=seed, save=save, picture=picture,
    )  # fmt: skip


app.command()(finetune.finetune)
app.command()(recipe.recipe)
app.command()(chat.chat)
app.command()(export.export)


@app.command()
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


app.command()(repair.repair)


def main(args: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    from htsr.errors import HtsrError, UsageError, reason_of
    from htsr.ranks import is_first_to_say
    from htsr.reporting.text import visible

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without α gets an escape, not a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=args, prog_name="htsr")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1 if end.code else 0
    except HtsrError as error:
        if is_first_to_say(str(error)):
            typer.echo("\n".join(visible(line) for line in f"htsr: {error}".splitlines()), err=True)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:  # a name that the file system does not take, a folder that may not be read
        if is_first_to_say(reason_of(error)):
            typer.echo(f"htsr: {visible(reason_of(error))}", err=True)
        return 1
    except KeyboardInterrupt:
        typer.echo("htsr: interrupted", err=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
