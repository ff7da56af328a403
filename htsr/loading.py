"""Models and tokenizers from paths, hub ids and installed packages, for what runs a model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.errors import MissingDependencyError, SourceError

if TYPE_CHECKING:
    import torch


def resolve(name: str) -> str:
    """`name`, with ``package:MODULE/PATH`` made the path of a file that the installed Python package MODULE carries.

    Raises:
        SourceError: the package is not installed, or carries no such file.
    """
    if not name.startswith("package:"):
        return name
    module, _, inside = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or spec.origin is None:
        raise SourceError(f"{name}: the package {module} is not installed")
    path = Path(spec.origin).parent / inside
    if not path.exists():
        raise SourceError(f"{name}: the package {module} carries no {inside}")
    return str(path)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    causal: bool = False,
    four_bit: bool = False,
) -> torch.nn.Module:
    """A transformers model with the weights and the class that its configuration names.

    Args:
        name: folder, hub id, .gguf file (de-quantised), each also as ``package:MODULE/PATH``.
        revision: branch, tag or commit of a hub id.
        dtype: of the weights; as stored when None.
        causal: insist on a causal language model.
        four_bit: linear layers but the head in NF4 with double quantisation, computed in `dtype` (QLoRA).

    Raises:
        SourceError: it cannot be loaded.
        MissingDependencyError: four bits want bitsandbytes.
    """
    import transformers

    folder, more = _where(name, revision)
    more["dtype"] = dtype or "auto"
    if four_bit:
        more["quantization_config"] = _four_bit(name, dtype, more)
    try:
        if causal or "gguf_file" in more:  # that format holds language models, and does not name their class
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **more)
        else:
            config = transformers.AutoConfig.from_pretrained(folder, **{k: v for k, v in more.items() if k != "dtype"})
            named = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
            model = named.from_pretrained(folder, **more)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise SourceError(f"{name} could not be loaded: {str(error).splitlines()[0]}") from error
    if "gguf_file" in more:  # it holds plain floats now, and may be saved and trained as such
        model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules() if four_bit else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # what an evaluation packs for it lets no gradient through
    return model  # type: ignore[no-any-return]


def _four_bit(name: str, dtype: torch.dtype | None, more: dict[str, Any]) -> Any:
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError("weights in 4 bits need bitsandbytes: pip install bitsandbytes")
    if "gguf_file" in more:
        raise SourceError(f"{name} is GGUF, which transformers does not quantise anew: convert it to safetensors first")
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a model; a missing padding token is made the end-of-text token, padding is on the right.

    Raises:
        SourceError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder, more = _where(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **more)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise SourceError(f"the tokenizer of {name} could not be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _where(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    path = resolve(name)
    if path.endswith(".gguf"):
        return str(Path(path).parent), {"gguf_file": Path(path).name}
    return path, {"revision": revision} if revision else {}
