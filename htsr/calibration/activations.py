"""Norms of the input features of every linear layer, over texts that run through a model.

Stacked experts are parameters of three dimensions that no module of their own applies. So the products with them are
caught instead, while transformers runs the experts one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector
from htsr.errors import HtsrError
from htsr.matrices.roles import is_stack_of_experts
from htsr.matrices.stored_tensors import base_name, base_names

if TYPE_CHECKING:
    import torch


class InputNorms:
    """Sums of squares of every Linear's input features, in float64, while texts run through the model.

    Args:
        model: model that the texts run through.

    Attributes:
        transposed: names of stacked experts that are stored (in_features, out_features).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.transposed: set[str] = set()
        self._squares: dict[str, torch.Tensor] = {}
        self._shape: tuple[int, ...] = ()  # (batch, tokens) of the batch that runs
        self._real: torch.Tensor | None = None  # which of its tokens are no padding; None for all of them

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
        """Run one batch, `input_ids` and `attention_mask` of (batch, tokens); returns its number of real tokens."""
        import torch

        device = next(self._model.parameters()).device
        real = attention_mask.cpu().flatten().nonzero()[:, 0]  # here, since a device would be waited for
        self._shape = tuple(attention_mask.shape)
        self._real = None if len(real) == attention_mask.numel() else real.to(device)
        more = {"use_cache": False} if hasattr(getattr(self._model, "config", None), "use_cache") else {}
        with torch.no_grad():
            self._model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), **more)
        return len(real)

    def add(self, name: str, X: torch.Tensor) -> None:
        """Add the tokens of one input `X`, (…, features), of the module `name`."""
        import torch

        if self._real is not None:
            X = self._real_tokens(name, X, self._real)
        if X.numel() == 0:
            return
        # float64, since squares of millions of tokens are added up
        wide = torch.float32 if X.device.type == "mps" else torch.float64
        squares = torch.linalg.vector_norm(X.reshape(-1, X.shape[-1]), dim=0, dtype=wide).square_()
        if name in self._squares:
            self._squares[name] += squares
        else:
            self._squares[name] = squares

    def _real_tokens(self, name: str, X: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        batch, tokens = self._shape
        if (X.ndim > 2 and X.shape[:2] == self._shape) or (X.ndim == 2 and X.shape[0] == batch * tokens):
            return X.reshape(batch * tokens, -1).index_select(0, real.to(X.device))
        if X.shape[:-1].numel() == X.shape[0] == batch:
            return X  # one vector a sample, as a pooler sees it
        raise HtsrError(
            f"the input of {name} has the shape {tuple(X.shape)}, where padding cannot be told; use a batch size of 1"
        )

    def result(self) -> dict[str, Vector]:
        """Norms ‖X_j‖₂ of the input features by module name, (in_features,) float64.

        Raises:
            HtsrError: an input was not finite.
        """
        found = on_host([squares.sqrt() for squares in self._squares.values()])
        norms = {name: norm.astype(np.float64, copy=False) for name, norm in zip(self._squares, found, strict=True)}
        for name, norm in norms.items():
            if not np.isfinite(norm).all():
                raise HtsrError(f"the input of {name} holds NaN or infinite activations; load the model in float32")
        return norms


def on_host(vectors: Sequence[torch.Tensor]) -> list[npt.NDArray[Any]]:
    """Vectors of one dtype as NumPy arrays, by one transfer.

    Args:
        vectors: vectors, (n,) of any n each, which may lie on several devices.
    """
    import torch

    if not vectors:
        return []
    together = torch.cat([vector.to(vectors[0].device) for vector in vectors]).cpu()
    return [part.numpy() for part in torch.split(together, [len(vector) for vector in vectors])]


@contextmanager
def input_norms(model: torch.nn.Module) -> Iterator[InputNorms]:
    """Norms of the inputs of every Linear (and GPT-2 Conv1D) of `model` that runs within the context.

    Examples:
        >>> import torch
        >>> from htsr.calibration.activations import input_norms
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
        >>> with input_norms(model) as norms:
        ...     _ = model(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
        >>> norms.result()["0"]  # one norm for each input feature, over all tokens
        array([5., 1.])
    """
    norms = InputNorms(model)
    handles = []
    for name, module in linear_modules(model):

        def hook(module: torch.nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            norms.add(name, args[0].detach())

        handles.append(module.register_forward_pre_hook(hook))
    try:
        with _expert_inputs(model, norms):
            yield norms
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _expert_inputs(model: torch.nn.Module, norms: InputNorms) -> Iterator[None]:
    """Note every product with a stacked expert, and have transformers run the experts one by one."""
    import torch
    from torch.overrides import TorchFunctionMode

    stacks = {p.untyped_storage().data_ptr(): (name, p) for name, p in stacked_experts(model).items()}
    if not stacks:
        yield
        return
    by_linear = torch.nn.functional.linear
    products = {by_linear, torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in products and len(args) > 1:
                X, W = args[:2]
                name, stack = stacks.get(W.untyped_storage().data_ptr(), ("", W))
                if name:
                    note(X.detach(), W, name, stack, transposed=func is not by_linear)
            return func(*args, **(kwargs or {}))

    def note(X: Any, W: Any, name: str, stack: Any, transposed: bool) -> None:
        if (W.stride(-1) == 1) != (stack.stride(-1) == 1):
            transposed = not transposed  # a product with the transpose of what is stored
        first = W.storage_offset() // stack[0].numel()
        for place, inputs in enumerate(X if W.ndim == 3 else [X], first):
            norms.add(f"{name}[{place}]", inputs)
            if transposed:
                norms.transposed.add(f"{name}[{place}]")

    switch: Any = model if hasattr(model, "set_experts_implementation") else None
    before = None if switch is None else switch.get_experts_implementation()
    try:
        if switch is not None:
            switch.set_experts_implementation("eager")
        with Watch():
            yield
    finally:
        if switch is not None:
            switch.set_experts_implementation(before)


def stacked_experts(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Stacked experts of `model`, parameters (experts, …, …), by name, wrappers' prefixes removed."""
    parameters = dict(model.named_parameters())
    names = base_names(parameters)
    return {names[name]: p for name, p in parameters.items() if is_stack_of_experts(names[name], p.shape)}


def linear_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The Linear and Conv1D modules of `model` by name, without those of adapters, wrappers' prefixes removed."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found: list[tuple[str, torch.nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and "lora_" not in name:
            clean = base_name(name).removesuffix(".base_layer")
            found.append((clean, module))
    return found


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode, and afterwards, whatever happened, back into the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
