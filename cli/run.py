"""What the commands do, once their arguments are understood."""

from __future__ import annotations

import logging
import operator
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from htsr.analysis import Analysis, Progress, analyze_model, make_options
from htsr.comparison import Comparison, compare_analyses, filtered_together
from htsr.errors import HtsrError, UsageError
from htsr.execution import Ranks
from htsr.files import written
from htsr.journal import Journal
from htsr.matrices.sources import Filter, Model, open_model
from htsr.reporting import tables
from htsr.spectra.esd import Windows
from htsr.spectra.metrics import LayerMetrics
from htsr.training.memory import METHODS, MemoryPlans, TrainingMethod, embeddings_fit, predict_memory

if TYPE_CHECKING:
    from rich.console import Console

    from htsr.spectra.projection import Keep

FORMATS = ("table", "json", "csv", "parquet", "markdown")
_SUFFIXES = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".md": "markdown", ".txt": "table"}
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_PLAIN_WIDTH = 200
_MOST_BLOCKS = 100_000


class Choice:
    """Which matrices, as the command line says it."""

    def __init__(
        self,
        include: list[str] | None,
        exclude: list[str] | None,
        roles: list[str] | None,
        blocks: str | None,
        min_size: int,
        max_size: int | None,
        exclude_roles: list[str] | None = None,
    ) -> None:
        self.filter = Filter(
            tuple(include or ()),
            tuple(exclude or ()),
            tuple(roles or ()),
            parse_blocks(blocks),
            min_size,
            max_size,
            tuple(exclude_roles or ()),
        )


class Target:
    """Where the result goes, and in which format."""

    def __init__(self, format: str | None, output: Path | None) -> None:
        if format is None:
            format = "table" if output is None else _SUFFIXES.get(output.suffix, "")
        if format not in FORMATS:
            raise UsageError(
                f"the format is one of {', '.join(FORMATS)}" + (f", and {output} does not tell which" if output else "")
            )
        if format == "parquet" and output is None:
            raise UsageError("parquet goes to a file: --output FILE.parquet")
        if output is not None and not output.parent.is_dir():
            raise HtsrError(f"{output} cannot be written: {output.parent} is no folder")
        self.format, self.output = format, output

    def write(self, subject: Analysis | Comparison | Model | MemoryPlans) -> None:
        """Write `subject` whole, or not at all."""
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
        text = render[self.format](subject)
        if self.output is None:
            sys.stdout.write(text)
            return
        with written(self.output) as temporary:
            temporary.write_text(text, encoding="utf-8")


class _Formatter(logging.Formatter):
    """Who says it, and what: other packages speak here, too."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.name.split('.')[0]}: {super().format(record)}"


@dataclass(frozen=True)
class Words:
    """How much is said on stderr."""

    quiet: bool
    verbose: bool

    def __post_init__(self) -> None:
        level = logging.ERROR if self.quiet else logging.INFO if self.verbose else logging.WARNING
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter())
        logging.basicConfig(level=level, handlers=[handler])
        logging.getLogger("htsr").setLevel(level)

    def say(self, text: str) -> None:
        """A sentence, unless quiet."""
        if not self.quiet:
            print(text, file=sys.stderr)  # noqa: T201

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[[Progress], None] | None]:
        """A progress bar with the time left, by work done rather than by matrices."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        layout = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[row]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        )
        with Bar(*layout, console=Console(stderr=True), transient=True, expand=True) as bar:
            task = bar.add_task(Path(label).name[:28], total=1.0, count="", row="")

            def advance(now: Progress) -> None:
                bar.update(task, completed=now.fraction, count=f"{now.done}/{now.total}", row=now.row.name)

            yield advance


