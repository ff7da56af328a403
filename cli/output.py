"""What the commands say, and where: data to stdout or a file, words and progress to stderr."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.errors import UsageError
from htsr.files import check_writable, written
from htsr.ranks import is_first
from htsr.reporting.formats import as_csv, as_json, as_markdown, require_pyarrow, write_parquet
from htsr.reporting.latex import as_latex
from htsr.reporting.terminal import WHOLE, as_text, terminal_table
from htsr.reporting.text import encodable, plain_console, visible
from htsr.results import Tabular, envelope

if TYPE_CHECKING:
    import typer
    from htsr_cli.order import Order
    from rich.console import Console

    from htsr.analysis.analyze import Progress

SUFFIXES = {
    ".txt": "table",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".md": "markdown",
    ".tex": "latex",
}
FORMATS = tuple(SUFFIXES.values())
# What says nothing to who runs a command, by its beginning, and the logger where it is no warning of Python
_NOISE = {
    "`is_gradient_checkpointing` is deprecated": None,  # PEFT calls transformers by an old name
    "The tokenizer has new PAD/BOS/EOS tokens": "transformers.trainer_utils",  # htsr has set the padding token itself
}
# they change nothing that is found
_NO_OPTIONS = ("format", "output", "table", "html", "save", "picture", "resume", "quiet", "verbose")


class Target:
    """Where the result of a command goes, and in which format.

    Args:
        format: one of `FORMATS`; told by the suffix of `output` if None, a table without.
        output: the file; standard output if None.
        command: the command.
        options: what it was given.

    Raises:
        UsageError: no such format, none that a terminal takes, or another than the suffix of `output` tells.
        MissingDependencyError: the format needs a package that is not there.
        HtsrError: the file cannot be written.
    """

    def __init__(
        self,
        format: str | None,
        output: Path | None,
        command: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        told = SUFFIXES.get(output.suffix.lower()) if output else "table"
        if output and told and format in FORMATS and format != told:
            raise UsageError(f"--format {format} does not go into {output}: by its suffix that is {told}")
        format = format or told
        if format not in FORMATS:
            raise UsageError(
                f"the format is one of {', '.join(FORMATS)}" + (f", and {output} does not tell which" if output else "")
            )
        if format == "parquet":
            if output is None:
                raise UsageError("parquet goes to a file: --output FILE.parquet")
            require_pyarrow()
        if output is not None:
            check_writable(output)
        self.format, self.output, self.command, self.options = format, output, command, options
        self.order: Order | None = None

    @classmethod
    def of(cls, context: typer.Context, file: str = "output") -> Target:
        """What the command line says.

        Args:
            context: of the command.
            file: the parameter that names the file.
        """
        given, known = context.params, context.command.params
        names = [p.name for p in known if p.param_type_name == "option" and p.name not in _NO_OPTIONS]
        options = {name: _plain(given[name]) for name in names if name in given}
        output = None if given[file] is None else Path(given[file])  # text in older versions of typer
        return cls(given["format"], output, context.command_path.partition(" ")[2], options)

    def write(self, result: Tabular, words: Words | None = None) -> None:
        """Write `result` whole, or not at all; `words` say what belongs to a table and is no data."""
        if self.order is not None:
            result = self.order.of(result)
        if self.format == "parquet":
            assert self.output is not None
            write_parquet(result.records(), self.output, result.types())
        elif self.output is not None:
            with written(self.output) as temporary:
                temporary.write_text(self._text(result), encoding="utf-8")
        elif self.format == "table":
            to = console()
            for table in result.tables():
                to.print(terminal_table(table, to.width))
        else:
            sys.stdout.write(self._text(result))
        if words and self.format == "table":
            for remark in result.remarks():
                words.say(f"htsr: {remark}")

    def _text(self, result: Tabular) -> str:
        render: dict[str, Callable[[], str]] = {
            "table": lambda: as_text(result.tables()),
            "json": lambda: as_json(envelope(result, self.command, self.options)),
            "csv": lambda: as_csv(result.records()),
            "markdown": lambda: as_markdown(result.tables()[0]),
            "latex": lambda: as_latex(result.tables()[0], f"htsr {self.command or ''}: {result.label}"),
        }
        return encodable(render[self.format]())


def _plain(value: Any) -> Any:
    """A parameter for JSON."""
    return str(value) if isinstance(value, Path) else value


class _Formatter(logging.Formatter):
    """Who says it, and what: other packages speak here, too."""

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines()
        return "\n".join(visible(line) for line in (f"{record.name.split('.')[0]}: {lines[0]}", *lines[1:]))


def _is_unsaid(record: logging.LogRecord) -> bool:
    """Whether no handler of the package that speaks has said it already."""
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None and logger.parent is not None:  # up to the root, which is ours
        if any(isinstance(handler, logging.StreamHandler) for handler in logger.handlers):
            return False
        logger = logger.parent
    return True


@dataclass(frozen=True)
class Words:
    """How much is said on stderr."""

    quiet: bool
    verbose: bool

    def __post_init__(self) -> None:
        level = logging.ERROR if self.quiet else logging.INFO if self.verbose else logging.WARNING
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter())
        handler.addFilter(_is_unsaid)
        logging.basicConfig(level=level, handlers=[handler])
        logging.getLogger("htsr").setLevel(level)

    def say(self, text: str) -> None:
        """A sentence, unless quiet or another process says it."""
        if not self.quiet and is_first():
            print(visible(text), file=sys.stderr)  # noqa: T201

    @contextmanager
    def of_others(self) -> Iterator[None]:
        """Stdout is for data: what transformers, TRL and datasets print goes to stderr, or nowhere if quiet.

        Their bars are for a terminal: in a log each of their states would be a line.
        """
        with ExitStack() as stack:
            if self.quiet or not sys.stderr.isatty():
                stack.enter_context(_no_bars())
            if self.quiet:
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                stack.enter_context(_no_warnings())
            else:
                stack.enter_context(redirect_stdout(sys.stderr))
            if not self.verbose:
                stack.enter_context(_no_noise())
            yield

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[[Progress], None] | None]:
        """A progress bar with the time left, by work done rather than by matrices."""
        if self.quiet or not is_first() or not sys.stderr.isatty():
            yield None
            return
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        last = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        layout = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[row]}", style="dim", markup=False, table_column=last),
        )
        with Bar(*layout, console=plain_console(stderr=True), transient=True, expand=True) as bar:
            task = bar.add_task(visible(Path(label).name)[:28], total=1.0, count="", row="")

            def advance(now: Progress) -> None:
                bar.update(task, completed=now.fraction, count=f"{now.done}/{now.total}", row=visible(now.row.name))

            yield advance


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers and datasets without bars."""
    from importlib.util import find_spec

    from transformers.utils import logging as said

    drew = said.is_progress_bar_enabled()  # type: ignore[no-untyped-call]
    said.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets_drew = False
    if find_spec("datasets") is not None:
        import datasets

        datasets_drew = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if drew:
            said.enable_progress_bar()  # type: ignore[no-untyped-call]
        if datasets_drew:
            datasets.enable_progress_bars()


@contextmanager
def _no_noise() -> Iterator[None]:
    """Without what is in `_NOISE`."""

    def says_something(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(tuple(_NOISE))

    loggers = [logging.getLogger(name) for name in _NOISE.values() if name is not None]
    with warnings.catch_warnings():
        for start, name in _NOISE.items():
            if name is None:
                warnings.filterwarnings("ignore", re.escape(start))
        for logger in loggers:
            logger.addFilter(says_something)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(says_something)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """transformers without warnings; the Trainer has bars only where there are warnings."""
    from transformers.utils import logging as said

    level = said.get_verbosity()  # type: ignore[no-untyped-call]
    said.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        said.set_verbosity(level)


def console() -> Console:
    """Standard output; where it is no terminal it is so wide that nothing is cut."""
    return plain_console(width=None if sys.stdout.isatty() else WHOLE)
