"""Outliers of activations and weights: which blocks of a transformer hold them.

The score of an entry of a weight matrix is ``A_ij = |W_ij|·‖X_j‖₂``, with X_j the j-th input feature over all tokens of
a calibration set. The layer outlier distribution of a block is the share of its entries far above the block's mean:

    D_l = #{A_ij > τ·mean(A)} / #A        over all matrices of block l

Sources: OWL (Yin et al., ICML 2024, τ of 5 to 7), OwLore (arXiv 2405.18380, τ = 13).

    outliers = htsr.measure_outliers(model, tokenizer, texts)
    outliers.distribution(13.0)              # (blocks,), what `LayerSampler` draws by
    outliers.save("outliers.json")
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr._version import __version__
from htsr.arrays import Vector
from htsr.calibration.activations import InputNorms, evaluating, input_norms, linear_modules, stacked_experts
from htsr.errors import HtsrError, SourceError, UsageError, reason_of
from htsr.files import written
from htsr.matrices import roles
from htsr.matrices.blocks import Blocks, find_blocks
from htsr.results import Column, Record, Table, Tabular

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

OWLORE_THRESHOLD = 13.0
THRESHOLDS = (3.0, 5.0, 7.0, 10.0, OWLORE_THRESHOLD)
_CHUNK = 1 << 22  # entries scored at a time, so that no second matrix of the weight's size is held


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
            raise SourceError(f"{path} is not a file of outliers that htsr saved: {reason_of(error)}") from error

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


def measure_outliers(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    batch_size: int = 8,
    length: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Outliers:
    """Run `texts` through `model` once, and score its weights.

    Args:
        model: a transformers encoder or decoder on any device. It is put into evaluation mode meanwhile.
        tokenizer: tokenizer of the model.
        texts: texts of the calibration set. They are cut after `length` tokens.
        thresholds: thresholds τ, any number of them at no cost.
        batch_size: number of texts that run at a time; it changes nothing but rounding errors. Models with stacked
            experts take one.
        length: longest sample in tokens.
        progress: function that is called with the number of samples done and the number of all.

    Returns:
        The `Outliers`. A matrix that saw no token is left out, with a warning in the log.

    Raises:
        UsageError: there are no texts, or no thresholds above 0.
        SourceError: the model has no blocks, or does not know a token.
        HtsrError: the model does not run on these texts, activations or weights are not finite, padding cannot be told
            from tokens, or no matrix inside the blocks saw a token.

    Examples:
        A tokenizer of one token per byte, and a model with one entry far above all others in its second block:

        >>> import htsr, torch
        >>> from transformers import BatchEncoding, LlamaConfig, LlamaModel
        >>> def tokenizer(texts, **_):
        ...     ids = torch.tensor([list(text.encode()) for text in texts])
        ...     return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        >>> _ = torch.manual_seed(0)
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = LlamaModel(LlamaConfig(**sizes, vocab_size=128))
        >>> with torch.no_grad():
        ...     model.layers[1].mlp.up_proj.weight[0, 0] = 1.0
        >>> outliers = htsr.measure_outliers(model, tokenizer, ["spectra", "weights"], thresholds=[20.0])
        >>> entries = [sum(row.parameters for row in outliers.rows if row.block == block) for block in (0, 1)]
        >>> (outliers.distribution(20.0) * entries).round()  # number of outliers in each block
        array([0., 1.])

    Sources: OWL (Yin et al., ICML 2024); OwLore (arXiv 2405.18380).
    """
    thresholds = checked_thresholds(thresholds)
    if not texts:
        raise UsageError("the calibration set is empty")
    if stacked_experts(model):
        batch_size = 1  # which of the tokens that reach an expert are padding cannot be told
    tokens = 0
    with evaluating(model), input_norms(model) as norms:
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(
                list(texts[start : start + batch_size]),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=length,
            )
            _insist_on_rows(model, int(batch["input_ids"].max()))
            tokens += _run(norms, batch, start)
            if progress:
                progress(min(start + batch_size, len(texts)), len(texts))
    found = score_weights(model, norms.result(), thresholds, norms.transposed)
    return replace(found, samples=len(texts), tokens=tokens)


def checked_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    """`thresholds` in ascending order, each once.

    Raises:
        UsageError: there are none, or one is no positive number.
    """
    found = tuple(sorted({float(threshold) for threshold in thresholds}))
    if not found or not all(0 < threshold < np.inf for threshold in found):
        raise UsageError("thresholds are positive multiples of the mean score, at least one")
    return found


def _run(norms: InputNorms, batch: Any, start: int) -> int:
    import torch

    try:
        return norms.forward(batch["input_ids"], batch["attention_mask"])
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError, KeyError) as error:
        size = batch["input_ids"].shape[1]
        raise HtsrError(
            f"the model does not run on the samples from {start + 1} on, {size} tokens each (fewer tokens?): "
            f"{reason_of(error)}"
        ) from error


def _insist_on_rows(model: torch.nn.Module, highest: int) -> None:
    """Refuse tokens beyond the embedding, which would be an index out of range, on an accelerator a lost device."""
    try:
        rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return
    if highest >= rows:
        raise SourceError(
            f"the tokenizer makes token {highest} of the texts, and the model's embedding has {rows} rows"
        )


def score_weights(
    model: torch.nn.Module,
    norms: Mapping[str, Vector],
    thresholds: Sequence[float],
    transposed: Collection[str] = (),
    label: str | None = None,
) -> Outliers:
    """Count the entries of each weight with ``|W_ij|·‖X_j‖₂ > τ·mean``.

    Scores are formed in float32 in chunks of rows, their sums in float64.

    Args:
        model: model whose Linear (and Conv1D) modules and stacked experts are scored.
        norms: norms ‖X_j‖₂, (in_features,) float64, by module name.
        thresholds: thresholds τ, ascending.
        transposed: names of experts that are stored (in_features, out_features).
        label: name of the model; its class by default.

    Returns:
        `Outliers` with 0 samples and tokens.

    Raises:
        SourceError: the model has no blocks.
        HtsrError: weights are not finite, or there are no norms for a matrix inside the blocks.
    """
    blocks = find_blocks(model)
    weights = _weights(model, transposed)
    _insist_on_tokens(blocks, weights, norms)
    seen = {name: _Matrix(name, read(), norms[name]) for name, read in weights.items() if name in norms}
    block_of = {name: blocks.index_of(f"{name}.weight") for name in seen}
    totals, sizes = np.zeros(len(blocks)), np.zeros(len(blocks))
    for name, matrix in seen.items():
        block = block_of[name]
        if block is not None:
            totals[block] += matrix.total
            sizes[block] += matrix.parameters
    rows = []
    for name, matrix in seen.items():
        block = block_of[name]
        mean = matrix.total / matrix.parameters
        counted = matrix.counts([tau * mean for tau in thresholds])
        of_block: tuple[int, ...] = ()
        if block is not None:
            of_block = matrix.counts([tau * totals[block] / sizes[block] for tau in thresholds])
        row = OutlierRow(name, roles.role_of(roles.whole_name(name)), block, matrix.parameters, mean, counted, of_block)
        rows.append(row)
    return Outliers(
        label=label or type(model).__name__,
        thresholds=tuple(thresholds),
        rows=tuple(rows),
        blocks=blocks.names,
        samples=0,
        tokens=0,
        meta={"htsr": __version__},
    )


def _weights(model: torch.nn.Module, transposed: Collection[str]) -> dict[str, Callable[[], torch.Tensor]]:
    """Readers of (out_features, in_features) weights by name, those of a block together."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, module in linear_modules(model):
        found[name] = partial(_plain_weight, module)
    for name, stack in stacked_experts(model).items():
        for i in range(len(stack)):
            found[f"{name}[{i}]"] = partial(_expert_weight, stack, i, f"{name}[{i}]" in transposed)
    return found


