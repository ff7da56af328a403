"""The `htsr export` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from htsr_cli.options import Quiet, Verbose


def export(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of a model, as `htsr finetune` leaves it.")],
    gguf: Annotated[Path, typer.Option(metavar="FILE.gguf", help="Write it as GGUF, by llama.cpp's converter.")],
    outtype: Annotated[str, typer.Option(help="Type of the weights: auto, f32, f16, bf16, q8_0 …")] = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """A model in another format: GGUF, for llama.cpp and what is built on it.

    The converter is looked for in the folder that LLAMA_CPP names, and on PATH; without it the commands are named.

    For example:  [bold]htsr export runs/first --gguf first.gguf --outtype q8_0[/bold]
    """
    from htsr_cli.output import Words

    from htsr.finetuning.export import export_gguf

    words = Words(quiet, verbose)
    export_gguf(folder, gguf, outtype, lambda said: words.say(f"htsr: {said}"))
    words.say(f"htsr: the model is in {gguf}")
