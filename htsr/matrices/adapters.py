"""Adapters in PEFT's folder format: the change ΔW alone, or added to their base.

LoRA's ΔW = scaling · B·A is read from the folder itself, one matrix at a time; scaling is lora_alpha/r, or
lora_alpha/√r with `use_rslora`, and `alpha_pattern` overrides lora_alpha by module. All that depends on the base is
computed on it, DoRA here and the rest by PEFT (`htsr.matrices.peft_folders`).

Source: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from htsr.errors import SourceError
from htsr.matrices.adapter_config import CONFIG, AdapterConfig, read_adapter_config
from htsr.matrices.checkpoint_files import file_tensors
from htsr.matrices.deltas import Delta, Sum, misfit
from htsr.matrices.stored_tensors import StoredTensor
from htsr.matrices.tying import tied

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
        SourceError: the configuration of the adapter cannot be read.
    """
    return read_adapter_config(folder).base


@contextmanager
def named_by(adapter: object) -> Iterator[None]:
    """A context in which the base that an `adapter` names is read, so that an error tells who names it.

    Raises:
        SourceError: the base cannot be read.
    """
    try:
        yield
    except SourceError as error:
        raise SourceError(f"{error}; it is the base that {CONFIG} in {adapter} names") from error


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
    return {tensor.name.removeprefix(PREFIX): tensor for tensor in file_tensors(adapter_file(folder))}


def adapter_file(folder: Path) -> Path:
    """The file that holds the tensors of the adapter in `folder`.

    Raises:
        SourceError: there is none.
    """
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    raise SourceError(f"{folder} has no {_FILES[0]}")


def whole_tensors(stored: dict[str, StoredTensor]) -> list[StoredTensor]:
    """The tensors that an adapter saves whole, under the base's names: `modules_to_save`, resized embeddings.

    A tied head that is saved beside its embedding has the same `storage`, and counts once.

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
    return tied(list(found.values()))


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
        delta = tensor.read if isinstance(tensor.read, Delta) else None
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
        if found and up and alpha and not more and not misfit(down, up):
            read, warning = Delta(down, up, None, False, alpha=alpha), f"ΔW of rank {down.shape[0]}"
            yield (
                module,
                StoredTensor(f"{module}.weight", read.shape, down.dtype, read, kind="adapter", warning=warning),
            )


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
    if why := misfit(A, B):
        problem = ("unreadable", f"{module}: {why}")
    elif config.dora and magnitude is None:
        problem = ("unreadable", f"{module} is a DoRA module without its lora_magnitude_vector")
    if problem or (magnitude is not None and magnitude.shape and 0 in magnitude.shape):
        problem = problem or ("unreadable", f"{module}: its lora_magnitude_vector is empty")
        shape = (B.shape[0] if B.shape else 0, *A.shape[1:])
        return StoredTensor(f"{module}.weight", shape, A.dtype, A.read, kind="adapter", problem=problem)
    scaling, transposed = config.scaling(module, A.shape[0]), embedding or config.transposed
    delta = Delta(A, B, scaling, transposed, magnitude, base)
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


def _tokens(stored: dict[str, StoredTensor]) -> list[StoredTensor]:
    """Rows of embeddings that were trained: they replace the base's."""
    tensors = []
    for name, tensor in stored.items():
        module, found, _ = name.partition(".token_adapter.trainable_tokens_delta")
        if found:
            why = f"{module} has {tensor.shape[0] if tensor.shape else 0} rows that replace its base's: give the base"
            tensors.append(replace(tensor, name=f"{module}.weight", problem=("needs_base", why), kind="embedding"))
    return tensors
