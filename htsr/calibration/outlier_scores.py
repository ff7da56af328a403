"""Outlier scores of the weights of a model, from one run over a calibration set (`htsr.calibration.outliers`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr._version import __version__
from htsr.arrays import Vector
from htsr.calibration.activations import (
    InputNorms,
    evaluating,
    input_norms,
    linear_modules,
    on_host,
    stacked_experts,
)
from htsr.calibration.outliers import THRESHOLDS, OutlierRow, Outliers
from htsr.errors import HtsrError, SourceError, UsageError, reason_of
from htsr.matrices import roles
from htsr.matrices.blocks import Blocks, find_blocks

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_CHUNK = 1 << 22  # entries scored at a time, so that no second matrix of the weight's size is held


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

    Sources: OWL (Yin et al., ICML 2024); OwLore (arXiv 2405.18380), published as OWS (Findings of ACL 2025).
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
    device = next(model.parameters()).device
    seen = {name: _Scores(read(), norms[name], device) for name, read in weights.items() if name in norms}
    sums = dict(zip(seen, _totals(seen), strict=True))
    block_of = {name: blocks.index_of(f"{name}.weight") for name in seen}
    totals, sizes = np.zeros(len(blocks)), np.zeros(len(blocks))
    for name, matrix in seen.items():
        block = block_of[name]
        if block is not None:
            totals[block] += sums[name]
            sizes[block] += matrix.parameters
    means = {name: sums[name] / matrix.parameters for name, matrix in seen.items()}
    counts = []
    for name, matrix in seen.items():
        block = block_of[name]
        of_block = means[name] if block is None else totals[block] / sizes[block]
        counts.append(matrix.counts([tau * mean for mean in (means[name], of_block) for tau in thresholds]))
    rows = []
    for (name, matrix), counted in zip(seen.items(), on_host(counts), strict=True):
        own, block, half = tuple(int(count) for count in counted), block_of[name], len(thresholds)
        role = roles.role_of(roles.whole_name(name))
        of_its_block = () if block is None else own[half:]
        rows.append(OutlierRow(name, role, block, matrix.parameters, means[name], own[:half], of_its_block))
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


class _Scores:
    """Scores of one weight, formed chunk by chunk on a device and never held whole; what they sum to stays there."""

    def __init__(self, weight: torch.Tensor, norm: Vector, device: torch.device) -> None:
        import torch

        self._weight, self._device = weight, device
        self._norm = torch.from_numpy(norm).to(device, torch.float32)
        self.parameters = weight.numel()

    def _chunks(self) -> Iterator[torch.Tensor]:
        rows = max(1, _CHUNK // self._weight.shape[1])
        for start in range(0, self._weight.shape[0], rows):
            yield (self._weight[start : start + rows].to(self._device).float() * self._norm).abs_()

    def sums(self) -> torch.Tensor:
        """Sum of the scores of each chunk, (chunks,)."""
        import torch

        return torch.stack([chunk.sum(dtype=_wide(chunk)) for chunk in self._chunks()])

    def counts(self, limits: Sequence[float]) -> torch.Tensor:
        """Number of entries above each limit, (limits,)."""
        import torch

        counted = torch.zeros(len(limits), dtype=torch.int64, device=self._device)
        for chunk in self._chunks():
            counted += torch.stack([(chunk > limit).sum() for limit in limits])
        return counted


def _totals(seen: Mapping[str, _Scores]) -> list[float]:
    """Sum of all scores of each weight.

    Raises:
        HtsrError: weights are not finite.
    """
    found = [float(np.sum(sums, dtype=np.float64)) for sums in on_host([matrix.sums() for matrix in seen.values()])]
    for name, total in zip(seen, found, strict=True):
        if not np.isfinite(total):
            raise HtsrError(f"{name} holds NaN or infinite weights")
    return found


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
