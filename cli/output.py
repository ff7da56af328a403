"""What the commands say, and where: data to stdout or a file, words and progress to stderr."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from htsr.analysis.analyze import Analysis, Progress
from htsr.analysis.comparison import Comparison
from htsr.errors import UsageError
from htsr.files import check_writable, written
from htsr.matrices.models import Model
from htsr.reporting import tables
from htsr.reporting.text import encodable, plain_console, visible
from htsr.spectra.notes import CAUTION
from htsr.training.memory.plan import MemoryPlans

if TYPE_CHECKING:
    from rich.console import Console

Subject: TypeAlias = Analysis | Comparison | Model | MemoryPlans

FORMATS = ("table", "json", "csv", "parquet", "markdown")
_SUFFIXES = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".md": "markdown", ".txt": "table"}
_PLAIN_WIDTH = 200


def is_first() -> bool:
    """Whether this process is the one that speaks: the first of those that torchrun or accelerate has started."""
    return os.environ.get("RANK", "0") == "0"


class Target:
    """Where the result goes, and in which format."""

    def __init__(self, format: str | None, output: Path | None) -> None:
        if format is None:
            format = "table" if output is None else _SUFFIXES.get(output.suffix.lower(), "")
        if format not in FORMATS:
            raise UsageError(
                f"the format is one of {', '.join(FORMATS)}" + (f", and {output} does not tell which" if output else "")
            )
        if format == "parquet" and output is None:
            raise UsageError("parquet goes to a file: --output FILE.parquet")
        if format == "parquet":
            tables.require_pyarrow()
        if output is not None:
            check_writable(output)
        self.format, self.output = format, output

    def write(self, subject: Subject, words: Words | None = None) -> None:
        """Write `subject` whole, or not at all; `words` say what belongs to a table and is no data."""
        self._write(subject)
        if words and self.format == "table":
            for remark in _remarks(subject):
                words.say(f"htsr: {remark}")

    def _write(self, subject: Subject) -> None:
        if self.format == "parquet":
            assert self.output is not None
            tables.write_parquet(subject, self.output)
            return
        if self.format == "table" and self.output is None:
            _print_tables(subject, console())
            return
        render = {
            "json": tables.as_json,
            "csv": tables.as_csv,
            "markdown": tables.as_markdown,
            "table": _plain_tables,
        }
        text = encodable(render[self.format](subject))
        if self.output is None:
            sys.stdout.write(text)
            return
        with written(self.output) as temporary:
            temporary.write_text(text, encoding="utf-8")


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


def console() -> Console:
    """Standard output; wide where it is no terminal, so that nothing is cut."""
    return plain_console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


def _print_tables(subject: Analysis | Comparison | Model | MemoryPlans, to: Console) -> None:
    if isinstance(subject, Analysis):
        to.print(tables.terminal_table(subject.rows, to.width))
        to.print(tables.summary_table(subject, to.width))
    elif isinstance(subject, Comparison):
        to.print(tables.comparison_table(subject, to.width))
    elif isinstance(subject, MemoryPlans):
        to.print(tables.memory_table(subject))
    else:
        to.print(tables.description_table(subject, to.width))
        total = sum(m.parameters for m in subject)
        to.print(f"{len(subject.matrices)} matrices, {total:,} parameters in them", style="dim")


def _remarks(subject: Subject) -> Iterator[str]:
    """What is said beside a table."""
    if isinstance(subject, Analysis):
        failed = sum(row.status != "ok" for row in subject)
        problems = f", {failed} without a fit" if failed else ""
        yield f"{subject.label}: {len(subject)} matrices{problems} in {subject.meta.get('seconds', 0):.1f} s"
        if any(kind in row.warning for row in subject for kind in ("heavy tail", "light tail")):
            yield CAUTION
    elif isinstance(subject, Comparison) and (alpha := subject.summary().get("alpha")):
        both = sum(pair.a.alpha is not None and pair.b.alpha is not None for pair in subject)
        yield f"mean α {alpha[0]:.3f} → {alpha[1]:.3f} over {both} matrices"


def _plain_tables(subject: Subject) -> str:
    out = io.StringIO()
    _print_tables(subject, plain_console(file=out, width=_PLAIN_WIDTH))
    return out.getvalue()
