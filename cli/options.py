"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hub id, folder, .safetensors/.bin/.pt/.gguf file, or adapter folder."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Include = Annotated[
    list[str] | None, typer.Option(help="Only matrices whose name matches, as in '*.q_proj'. Repeatable.")
]
Exclude = Annotated[list[str] | None, typer.Option(help="No matrices whose name matches. Repeatable.")]
Role = Annotated[list[str] | None, typer.Option(help="Only these roles, as in attn.q or 'mlp.*'. Repeatable.")]
ExcludeRole = Annotated[list[str] | None, typer.Option(help="Not these roles. Repeatable.")]
Block = Annotated[str | None, typer.Option(help="Only these blocks, as in 0-3,7.")]
MinSize = Annotated[int, typer.Option(min=0, help="Least size of the smaller side.")]
MaxSize = Annotated[int | None, typer.Option(min=1, help="Largest size of the smaller side.")]
Fit = Annotated[str, typer.Option(help="How the tail is chosen: ks, hill, hill_paper, fix_fingers, clip_xmax.")]
Xmin = Annotated[float | None, typer.Option(help="Begin of the tail by hand, an eigenvalue.")]
Xmax = Annotated[float | None, typer.Option(help="Leave out eigenvalues above this.")]
Route = Annotated[str, typer.Option(help="How eigenvalues are computed: auto, gram, svd, lanczos.")]
Dtype = Annotated[str, typer.Option(help="Precision: auto (float64), float32, float64.")]
Device = Annotated[str, typer.Option(help="auto (an accelerator where there is one), cpu, cuda, cuda:1, xpu.")]
WindowsOption = Annotated[
    str | None, typer.Option("--windows", metavar="ROWSxCOUNT", help="Pool FARMS windows, as in 2000x10.")
]
Full = Annotated[bool, typer.Option("--full", help="Also bulk, permuted weights and alternatives to the power law.")]
Bulk = Annotated[bool, typer.Option("--bulk", help="Marchenko-Pastur bulk and spikes.")]
Permuted = Annotated[bool, typer.Option("--permuted", help="Permuted weights: traps, distance to random.")]
Alternatives = Annotated[bool, typer.Option("--alternatives", help="Other laws for the tail, compared.")]
Quality = Annotated[bool, typer.Option("--quality", help="SETOL's quality estimates (experimental).")]
Bootstrap = Annotated[int, typer.Option(min=0, metavar="N", help="Bootstrap interval of α from N ≥ 10 resamples.")]
Gof = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="p-value of the goodness of fit, from N ≥ 10 samples; none on the lanczos route."
    ),
]
Null = Annotated[bool, typer.Option("--null/--no-null", help="α of pure noise of the same shape.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Format = Annotated[
    str | None,
    typer.Option("--format", help="table, json, csv, parquet, markdown or latex; of a file its suffix tells it."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Write there; the suffix tells the format: .txt, .json, .csv, .parquet, .md, .tex.",
        show_default=False,
    ),
]
Table = Annotated[
    Path | None,
    typer.Option(
        "--table",
        help="Write the result there, and not to the terminal; the suffix tells the format.",
        show_default=False,
    ),
]
Sort = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="Largest of this column first, as in stable_rank; alpha:up: smallest first."),
]
Top = Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N rows; means are still of all.")]
Html = Annotated[Path | None, typer.Option(help="Write the report, one self-contained HTML file.")]
Save = Annotated[Path | None, typer.Option(help="Save rows and spectra (.npz) for `htsr compare` and for Python.")]
FailOn = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONDITION",
        help="Exit with 3 if any matrix meets it, as in 'alpha>6' or 'note~random-like' (~: contains). Repeatable.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run of the same analysis stopped.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no words.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]


def is_given(context: typer.Context, option: str) -> bool:
    """Whether an option was said, and is not the default."""
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"