def analyze(
    name: str,
    choice: Choice,
    options: dict[str, Any],
    words: Words,
    target: Target,
    conditions: list[Condition],
    *,
    revision: str | None,
    against: str | None,
    base: str | None,
    html: Path | None,
    save: Path | None,
    resume: bool,
) -> int:
    """`htsr analyze`; returns the exit code."""
    settings = make_options(**options)
    if html is not None:
        from htsr.reporting.html import require_plotly

        require_plotly()
    model = open_model(name, revision=revision, against=against, base=base).filtered(choice.filter)
    ranks = Ranks()
    first = ranks.rank == 0
    journal = Journal(model, settings)
    if not resume:
        if first:
            journal.discard()
        ranks.gather([])
    elif first and (kept := len(journal.load())):
        words.say(f"htsr: {kept} of {len(model.matrices)} matrices were done before and are taken up")
    try:
        with (words if first else Words(True, False)).progress(model.label) as progress:
            analysis = analyze_model(model, settings, journal, progress)
    except KeyboardInterrupt:
        kept = len(journal.load())
        words.say(f"htsr: interrupted; {kept} of {len(model.matrices)} matrices are kept, --resume goes on from there")
        return 130
    if not first:
        return 0
    if save is not None:
        analysis.save(save)
    if html is not None:
        analysis.to_html(html)
        words.say(f"htsr: the report is in {html}")
    target.write(analysis)
    return _judge(analysis, conditions)


def compare(a: str, b: str, choice: Choice, options: dict[str, Any], words: Words, target: Target) -> None:
    """`htsr compare`."""
    settings = make_options(**options)
    saved = {name: Analysis.load(name) for name in (a, b) if name.endswith(".npz")}
    models = filtered_together([None if name in saved else open_model(name) for name in (a, b)], choice.filter)
    analyses = []
    for name, model in zip((a, b), models, strict=True):
        if model is None:
            analyses.append(saved[name])
            continue
        with words.progress(name) as progress:
            analyses.append(analyze_model(model, settings, progress=progress))
    comparison = compare_analyses(analyses[0], analyses[1], models[0], models[1])
    for label, only in ((a, comparison.only_a), (b, comparison.only_b)):
        if only:
            words.say(
                f"htsr: {len(only)} matrices are in {label} only: {', '.join(only[:5])}{' …' if len(only) > 5 else ''}"
            )
    target.write(comparison)


def describe(name: str, choice: Choice, target: Target, *, revision: str | None) -> None:
    """`htsr describe`."""
    target.write(open_model(name, revision=revision).filtered(choice.filter))


def memory(name: str, methods: list[str] | None, options: dict[str, Any], target: Target) -> None:
    """`htsr memory`; an option goes to the methods that it has a meaning for, unless one alone is asked for."""
    asked = cast(list[TrainingMethod], methods or list(METHODS))
    plans = []
    for method in asked:
        mine = dict(options)
        wanted = mine["embeddings"]
        if len(asked) > 1 and method in METHODS and wanted and not embeddings_fit(method, wanted):
            mine["embeddings"] = None
        plans.append(predict_memory(name, method, **mine))
    target.write(MemoryPlans(name, tuple(plans)))


def project(
    name: str,
    output: Path,
    keep: Keep | None,
    choice: Choice,
    words: Words,
    *,
    traps: bool,
    fit: str,
    seed: int,
    revision: str | None,
) -> None:
    """`htsr project`."""
    from htsr.surgery import project as operate

    surgery = operate(
        name, output, keep,
        traps=traps, fit=make_options(fit=fit).fit, where=choice.filter, revision=revision, seed=seed,
    )  # fmt: skip
    to = console()
    to.print(tables.surgery_table(surgery.operations, to.width))
    words.say(f"htsr: {output} holds {name} with {sum(o.status == 'ok' for o in surgery.operations)} matrices changed")


def parse_keep(text: str | None) -> Keep | None:
    """What `--keep` says.

    Raises:
        UsageError: neither erg, nor tail, nor a positive number.
    """
    if text is None or text == "erg" or text == "tail":
        return text  # type: ignore[return-value]
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--keep takes erg, tail or a number of directions, not {text!r}")
    return int(text)


