"""The `htsr` command: what it understands, and how it ends.

Data goes to stdout, words and progress to stderr. Exit codes: 0 done, 1 could not, 2 wrong usage, 3 a `--fail-on`
condition is met, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer
from htsr_cli import (
    analyze,
    chat,
    compare,
    describe,
    export,
    finetune,
    layerwise,
    memory,
    outliers,
    project,
    recipe,
    repair,
    select,
    track,
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


# what several processes do together; the rest is done by the first
_SHARED = ("analyze", "compare", "finetune", "select", "track")


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


app.command()(analyze.analyze)
app.command()(compare.compare)
app.command()(track.track)
app.command()(select.select)
app.command()(describe.describe)
app.command()(memory.memory)
app.command()(outliers.outliers)
app.command()(finetune.finetune)
app.command()(recipe.recipe)
app.command()(chat.chat)
app.command()(export.export)
app.command()(project.project)
app.command()(repair.repair)


def main(args: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    from htsr.errors import HtsrError, UsageError, reason_of
    from htsr.ranks import is_first_to_say
    from htsr.reporting.text import visible

    os.environ.setdefault("TQDM_DELAY", "3")  # seconds: bars of libraries are for what takes long; tqdm reads it once
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
