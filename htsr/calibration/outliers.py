"""Outliers of activations and weights: which blocks of a transformer hold them.

The score of an entry of a weight matrix is ``A_ij = |W_ij|·‖X_j‖₂``, with X_j the j-th input feature over all tokens of
a calibration set. The layer outlier distribution of a block is the share of its entries far above the block's mean:

    D_l = #{A_ij > τ·mean(A)} / #A        over all matrices of block l

Sources: OWL (Yin et al., ICML 2024, τ of 5 to 7), OwLore (arXiv 2405.18380, published as
OWS in Findings of ACL 2025, τ = 13).

    outliers = htsr.measure_outliers(model, tokenizer, texts)
    outliers.distribution(13.0)              # (blocks,), what `LayerSampler` draws by
    outliers.save("outliers.json")
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from htsr._version import __version__
from htsr.arrays import Vector
from htsr.errors import SourceError, UsageError, reason_of
from htsr.files import written
from htsr.results import Column, Record, Table, Tabular

OWLORE_THRESHOLD = 13.0
THRESHOLDS = (3.0, 5.0, 7.0, 10.0, OWLORE_THRESHOLD)


@dataclass(frozen=True)
class OutlierRow:
    """The outliers of one weight matrix.

    Attributes:
        name: name of the module, such as ``model.layers.0.self_attn.q_proj``.
        role: role of the matrix (`htsr.matrices.roles`).
        block: index of its block; None outside of the blocks.
        parameters: number of entries of the matrix, #A.
        mean_score: mean of A over the matrix.
        counts: number of entries with A > τ·mean(A), the mean over this matrix, for each threshold.
        block_counts: number of entries above τ times the mean over the whole block, for each threshold; empty outside
            of the blocks.
    """

    name: str
    role: str
    block: int | None
    parameters: int
    mean_score: float
    counts: tuple[int, ...]
    block_counts: tuple[int, ...] = ()


@dataclass(frozen=True, repr=False)
class Outliers(Tabular):
    """Outliers of a model, matrix by matrix and block by block, for several thresholds.

    Attributes:
        label: name of the model.
        thresholds: thresholds τ, ascending.
        rows: one `OutlierRow` per Linear (or GPT-2 Conv1D), in the model's order.
        blocks: module names of the blocks.
        samples: number of calibration samples.
        tokens: number of calibration tokens, padding not counted.
        meta: version, and what the caller adds.

    Examples:
        Two blocks of one matrix each, in which 3 and 1 of 1,000 entries are outliers at τ = 13:

        >>> import htsr
        >>> rows = tuple(
        ...     htsr.OutlierRow(f"blocks.{i}.mlp", "mlp", i, 1000, mean_score=1.0, counts=(n,), block_counts=(n,))
        ...     for i, n in enumerate((3, 1))
        ... )
        >>> outliers = htsr.Outliers("model", (13.0,), rows, ("blocks.0", "blocks.1"), samples=8, tokens=512)
        >>> outliers.distribution(13.0)
        array([0.003, 0.001])
    """

    label: str
    thresholds: tuple[float, ...]
    rows: tuple[OutlierRow, ...]
    blocks: tuple[str, ...]
    samples: int
    tokens: int
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        sizes = f"{len(self.rows)} matrices in {len(self.blocks)} blocks"
        return f"<Outliers of {self.label!r}: {sizes}, {self.samples} samples, {self.tokens} tokens>"

    def distribution(self, threshold: float = OWLORE_THRESHOLD) -> Vector:
        """Layer outlier distribution D_l of every block.

        Args:
            threshold: threshold τ, one of `thresholds`.

        Returns:
            (blocks,) float64 shares in [0, 1].

        Raises:
            UsageError: it was not measured at this threshold.
        """
        index = self._index(threshold)
        counts, sizes = np.zeros(len(self.blocks)), np.zeros(len(self.blocks))
        for row in self.rows:
            if row.block is not None:
                counts[row.block] += row.block_counts[index]
                sizes[row.block] += row.parameters
        return counts / np.maximum(sizes, 1)

    def of_matrices(self, threshold: float = OWLORE_THRESHOLD) -> dict[str, float]:
        """Share of outliers in each matrix alone, against its own mean, by name.

        Args:
            threshold: threshold τ, one of `thresholds`.

        Raises:
            UsageError: it was not measured at this threshold.
        """
        index = self._index(threshold)
        return {row.name: row.counts[index] / row.parameters for row in self.rows}

    def records(self) -> list[Record]:
        """One dictionary a block: ``name``, ``block``, ``parameters``, and for each τ ``D`` and ``p`` = D/ΣD.

        The keys of those are as in ``D_13`` and ``p_13``. p is 0 in all blocks where no block has an outlier.
        """
        sizes = np.zeros(len(self.blocks), dtype=np.int64)
        for row in self.rows:
            if row.block is not None:
                sizes[row.block] += row.parameters
        shares = {_named(threshold): self.distribution(threshold) for threshold in self.thresholds}
        drawn = {name: share / (share.sum() or 1.0) for name, share in shares.items()}
        return [
            {"name": name, "block": i, "parameters": int(sizes[i])}
            | {f"D_{threshold}": float(share[i]) for threshold, share in shares.items()}
            | {f"p_{threshold}": float(share[i]) for threshold, share in drawn.items()}
            for i, name in enumerate(self.blocks)
        ]

    def tables(self) -> tuple[Table, ...]:
        """One line a block: D_l at every threshold, and p_l with a bar at the highest that has outliers."""
        names = [_named(threshold) for threshold in self.thresholds]
        records = self.records()
        shown = next((name for name in reversed(names) if any(r[f"p_{name}"] for r in records)), names[0])
        most = max((record[f"p_{shown}"] for record in records), default=0.0) or 1.0
        columns = [Column("block", text=True), *(Column(f"D {name}", ".4f", "%") for name in names)]
        columns += [Column(f"p {shown}", ".4f"), Column("", text=True, bar=True)]
        rows = [
            (r["name"], *(100 * r[f"D_{name}"] for name in names), r[f"p_{shown}"], r[f"p_{shown}"] / most)
            for r in records
        ]
        return (Table(tuple(columns), tuple(rows), spare=("", *(f"D {name}" for name in names if name != shown))),)

    def facts(self) -> dict[str, Any]:
        """Everything that was measured; ``matrices`` are the `OutlierRow`."""
        content = asdict(self)
        return {"model": content.pop("label"), "matrices": content.pop("rows"), **content}

    def remarks(self) -> tuple[str, ...]:
        """What it was measured on."""
        return (f"{self.label}: {self.samples} samples, {self.tokens} tokens",)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON, by way of a temporary file.

        Args:
            path: path of the file.

        Raises:
            HtsrError: it cannot be written.
        """
        content = {"htsr_outliers": __version__, **asdict(self)}
        with written(Path(path)) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Outliers:
        """Read what `save` wrote, or ``htsr outliers --output FILE.json``.

        Args:
            path: path of the file.

        Raises:
            SourceError: it is not such a file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.get("command") == "outliers":
                known = {f.name: content[f.name] for f in fields(cls)}
                content = known | {"htsr_outliers": content["htsr"], "rows": content["matrices"]}
            del content["htsr_outliers"]
            rows = tuple(
                OutlierRow(**row | {key: tuple(row[key]) for key in ("counts", "block_counts")})
                for row in content.pop("rows")
            )
            thresholds, blocks = tuple(map(float, content.pop("thresholds"))), tuple(content.pop("blocks"))
            for row in rows:
                if row.parameters < 1 or len(row.counts) != len(thresholds):
                    raise ValueError(f"{row.name} has no count for each threshold")
                if row.block is not None and not (row.block < len(blocks) and len(row.block_counts) == len(thresholds)):
                    raise ValueError(f"{row.name} belongs to no block")
            return cls(rows=rows, thresholds=thresholds, blocks=blocks, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = reason_of(error, path)
            raise SourceError(f"{path} is not a file of outliers that htsr saved: {reason}") from error

    def plot(self, *, ax: Any = None) -> Any:
        """Draw D_l by block, one line per threshold.

        Args:
            ax: matplotlib axes to draw on; new ones by default.

        Returns:
            The axes. Needs the ``report`` extra.
        """
        from htsr.reporting.plots import plot_distributions

        distributions = {f"τ = {threshold:g}": self.distribution(threshold) for threshold in self.thresholds}
        return plot_distributions(distributions, f"{self.label}: outlier distribution", ax=ax)

    def _index(self, threshold: float) -> int:
        try:
            return self.thresholds.index(threshold)
        except ValueError:
            known = ", ".join(f"{t:g}" for t in self.thresholds)
            raise UsageError(f"the outliers were measured at τ = {known}, not at {threshold:g}") from None


def _named(threshold: float) -> str:
    """τ as part of a name, short where that is the same number."""
    return short if float(short := f"{threshold:g}") == threshold else repr(threshold)
