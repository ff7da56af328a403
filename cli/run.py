"""What the commands do, once their arguments are understood."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr_cli.conditions import Condition, judge, say_error, with_needed
from htsr_cli.output import Target, Words

from htsr.analysis.analyze import analyze_model, make_options
from htsr.analysis.comparing import (
    check_directions,
    compare_analyses,
    opened_together,
    options_beside,
    saved_or_source,
)
from htsr.analysis.journal import Journal
from htsr.analysis.result import Analysis
from htsr.analysis.saving import check_saved_to
from htsr.analysis.sharing import launched_ranks
from htsr.errors import UsageError
from htsr.files import check_writable
from htsr.matrices.models import Filter
from htsr.matrices.sources import open_model
from htsr.ranks import is_first
from htsr.results import counted
from htsr.spectra.windows import Windows

if TYPE_CHECKING:
    from htsr.spectra.directions import Keep
    from htsr.spectra.subspaces import Subspace

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
    settings = make_options(**with_needed(options, conditions))
    if save is not None:
        check_saved_to(save)
    if html is not None:
        check_page(html)
    model = open_model(name, revision=revision, against=against, base=base).filtered(choice.filter)
    journal = Journal(model, settings, fresh=not resume)
    if resume and is_first() and (kept := len(journal.load())):
        words.say(f"htsr: {kept} of {counted(len(model.matrices), 'matrix', 'matrices')} done before, taken up")
    try:
        with words.progress(model.label) as progress:
            analysis = analyze_model(model, settings, journal, progress)
    except KeyboardInterrupt:
        kept = len(Journal(model, settings).load())
        of = f"{kept} of {counted(len(model.matrices), 'matrix', 'matrices')} kept, --resume goes on from there"
        words.say(f"htsr: interrupted; {of}" if kept else "htsr: interrupted")
        return 130
    if not is_first():
        return 0
    if save is not None:
        analysis.save(save)
    if html is not None:
        analysis.to_html(html)
    target.write(analysis, words)
    if html is not None:
        words.say(f"htsr: the report is in {html}")
    code = judge(analysis, conditions)
    if analysis.rows and not analysis.eigenvalues:
        first = analysis[0]
        say_error(f"no matrix of {name} could be analyzed; {first.name} is {first.status}: {first.warning}")
        return 3 if code == 3 else 1
    if analysis.rows and settings.xmin is not None and all(row.alpha is None for row in analysis):
        largest = max(row.lambda_max or 0 for row in analysis)
        say_error(
            f"no matrix of {name} has a tail from --xmin {settings.xmin:g} on: the largest eigenvalue is {largest:g}"
        )
        return 3 if code == 3 else 1
    return code


def check_page(file: Path) -> None:
    """Make sure, before anything is computed, that a page can be written to `file`.

    Raises:
        HtsrError: the file cannot be written.
        MissingDependencyError: plotly is not installed.
    """
    from htsr.reporting.html import require_plotly

    check_writable(file)
    require_plotly()


def compare(
    a: str,
    b: str,
    choice: Choice,
    options: dict[str, Any],
    words: Words,
    target: Target,
    *,
    base: str | None,
    directions: Subspace | None,
    html: Path | None,
) -> None:
    """`htsr compare`."""
    check_directions(directions)
    if html is not None:
        check_page(html)
    given = [saved_or_source(name) for name in (a, b)]
    settings = options_beside(given, **options)
    sides = opened_together(given, choice.filter, base)
    analyses = []
    for name, side in zip((a, b), sides, strict=True):
        if isinstance(side, Analysis):
            analyses.append(side)
            continue
        with words.progress(name) as progress:
            analyses.append(analyze_model(side, settings, progress=progress))
    models = [None if isinstance(side, Analysis) else side for side in sides]
    with words.progress("both") as progress:
        comparison = compare_analyses(
            analyses[0],
            analyses[1],
            models[0],
            models[1],
            directions=directions,
            ranks=launched_ranks(),
            progress=progress,
        )
    if not is_first():
        return
    if None in models:
        words.say("htsr: a saved analysis has no weights: the distances of weights are left out")
    for what, names in (
        (f"in {a} only", comparison.only_a),
        (f"in {b} only", comparison.only_b),
        ("of another shape there, not compared", comparison.reshaped),
    ):
        if names:
            some = f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
            words.say(f"htsr: {counted(len(names), 'matrix', 'matrices')} {what}: {some}")
    if html is not None:
        comparison.to_html(html)
    target.write(comparison, words)
    if html is not None:
        words.say(f"htsr: the page is in {html}")


def describe(name: str, choice: Choice, words: Words, target: Target, *, revision: str | None) -> None:
    """`htsr describe`."""
    target.write(open_model(name, revision=revision).filtered(choice.filter), words)


def project(
    name: str,
    output: Path,
    keep: Keep | None,
    choice: Choice,
    words: Words,
    target: Target,
    *,
    traps: bool,
    fit: str,
    seed: int,
    revision: str | None,
) -> None:
    """`htsr project`."""
    from htsr.analysis.surgery import project as operate

    surgery = operate(
        name, output, keep,
        traps=traps, fit=make_options(fit=fit).fit, where=choice.filter, revision=revision, seed=seed,
    )  # fmt: skip
    target.write(surgery, words)


def parse_directions(text: str | None, option: str) -> Keep | None:
    """What an `option` says that takes directions: of `htsr project` or `htsr compare`.

    Raises:
        UsageError: neither erg, nor tail, nor a positive number.
    """
    if text is None or text == "erg" or text == "tail":
        return text  # type: ignore[return-value]
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{option} takes erg, tail or a number of directions, not {text!r}")
    return int(text)


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
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})(?:x(\d{1,9}(?:\.\d{1,9})?))?", text)
    if not match:
        raise UsageError(f"--windows takes ROWSxCOUNT such as 2000x10, not {text!r}")
    return Windows(int(match[1]), int(match[2]), float(match[3] or 1))
