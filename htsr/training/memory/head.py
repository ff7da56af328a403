"""The loss of TRL's SFTTrainer, whose logits are made for some tokens and some of the vocabulary at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from htsr.training.memory.ledger import Ledger

WIDTH = 32768  # entries of the vocabulary of which TRL makes logits at a time, for which memory is always there
# Tensors of the size of a tile in float32, and masks in a quarter of it, that TRL's loss keeps where it is no kernel
FORWARD, BACKWARD = 3.25, 7.25


def chunked_loss(model: Any, tokens: Tensor, ledger: Ledger, *, fused: bool) -> Tensor:
    """A loss that takes the memory of TRL's, its gradients included.

    TRL keeps of the logits one tile for at most 4,096 tokens. Backward makes it again, and sums the gradients of hidden
    states and head in float32 (TRL 1.16, ``kernels/chunked_logprob.py``; 1.10 has no sums in float32).

    Args:
        model: causal language model of transformers, with adapters or without.
        tokens: (batch, sequence) token ids.
        ledger: what counts.
        fused: whether a kernel turns logits into gradients where they are, as on an accelerator with Triton.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    weight = inner.get_output_embeddings().weight
    loss: Tensor = _Tiles.apply(hidden[:, :-1].flatten(0, 1).clone(), weight, ledger, fused).sum()  # type: ignore[no-untyped-call]
    return loss


class _Tiles(torch.autograd.Function):
    """From (tokens, width) hidden states to (tokens,) losses."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ledger: Ledger, fused: bool) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.ledger, ctx.fused = ledger, fused
        ledger.note(tile=_tile(weight, 0 if fused else FORWARD))
        return hidden.new_zeros(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        hidden, weight = ctx.saved_tensors
        wanted = zip((hidden, weight), ctx.needs_input_grad, strict=False)
        sums = [torch.zeros(of.shape, dtype=torch.float32) if needed else None for of, needed in wanted]
        ctx.ledger.note(tile=_tile(weight, 0 if ctx.fused else BACKWARD))
        narrow = zip(sums, (hidden, weight), strict=True)
        return *(None if total is None else total.to(of.dtype) for total, of in narrow), None, None


def _tile(weight: Tensor, temporaries: float) -> int:
    """Bytes for each token of a tile."""
    return WIDTH * weight.element_size() + round(temporaries * 4 * min(WIDTH, len(weight)))
