"""Models, their configurations and tokenizers from paths, hub ids and installed packages, to be run or trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.calibration.model_options import CODE, configured, is_own_code
from htsr.errors import MissingDependencyError, SourceError, UsageError, refused
from htsr.matrices.hub import is_hub_id, reached

if TYPE_CHECKING:
    import torch

_MOST = {  # beyond the largest models by far; transformers would begin to build whatever it is told
    "num_hidden_layers": 2_000,
    "hidden_size": 1_000_000,
    "vocab_size": 100_000_000,
    "num_attention_heads": 100_000,
}


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


def absolute(name: str) -> str:
    """The absolute path of the model `name` where it lies here; else, as of a hub id, the name as it is."""
    path = Path(resolve(name)).expanduser()
    return str(path.absolute()) if path.exists() else name


def load_config(
    name: str,
    *,
    revision: str | None = None,
    causal: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """A model's configuration as transformers reads it.

    Args:
        name: folder, hub id or .gguf file, each also as ``package:MODULE/PATH``.
        revision: branch, tag or commit of a hub id.
        causal: whether the configuration must be that of a causal language model.
        options: what is to be otherwise in it, see `htsr.calibration.model_options.configured`.

    Raises:
        SourceError: it cannot be read, has no meaning, or is that of another kind of model.
        UsageError: an option is unknown, or has no meaning for this model.
        MissingDependencyError: a package that an option asks for is not installed.
    """
    from transformers import AutoConfig

    with _located(name, revision) as (folder, more), refused(f"the configuration of {name} cannot be read"):

        def read(**changes: Any) -> Any:
            return AutoConfig.from_pretrained(folder, **more, **changes)

        config = configured(name, read, options or {})
    check_config(name, config, causal)
    return config


def check_config(name: str, config: Any, causal: bool = False) -> None:
    """Insist on sizes that a model may have, and on a causal language model if wanted.

    Args:
        name: name of the model, for the message.
        config: configuration, as transformers has it.
        causal: whether the model has to predict the next token from those before.

    Raises:
        SourceError: a size has no meaning, or the model is of another kind.
    """
    from transformers.models.auto import modeling_auto as known

    with refused(f"the configuration of {name} has no meaning"):
        text = config.get_text_config()
        for key, most in _MOST.items():
            value = getattr(text, key, None)
            if value is not None and (type(value) is not int or not 0 < value <= most):
                raise ValueError(f"{key} is {value!r:.80}, and not a whole number from 1 to {most:,}")
    if not causal:
        return
    kind = config.model_type
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) and is_own_code(config):
        return  # by the word of the model's own code, which runs only where it is trusted
    alone = kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not getattr(config, "is_encoder_decoder", False)
    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)  # the latter of XLM
    encoder = kind in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder
    if encoder or not alone:
        why = ", but an encoder, which sees the tokens that it would have to predict" if encoder else ""
        raise SourceError(f"{name} ({kind}) is no causal language model of transformers{why}")


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    causal: bool = False,
    four_bit: bool = False,
    options: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """A transformers model with the weights and the class that its configuration names.

    Args:
        name: folder, hub id or .gguf file (de-quantised), each also as ``package:MODULE/PATH``.
        revision: branch, tag or commit of a hub id.
        dtype: dtype of the weights; None for the stored one.
        causal: whether it must be a causal language model.
        four_bit: whether linear layers but the head are in NF4 with double quantisation, computed in `dtype` (QLoRA).
        options: how it is made, see `htsr.calibration.model_options.configured`.

    Raises:
        SourceError: it cannot be loaded, or lacks weights, which transformers would draw at random.
        UsageError: an option is unknown, or has no meaning for this model.
        MissingDependencyError: bitsandbytes, which four bits need, or what an option asks for, is not installed.
    """
    import transformers

    with _located(name, revision) as (folder, more):
        if four_bit:
            _insist_on_four_bits(name, more)
        config = load_config(name, revision=revision, causal=causal, options=options)
        how: dict[str, Any] = {**more, "dtype": dtype or "auto", "output_loading_info": True}
        if options:
            how |= {"config": config, CODE: is_own_code(config)}
        if four_bit:
            how["quantization_config"] = _four_bit(dtype or config.dtype)
        kind: Any = transformers.AutoModelForCausalLM
        if not causal and "gguf_file" not in more:  # that format holds language models, and does not name their class
            kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        with refused(f"{name} could not be loaded"):
            model, found = kind.from_pretrained(folder, **how)
            lacking = sorted(set(found["missing_keys"]) & {key for key, _ in model.named_parameters()})
            if lacking:
                raise ValueError(
                    f"its weights lack {lacking[0]}" + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
                )
    if "gguf_file" in more and hasattr(model, "hf_quantizer"):  # plain floats now, to be saved and trained as such
        model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules() if four_bit else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # what an evaluation packs for it lets no gradient through
    return model  # type: ignore[no-any-return]


def _insist_on_four_bits(name: str, more: dict[str, Any]) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError("weights in 4 bits need bitsandbytes: pip install bitsandbytes")
    if "gguf_file" in more:
        raise SourceError(f"{name} is GGUF, which transformers does not quantise anew: convert it to safetensors first")


def _four_bit(dtype: torch.dtype | None) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_tokenizer(name: str, *, revision: str | None = None, own_code: bool = False) -> Any:
    """The tokenizer of a model; a missing padding token is made the end-of-text token, padding is on the right.

    Args:
        name: folder, hub id or .gguf file, each also as ``package:MODULE/PATH``.
        revision: branch, tag or commit of a hub id.
        own_code: whether Python code that comes with the tokenizer may run.

    Raises:
        SourceError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with _located(name, revision) as (folder, more), refused(f"the tokenizer of {name} could not be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **more, trust_remote_code=own_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


@contextmanager
def _located(name: str, revision: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a model is, as transformers' arguments; a hub that does not answer is not asked again and again.

    Raises:
        SourceError: it is neither a path nor a model of the hub.
        UsageError: a path is given with a revision.
    """
    path = resolve(name)
    with refused(f"{name} cannot be read"):
        exists = Path(path).expanduser().exists()
    if exists:
        if revision is not None:
            raise UsageError(f"a revision belongs to a hub id, and {name} is a local path")
        where = Path(absolute(name))  # an adapter takes it over for the name of its base
        if where.is_file() and where.suffix != ".gguf" and where.name != "config.json":
            raise SourceError(f"{name} is a file; models are run from a folder, a .gguf file or a hub id")
        is_gguf = where.suffix == ".gguf" and where.is_file()
        yield str(where.parent if where.is_file() else where), {"gguf_file": where.name} if is_gguf else {}
    elif not is_hub_id(path):
        raise SourceError(f"{name} does not exist")
    else:
        try:
            with reached(path, revision):
                yield path, {"revision": revision} if revision else {}
        except SourceError as error:
            if "cached files" not in str(error.__cause__):  # transformers' word where there is neither hub nor cache
                raise
            at = f" at revision {revision}" if revision else ""
            raise SourceError(
                f"{name} is no file or folder here, nor{at} in the local cache, and the hub cannot be reached"
            ) from error
