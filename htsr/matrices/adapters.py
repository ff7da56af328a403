"""Adapters in PEFT's folder format: the change ΔW alone, or added to their base.

LoRA's ΔW = scaling · B·A is read from the folder itself, one matrix at a time; scaling is lora_alpha/r, or
lora_alpha/√r with `use_rslora`, and `alpha_pattern` overrides lora_alpha by module. All that depends on the base is
computed on it, DoRA here and the rest by PEFT (`htsr.matrices.peft_folders`).

Source: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from htsr.arrays import Array, Difference, Numbers, Product, as_numpy
from htsr.errors import SourceError
from htsr.matrices.adapter_config import CONFIG, AdapterConfig, read_adapter_config
from htsr.matrices.checkpoint_files import file_tensors
from htsr.matrices.stored_tensors import FLOATS, StoredTensor

PREFIX = "base_model.model."
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_FACTOR_A = re.compile(r"(.+)\.lora_(embedding_)?A(\.weight)?")
_ALONE = re.compile(  # tensors of adapters, by whatever name their writers give them
    r"[._]lora_(embedding_)?(A|B|down|up|mid|magnitude_vector)([._]|$)|[._]lora[._](down|up)[._]"
    r"|\.(hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?|oft_blocks|oft_r|dora_scale|ia3_l|vera_lambda_[bd])(\.|$)"
)


def is_adapter(folder: Path) -> bool:
    """Whether `folder` is a PEFT adapter."""
    return (folder / CONFIG).is_file()


def adapter_folder(path: Path) -> Path | None:
    """The adapter that `path` means: the folder, or the one whose weights the file is; None for anything else."""
    folder = path.parent if path.name in _FILES else path
    return folder if is_adapter(folder) else None


def base_of(folder: Path) -> str | None:
    """The base model that the adapter in `folder` names; None where it names none.

    Raises:
        SourceError: its configuration cannot be read.
    """
    return read_adapter_config(folder).base


def adapter_changes(folder: Path) -> list[StoredTensor]:
    """The ΔW of each adapted module and the tensors of `modules_to_save`, under the base's names.

    Args:
        folder: folder of the adapter, as PEFT writes it.

    Raises:
        SourceError: the folder has no adapter weights, or the method's change can only be computed on the base, or it
            changes no weight.
    """
    config = read_adapter_config(folder)
    refuse_prompts(config)
    stored = adapter_tensors(folder)
    if config.method != "LORA":
        raise SourceError(
            f"{folder} is a {config.method} adapter, whose change is computed on its base: give the base "
            "(base=…, --base; auto for the one it names)"
        )
    changes = [_change(name, tensor, stored, config) for name, tensor in stored.items() if _FACTOR_A.fullmatch(name)]
    return changes + whole_tensors(stored) + _tokens(stored)


def refuse_prompts(config: AdapterConfig) -> None:
    """Refuse an adapter that changes no weight.

    Args:
        config: configuration of the adapter.

    Raises:
        SourceError: the adapter changes no weight: it is a prompt, or of that kind.
    """
    if not config.changes_weights:
        raise SourceError(f"{config.folder} is a {config.method} adapter: it adds to the input and changes no weight")


def adapter_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the adapter in `folder` by name, without PEFT's prefix.

    Raises:
        SourceError: the folder holds no tensors, or they cannot be read.
    """
    for name in _FILES:
        if (folder / name).is_file():
            return {tensor.name.removeprefix(PREFIX): tensor for tensor in file_tensors(folder / name)}
    raise SourceError(f"{folder} has no {_FILES[0]}")


def whole_tensors(stored: dict[str, StoredTensor]) -> list[StoredTensor]:
    """The tensors that an adapter saves whole, under the base's names: `modules_to_save`, resized embeddings.

    Args:
        stored: tensors of the adapter by name, from `adapter_tensors`.
    """
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        module, wrapped, _ = name.partition(".base_layer.")
        if _ALONE.search(f".{name}") or "token_adapter." in name or name.startswith("base_model."):
            continue
        if wrapped and any(other.startswith(f"{module}.lora_") for other in stored):
            continue  # the base of a ΔW
        saved = re.sub(r"\.modules_to_save\.(default\.)?", ".", name)
        plain = saved.replace(".original_module.", ".").replace(".base_layer.", ".")
        if plain not in found or saved != name:  # what was trained stands for what it was trained from
            found[plain] = replace(tensor, name=plain)
    return list(found.values())


