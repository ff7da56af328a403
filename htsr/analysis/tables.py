"""The tables of analyses and comparisons that people look at: which columns, in which format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from htsr.analysis.standouts import Standout, by_kind
from htsr.results import Column, Record, Table, Value, tabulate
from htsr.spectra.metrics import LayerMetrics

Shown = tuple[Column, Callable[[LayerMetrics], Value]]

_LIGHT, _HEAVY = 6, 2


def _of(title: str, field: str, format: str, *, optional: bool = False, beside: str = "") -> Shown:
    return Column(title, format, optional=optional, field=field, beside=beside), lambda row: getattr(row, field)


def _shape(row: LayerMetrics) -> str:
    kernel = f"·{row.pieces}" if row.kind in ("conv", "stack") and row.pieces and row.pieces > 1 else ""
    return f"{row.rows}×{row.columns}{kernel}"


def _note(row: LayerMetrics) -> str:
    return row.warning if row.status == "ok" else f"{row.status}: {row.warning}"


METRICS: tuple[Shown, ...] = (
    (Column("matrix", text=True, field="name"), lambda row: row.name),
    (Column("role", text=True, field="role"), lambda row: row.role),
    (Column("shape"), _shape),
    _of("α", "alpha", ".2f"),
    _of("± σ", "sigma", ".2f"),
    _of("D", "D", ".3f"),
    _of("tail", "num_pl_tail", ".0f"),
    _of("α null", "alpha_null", ".1f", beside="α"),
    _of("⟨ln λ̃⟩", "trace_log", ".2f"),
    _of("stable rank", "stable_rank", ".1f"),
    _of("log ‖W‖²", "log_norm", ".2f"),
    _of("fit p", "gof_p", ".2f", optional=True),
    _of("α low", "alpha_low", ".2f", optional=True),
    _of("α high", "alpha_high", ".2f", optional=True),
    _of("α error", "alpha_error", ".2f", optional=True),
    _of("spikes", "num_spikes", ".0f", optional=True),
    _of("traps", "num_traps", ".0f", optional=True),
    _of("to random", "rand_distance", ".3f", optional=True),
    (Column("law", text=True, optional=True, field="best_law"), lambda row: row.best_law),
    (Column("note", text=True, field="warning"), _note),
)
"""What the short table of an analysis shows; the page of definitions in the documentation has all columns."""


_SPARE = (
    *("D", "log ‖W‖²", "± σ", "stable rank", "role"),
    *("to random", "law", "spikes", "shape", "traps", "tail", "⟨ln λ̃⟩", "note"),
)


def metrics_table(rows: Sequence[LayerMetrics]) -> Table:
    """The short table of these `rows`."""
    return tabulate(rows, METRICS, spare=_SPARE, tones=tuple(map(tone_of, rows)), toned=("α", "note"))


def tone_of(row: LayerMetrics) -> str:
    """The kind of a `row`, which a terminal colours: by status, then by α."""
    if row.status != "ok":
        return "failed"
    if "random-like" in row.warning:
        return "random"
    if row.alpha is None:
        return ""
    return "heavy" if row.alpha < _HEAVY else "middle" if row.alpha <= _LIGHT else "light"


Means = tuple[str, Mapping[str, float]]


def _mean(title: str, field: str, format: str) -> tuple[Column, Callable[[Means], Value]]:
    beside = title.removesuffix(" null")
    return (
        Column(title, format, optional=True, beside="" if beside == title else beside),
        lambda line: line[1].get(field),
    )


_MEANS: tuple[tuple[Column, Callable[[Means], Value]], ...] = (
    (Column("role", text=True), lambda line: line[0]),
    (Column("matrices", ".0f"), lambda line: line[1]["matrices"]),
    _mean("α", "alpha", ".2f"),
    _mean("α null", "alpha_null", ".1f"),
    _mean("⟨ln λ̃⟩", "trace_log", ".2f"),
    _mean("stable rank", "stable_rank", ".1f"),
    _mean("entropy", "entropy", ".3f"),
    _mean("log ‖W‖²", "log_norm", ".2f"),
    _mean("log λ_max", "log_spectral_norm", ".2f"),
    _mean("α̂", "alpha_hat", ".2f"),
    _mean("spikes", "num_spikes", ".1f"),
    _mean("traps", "num_traps", ".1f"),
)


def means_table(groups: Mapping[str, Mapping[str, float]], whole: Mapping[str, float]) -> Table:
    """Means by role, and of the whole model in the last line.

    Args:
        groups: means of each role by metric, with the number of ``matrices``.
        whole: means of all matrices, likewise.
    """
    spare = ("log ‖W‖²", "log λ_max", "entropy", "α̂", "stable rank", "matrices", "traps", "spikes")
    tones = (*[""] * len(groups), "total")
    lines = [*groups.items(), ("all", whole)]
    return tabulate(lines, _MEANS, spare=spare, tones=tones, elsewhere="--format json has all")


Alike = tuple[Standout, int]  # the clearest of a kind, and how many more there are

_STANDOUTS: tuple[tuple[Column, Callable[[Alike], Value]], ...] = (
    (Column("look here first", text=True), lambda line: line[0].name),
    (Column("score", ".1f"), lambda line: line[0].score if line[0].score < float("inf") else None),
    (Column("more", ".0f", optional=True), lambda line: line[1] or None),
    (Column("why", text=True), lambda line: line[0].reason),
)
LINES = 6


def standouts_table(standouts: Sequence[Standout]) -> Table:
    """The clearest of these `standouts`, one line for all matrices of a role that stand out by the same number."""
    lines = [(alike[0], len(alike) - 1) for alike in by_kind(standouts)]
    return tabulate(lines[:LINES], _STANDOUTS, spare=("more",), elsewhere="--format json has all")


def _in_both(title: str, field: str, format: str, beside: str = "") -> tuple[Column, Callable[[Record], Value]]:
    return Column(title, format, optional=True, field=field, beside=beside), lambda record: record.get(field)


_DIRECTIONS: tuple[tuple[Column, Callable[[Record], Value]], ...] = (
    _in_both("U overlap", "overlap_left", ".4f"),
    _in_both("U null", "overlap_left_null", ".4f", beside="U overlap"),
    _in_both("V overlap", "overlap_right", ".4f"),
    _in_both("V null", "overlap_right_null", ".4f", beside="V overlap"),
    _in_both("angle °", "angle_left", ".1f"),
    _in_both("intruders", "intruders", ".0f"),
    _in_both("eff. rank", "effective_rank", ".0f"),
)
_SPARE_OF_DIRECTIONS = ("eff. rank", "V overlap", "angle °")

_PAIRS: tuple[tuple[Column, Callable[[Record], Value]], ...] = (
    (Column("matrix", text=True, field="name"), lambda record: record["name"]),
    (Column("role", text=True, field="role"), lambda record: record["role"]),
    _in_both("α a", "alpha_a", ".2f"),
    _in_both("α b", "alpha_b", ".2f"),
    _in_both("Δα", "alpha_delta", ".2f"),
    _in_both("⟨ln λ̃⟩ a", "trace_log_a", ".2f"),
    _in_both("⟨ln λ̃⟩ b", "trace_log_b", ".2f"),
    _in_both("‖A-B‖/‖A‖", "relative", ".4f"),
    _in_both("cosine", "cosine", ".4f"),
    _in_both("CKA", "cka", ".4f"),
    _in_both("ESD dist.", "esd_distance", ".4f"),
    *_DIRECTIONS,
    (Column("note", text=True, optional=True, field="note"), lambda record: record["note"]),
)

_HEADS: tuple[tuple[Column, Callable[[Record], Value]], ...] = (
    (Column("matrix", text=True, field="name"), lambda record: record["name"]),
    (Column("role", text=True, field="role"), lambda record: record["role"]),
    (Column("head", ".0f", field="head"), lambda record: record["head"]),
    _in_both("‖A-B‖/‖A‖", "relative", ".4f"),
    *_DIRECTIONS,
)


def pairs_table(records: Sequence[Record]) -> Table:
    """The short table of a comparison, one line for each pair of its `records`."""
    of_metrics = ("⟨ln λ̃⟩ a", "⟨ln λ̃⟩ b", "cosine", "ESD dist.", "α a", "α b")
    least = "‖A-B‖/‖A‖" if any(record.get("intruders") for record in records) else "intruders"
    spare = ("CKA", "role", *of_metrics, *_SPARE_OF_DIRECTIONS, "Δα", least, "note", "U overlap")
    return tabulate(records, _PAIRS, spare=spare)


def heads_table(records: Sequence[Record]) -> Table:
    """The short table of attention heads in both models, one line for each of the `records`."""
    return tabulate(records, _HEADS, spare=("role", *_SPARE_OF_DIRECTIONS, "U overlap"))


def changes_table(summary: Mapping[str, tuple[float, float, float]], labels: Mapping[str, str]) -> Table:
    """Means of both models of a comparison, and of the differences.

    Args:
        summary: means of the first model, of the second, and of the difference, by metric.
        labels: titles of the metrics that are shown, by metric.
    """
    columns = (Column("mean", text=True), Column("a", ".4g"), Column("b", ".4g"), Column("b − a", ".4g"))
    return Table(columns, tuple((label, *summary[name]) for name, label in labels.items() if name in summary))