def _expert_weight(stack: torch.nn.Parameter, index: int, transposed: bool) -> torch.Tensor:
    W = stack.detach()[index]
    return W.t() if transposed else W


def _insist_on_tokens(blocks: Blocks, weights: Collection[str], norms: Mapping[str, Vector]) -> None:
    unseen = [name for name in weights if name not in norms and blocks.index_of(f"{name}.weight") is not None]
    if unseen:
        logger.warning("%d matrices saw no token of the calibration set, %s first", len(unseen), unseen[0])
    if not any(blocks.index_of(f"{name}.weight") is not None for name in norms):
        raise HtsrError("no Linear inside the blocks has seen a token: there is nothing to score")


class _Matrix:
    """Scores of one weight, formed chunk by chunk and never held whole."""

    def __init__(self, name: str, weight: torch.Tensor, norm: Vector) -> None:
        import torch

        self._weight = weight
        self._norm = torch.from_numpy(norm).to(weight.device, torch.float32)
        self.parameters = weight.numel()
        self.total = sum(float(chunk.sum(dtype=_wide(chunk))) for chunk in self._chunks())
        if not np.isfinite(self.total):
            raise HtsrError(f"{name} holds NaN or infinite weights")

    def _chunks(self) -> Iterator[torch.Tensor]:
        rows = max(1, _CHUNK // self._weight.shape[1])
        for start in range(0, self._weight.shape[0], rows):
            yield (self._weight[start : start + rows].float() * self._norm).abs_()

    def counts(self, limits: Sequence[float]) -> tuple[int, ...]:
        """Entries above each limit."""
        counted = np.zeros(len(limits), dtype=np.int64)
        for chunk in self._chunks():
            counted += [int((chunk > limit).sum()) for limit in limits]
        return tuple(int(count) for count in counted)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    import torch

    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _plain_weight(module: torch.nn.Module) -> torch.Tensor:
    weight: Any = module.weight
    if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        weight = dequantize_bnb_weight(weight, state=getattr(module, "state", None))
    weight = weight.detach()
    return weight.t() if type(module).__name__ == "Conv1D" else weight  # type: ignore[no-any-return]  # stored (in, out)
