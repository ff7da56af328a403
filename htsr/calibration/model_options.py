"""How transformers makes a model, as a user may wish it: its attention kernel, rotary embeddings, dropout, own code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from htsr.errors import HtsrError, MissingDependencyError, SourceError, UsageError, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator

KERNELS = ("attn_implementation", "experts_implementation")
CODE = "trust_remote_code"
_ROPE, _OLD_ROPE = "rope_parameters", "rope_scaling"
_PLACES = "the model lies where training wants it, see frozen_weights; for several devices there is FSDP2"
_FILES = "name the folder itself as model"
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("dtype", "torch_dtype"), "is set by dtype: auto, float32, bfloat16 or float16"),
    **dict.fromkeys(("device_map", "max_memory", "offload_folder", "offload_buffers", "offload_state_dict"), _PLACES),
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config", "low_cpu_mem_usage"), _PLACES),
    **dict.fromkeys(
        ("quantization_config", "load_in_4bit", "load_in_8bit"), "weights in 4 bits are those of the method qlora"
    ),
    "revision": "is set by revision",
    "code_revision": "is set by revision",
    "gguf_file": "name the .gguf file as model",
    **dict.fromkeys(("subfolder", "variant", "use_safetensors", "state_dict", "key_mapping", "weights_only"), _FILES),
    **dict.fromkeys(("token", "use_auth_token"), "is no matter of a recipe, which is kept: log in, or set HF_TOKEN"),
    **dict.fromkeys(("cache_dir", "local_files_only", "force_download", "proxies"), "is set in the environment of "
        "huggingface_hub: HF_HOME, HF_HUB_OFFLINE"),
    **dict.fromkeys(("config", "output_loading_info", "_fast_init", "generation_config"), "is htsr's own"),
}  # fmt: skip


def configured(name: str, read: Any, options: Mapping[str, Any]) -> Any:
    """A configuration with the `options` in it, and the model of it known to be made of the same weights.

    Keys of rotary embeddings go into the model's own ``rope_parameters``, also under the old name ``rope_scaling``.

    Args:
        name: name of the model, for messages.
        read: reads a configuration as ``AutoConfig.from_pretrained`` does, of the keyword arguments that it is given.
        options: ``attn_implementation``, ``experts_implementation``, attributes of the configuration, and
            ``trust_remote_code``.

    Raises:
        SourceError: the model comes with code of its own, which is not trusted.
        UsageError: an option is unknown, set elsewhere, or has no meaning for this model; or it would leave weights of
            the model out, or want others.
        MissingDependencyError: a package that an option asks for is not installed.
    """
    for key in options:
        if key in _REFUSED:
            raise UsageError(f"model_options.{key} {_REFUSED[key]}")
    code = {CODE: bool(options.get(CODE))}  # where it is left out, transformers asks on a terminal
    try:
        plain = read(**code)
    except ValueError as error:
        if CODE not in str(error):
            raise
        raise SourceError(
            f"{name} comes with Python code of its own, which runs only with model_options.{CODE}: true; read it first"
        ) from error
    own = {key: value for key, value in options.items() if key != CODE}
    if not own:
        return plain
    for key in own:
        if key not in (*KERNELS, _OLD_ROPE) and (key.startswith("_") or not hasattr(plain, key)):
            raise UsageError(f"model_options.{key} is no option of {name} ({plain.model_type}){_nearest(key, plain)}")
    if rope := {**own.pop(_OLD_ROPE, {}), **own.get(_ROPE, {})}:
        own[_ROPE] = {**(getattr(plain, _ROPE, None) or {}), **rope}
    with _blamed(own):
        config = read(**code, **own)
        as_wished, as_stored = _weights(config), _weights(plain)
    if differ := sorted(as_wished.items() ^ as_stored.items()):
        raise UsageError(
            f"model_options: {', '.join(own)} would make another model than the weights of {name} are for: "
            f"{differ[0][0]} differs"
        )
    return config


def is_own_code(config: Any) -> bool:
    """Whether a `config` is of a class that came with its model, and not with transformers."""
    return type(config).__module__.startswith("transformers_modules.")


def empty_model(config: Any, **more: Any) -> Any:
    """The causal language model of a `config`, on the meta device.

    Args:
        config: configuration, as `htsr.calibration.loading.load_config` returns it. Where `is_own_code`, the model's
            own code makes it: that of the configuration has run already.
        more: arguments of transformers' ``from_config``.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=is_own_code(config), **more)  # type: ignore[no-untyped-call]


def _weights(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of the model that transformers makes of a configuration, by name."""
    return {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}


@contextmanager
def _blamed(keys: Iterable[str]) -> Iterator[None]:
    names = list(keys)
    what = f"model_options.{names[0]}" if len(names) == 1 else "model_options"
    try:
        yield
    except HtsrError:
        raise
    except ImportError as error:
        raise MissingDependencyError(f"{what}: {reason_of(error)}") from error
    except Exception as error:  # whatever transformers raises on values that it does not know
        raise UsageError(f"{what}: {reason_of(error)}") from error


def _nearest(key: str, config: Any) -> str:
    near = get_close_matches(key, [*KERNELS, CODE, *config.to_dict()], n=1)
    return f"; did you mean {near[0]}?" if near else ""