def merged_with_base(adapter: list[StoredTensor], base: list[StoredTensor]) -> list[StoredTensor]:
    """The base's tensors, those that the adapter touches replaced by W + ΔW (or by what it holds whole).

    Args:
        adapter: changes from `adapter_changes`.
        base: stored tensors of the base model.

    Raises:
        SourceError: the base lacks an adapted module, or has it in another shape.
    """
    by_name = {tensor.name: tensor for tensor in base}
    for tensor in adapter:
        delta = tensor.read if isinstance(tensor.read, _Delta) else None
        matches = [name for name in by_name if name == tensor.name or name.endswith("." + tensor.name)]
        matches = matches or [name for name in by_name if tensor.name.endswith("." + name)]
        if delta is None and not matches and tensor.problem is None:
            by_name[tensor.name] = tensor  # a head that was tied before
            continue
        if len(matches) != 1:
            raise SourceError(f"the adapter's {tensor.name} matches {len(matches)} tensors of the base model, not one")
        target = by_name[matches[0]]
        if delta is None:
            by_name[target.name] = replace(tensor, name=target.name, kind=target.kind)
            continue
        if delta.base is not None:
            target = replace(delta.base, name=target.name, kind=target.kind)
        if target.shape != tensor.shape:
            raise SourceError(f"{target.name} is {target.shape} in the base model and {tensor.shape} in the adapter")
        broken = tensor.problem if tensor.problem and tensor.problem[0] != "needs_base" else target.problem
        by_name[target.name] = replace(target, read=Sum(target, delta), storage=None, problem=broken)
    return list(by_name.values())


def loose_factors(tensors: list[StoredTensor]) -> list[StoredTensor]:
    """`tensors`, in which factors of an adapter that have no configuration beside them do not count as matrices.

    A spectrum of A or B alone says nothing about ΔW. Kohya's ``lora_down`` and ``lora_up`` with their ``alpha`` become
    one tensor, ΔW = alpha/r · up·down; all other factors get a problem that says what is missing.

    Args:
        tensors: stored tensors of a file or of a state dict.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    changes = {f"{module}.lora_down.weight": change for module, change in _kohya(by_name)}
    taken = {name.replace("lora_down", "lora_up") for name in changes}
    result = []
    for tensor in tensors:
        if tensor.name in changes:
            result.append(changes[tensor.name])
        elif _ALONE.search(f".{tensor.name}") and tensor.name not in taken:
            why = f"{tensor.name} is a part of an adapter, no weight; what to multiply it with is not said here"
            hint = ": give the folder that PEFT saved, with its adapter_config.json"
            result.append(replace(tensor, problem=("adapter", why + hint)))
        elif tensor.name not in taken:
            result.append(tensor)
    return result


def _kohya(by_name: dict[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    """The modules for which both factors and alpha are stored, and nothing else, each with its ΔW."""
    for name, down in by_name.items():
        module, found, _ = name.partition(".lora_down.weight")
        up, alpha = by_name.get(f"{module}.lora_up.weight"), by_name.get(f"{module}.alpha")
        more = {f"{module}.dora_scale", f"{module}.lora_mid.weight"} & by_name.keys()
        if found and up and alpha and not more and not _broken(down, up):
            read, warning = _Delta(down, up, None, False, alpha=alpha), f"ΔW of rank {down.shape[0]}"
            yield (
                module,
                StoredTensor(f"{module}.weight", read.shape, down.dtype, read, kind="adapter", warning=warning),
            )


def dora_factor(adapted: Any, magnitude: Any, transposed: bool) -> Any:
    """The factor that DoRA multiplies W + ΔW with: magnitude / ‖W + ΔW‖, one number per output.

    Args:
        adapted: W + ΔW, (out, in, …), or (in, out) where `transposed`; NumPy or torch.
        magnitude: DoRA's trained magnitudes, in any shape with one entry per output.
        transposed: whether W is stored (in, out), as embeddings and GPT-2's Conv1D are.

    Returns:
        (out, 1, …), or (1, out) where `transposed`, so that it broadcasts against `adapted`.

    Examples:
        >>> import numpy as np
        >>> from htsr.matrices.adapters import dora_factor
        >>> dora_factor(np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([10.0, 1.0]), transposed=False).tolist()
        [[2.0], [0.5]]

    Source: DoRA (arXiv 2402.09353), eq. 5.
    """
    if transposed:
        return magnitude.reshape(1, -1) / (adapted**2).sum(0) ** 0.5
    norm = (adapted.reshape(adapted.shape[0], -1) ** 2).sum(1) ** 0.5
    return (magnitude.reshape(-1) / norm).reshape(-1, *[1] * (adapted.ndim - 1))


@dataclass(frozen=True)
class _Delta:
    """Reads ΔW = scaling · B·A; kohya's files hold alpha = scaling · r."""

    A: StoredTensor
    B: StoredTensor
    scaling: float | None
    transposed: bool
    magnitude: StoredTensor | None = None
    base: StoredTensor | None = None
    alpha: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.B.shape[0], *self.A.shape[1:])
        return shape[::-1] if self.transposed else shape

    def __call__(self, index: int | None = None) -> Array:
        a, b = self._read()
        product = b @ a.reshape(a.shape[0], -1)
        product = product.T if self.transposed else product.reshape(self.shape)
        return product if index is None else product[index]

    def factors(self) -> Product:
        """ΔW as its factors; a kernel's as (positions, out, r) and (positions, r, in)."""
        a, b = self._read()
        if a.ndim > 2:
            a = np.moveaxis(a.reshape(*a.shape[:2], -1), 2, 0)
            b = np.broadcast_to(b, (len(a), *b.shape))
        return Product(a.T, b.T) if self.transposed else Product(b, a)

    def _read(self) -> tuple[Numbers, Numbers]:
        """A (r, in, …) and scaling · B (out, r), float32."""
        a, b = (as_numpy(x.read()).astype("float32") for x in (self.A, self.B))
        scaling = self.scaling
        if scaling is None and self.alpha is not None:
            scaling = float(as_numpy(self.alpha.read()).reshape(-1)[0]) / len(a)
        return a, scaling * b.reshape(b.shape[0], -1)  # type: ignore[operator]