def console() -> Console:
    """Standard output; wide where it is no terminal, so that nothing is cut."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)


def _print_tables(subject: Analysis | Comparison | Model | MemoryPlans, to: Console) -> None:
    if isinstance(subject, Analysis):
        to.print(tables.terminal_table(subject.rows, to.width))
        to.print(tables.summary_table(subject))
        to.print(_closing(subject), style="dim")
    elif isinstance(subject, Comparison):
        to.print(tables.comparison_table(subject, to.width))
        alpha = subject.summary().get("alpha")
        if alpha:
            to.print(f"mean α {alpha[0]:.3f} → {alpha[1]:.3f} over {len(subject)} matrices", style="dim")
    elif isinstance(subject, MemoryPlans):
        to.print(tables.memory_table(subject))
    else:
        to.print(tables.description_table(subject, to.width))
        total = sum(m.parameters for m in subject)
        to.print(f"{len(subject.matrices)} matrices, {total:,} parameters in them", style="dim")


def _closing(analysis: Analysis) -> str:
    failed = sum(row.status != "ok" for row in analysis)
    problems = f", {failed} without a fit" if failed else ""
    return f"{analysis.label}: {len(analysis)} matrices{problems} in {analysis.meta.get('seconds', 0):.1f} s"


def _plain_tables(subject: Analysis | Comparison | Model | MemoryPlans) -> str:
    import io

    from rich.console import Console

    out = io.StringIO()
    _print_tables(subject, Console(file=out, width=_PLAIN_WIDTH, highlight=False))
    return out.getvalue()


@dataclass(frozen=True)
class Condition:
    """A condition on a row, such as alpha > 6."""

    field: str
    symbol: str
    value: float | str

    def met(self, row: LayerMetrics) -> bool:
        """Whether `row` meets it; a row without the number does not."""
        actual = getattr(row, self.field)
        if actual is None:
            return False
        if isinstance(self.value, str):
            actual = str(actual)
        return _OPERATORS[self.symbol](actual, self.value)

    def __str__(self) -> str:
        return f"{self.field}{self.symbol}{self.value}"


def parse_conditions(texts: list[str] | None) -> list[Condition]:
    """Conditions of `--fail-on`.

    Raises:
        UsageError: not of the form FIELD OPERATOR VALUE, or no such field.
    """
    known = {f.name for f in fields(LayerMetrics)}
    conditions = []
    for text in texts or []:
        match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*", text)
        if not match:
            raise UsageError(f"--fail-on takes conditions such as 'alpha>6', not {text!r}")
        name, symbol, value = match.groups()
        if name not in known:
            raise UsageError(f"--fail-on: rows have no {name!r}; among others alpha, trace_log, stable_rank, status")
        try:
            conditions.append(Condition(name, symbol, float(value)))
        except ValueError:
            if symbol not in ("==", "!="):
                raise UsageError(f"--fail-on: {value!r} is no number") from None
            conditions.append(Condition(name, symbol, value))
    return conditions


def _judge(analysis: Analysis, conditions: list[Condition]) -> int:
    met = [(condition, row) for condition in conditions for row in analysis if condition.met(row)]
    for condition, row in met:
        value = getattr(row, condition.field)
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"htsr: {condition} holds for {row.name}: {shown}", file=sys.stderr)  # noqa: T201
    return 3 if met else 0


def parse_blocks(text: str | None) -> frozenset[int] | None:
    """Block indices from a list of numbers and ranges, as in ``0-3,7``.

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,99})(?:-(\d{1,99}))?\s*", part)
        if not match:
            raise UsageError(f"--block takes numbers and ranges such as 0-3,7, not {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < _MOST_BLOCKS:
            raise UsageError(f"--block {part.strip()} is no range of blocks: it ascends, below {_MOST_BLOCKS}")
        found.update(range(first, last + 1))
    return frozenset(found)


def parse_windows(text: str | None) -> Windows | None:
    """Windows from ``ROWSxCOUNT`` or ``ROWSxCOUNTxASPECT``.

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)(?:x([\d.]+))?", text)
    if not match:
        raise UsageError(f"--windows takes ROWSxCOUNT such as 2000x10, not {text!r}")
    return Windows(int(match[1]), int(match[2]), float(match[3] or 1))