def _change(name: str, A: StoredTensor, stored: dict[str, StoredTensor], config: AdapterConfig) -> StoredTensor:
    """The ΔW whose first factor is `A`, as a stored tensor."""
    module, embedding = _FACTOR_A.sub(r"\1", name), "lora_embedding_A" in name
    B = stored.get(name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B"))
    if B is None:
        raise SourceError(f"{config.folder}: {name} has no B beside it")
    vector = f"{module}.lora_magnitude_vector"
    magnitude = stored.get(vector) or stored.get(f"{vector}.weight")
    base = stored.get(f"{module}.base_layer.weight")  # PEFT saves adapted embeddings whole
    problem = None
    if why := _broken(A, B):
        problem = ("unreadable", f"{module}: {why}")
    elif config.dora and magnitude is None:
        problem = ("unreadable", f"{module} is a DoRA module without its lora_magnitude_vector")
    if problem or (magnitude is not None and magnitude.shape and 0 in magnitude.shape):
        problem = problem or ("unreadable", f"{module}: its lora_magnitude_vector is empty")
        shape = (B.shape[0] if B.shape else 0, *A.shape[1:])
        return StoredTensor(f"{module}.weight", shape, A.dtype, A.read, kind="adapter", problem=problem)
    scaling, transposed = config.scaling(module, A.shape[0]), embedding or config.transposed
    delta = _Delta(A, B, scaling, transposed, magnitude, base)
    on_parameter = any(target.rpartition(".")[0] in module for target in config.parameters)
    if magnitude is not None:
        problem = ("needs_base", f"{module} is a DoRA module, whose ΔW depends on its base: analyze it with base=…")
    elif on_parameter or (config.needs_base and not config.tokens and not config.parameters):
        why = "it adapts parameters, not layers" if on_parameter else config.needs_base
        problem = ("needs_base", f"the ΔW of {module} depends on its base, for {why}: analyze it with base=…")
    warning = f"ΔW of rank {A.shape[0]}"
    return StoredTensor(
        f"{module}.weight", delta.shape, A.dtype, delta, kind="adapter", problem=problem, warning=warning
    )


def _broken(A: StoredTensor, B: StoredTensor) -> str:
    """Why `A` and `B` are no factors of a ΔW; empty where they are."""
    if len(A.shape) < 2 or len(B.shape) < 2:
        return f"its factors have shapes {A.shape} and {B.shape}"
    if 0 in A.shape or 0 in B.shape:
        return f"its factors {A.shape} and {B.shape} are empty"
    if B.shape[1] != A.shape[0] or any(size != 1 for size in B.shape[2:]):
        return f"its factors of shapes {A.shape} and {B.shape} have no product"
    if not {A.dtype, B.dtype} <= FLOATS:
        return f"its factors are stored as {A.dtype} and {B.dtype}"
    return ""


def _tokens(stored: dict[str, StoredTensor]) -> list[StoredTensor]:
    """Rows of embeddings that were trained: they replace the base's."""
    tensors = []
    for name, tensor in stored.items():
        module, found, _ = name.partition(".token_adapter.trainable_tokens_delta")
        if found:
            why = f"{module} has {tensor.shape[0] if tensor.shape else 0} rows that replace its base's: give the base"
            tensors.append(replace(tensor, name=f"{module}.weight", problem=("needs_base", why), kind="embedding"))
    return tensors


@dataclass(frozen=True)
class Sum:
    """Reads W + ΔW, in float64 where W is stored so, else in float32.

    Attributes:
        base: stored tensor of W.
        delta: reader of ΔW.
    """

    base: StoredTensor
    delta: _Delta

    def __call__(self, index: int | None = None) -> Array:
        """The sum in the shape of `base`, or one slice of its first axis.

        Args:
            index: number of the slice; None for the whole tensor.
        """
        own = as_numpy(self.base.read())
        own = own if own.dtype == np.float64 else own.astype("float32")
        total = own + as_numpy(self.delta())
        if self.delta.magnitude is not None:
            factor = dora_factor(total, as_numpy(self.delta.magnitude.read()), self.delta.transposed)
            total, own = total * factor, own * factor
        which = slice(None) if index is None else index
        return Difference.computed(total[which], [(own[which], self.base.dtype)])
