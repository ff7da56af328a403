"""What converters change in a model's tensors, undone: they read as transformers has them.

============== ========================================================================================================
changed        what
============== ========================================================================================================
rows of q, k   the rotary embedding of llama.cpp, and of Meta's and Mistral's own code, turns neighbouring rows where
               transformers turns rows half a head apart: within each head the row (half, i) is stored as (i, half)
transposed     llama.cpp: weights of GPT-2's Conv1D, and experts that are stored (in, out)
flattened      llama.cpp: kernels of causal convolutions, (channels, 1, width) as (channels, width)
============== ========================================================================================================

The spectrum of a matrix does not feel its rows permuted; a difference of two matrices does. Sources: `modify_tensors`
of llama.cpp's conversion classes; transformers' `modeling_gguf_pytorch_utils` and `convert_llama_weights_to_hf`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from htsr.arrays import Array
from htsr.matrices.stored_tensors import StoredTensor

Metadata = Mapping[str, Any]

_PERMUTED = (
    "llama llama-embed mistral3 granite granitemoe granitehybrid smollm3 arcee minicpm deci olmo internlm2 xverse "
    "baichuan arctic deepseek bailingmoe llada chameleon nanbeige eagle3"
)
_AS_THEY_ARE = (
    "qwen3next qwen35 qwen35moe "
    "afmoe apertus bailingmoe2 bert bitnet bloom chatglm codeshell cohere2 cogvlm command-r dbrx deepseek2 dots1 dream "
    "ernie4_5 ernie4_5-moe eurobert exaone exaone4 falcon falcon-h1 gemma gemma-embedding gemma2 gemma3 gemma3n gemma4 "
    "glm4 glm4moe gpt-oss gpt2 gptj gptneox grok grovemoe hunyuan-dense hunyuan-moe jais jamba jina-bert-v2 lfm2 "
    "lfm2moe llada-moe llama4 mamba mamba2 minicpm3 minimax-m2 modern-bert mpt nemotron neo-bert nomic-bert "
    "nomic-bert-moe olmo2 olmoe openelm orion pangu-embedded phi2 phi3 phimoe plm qwen qwen2 qwen2moe qwen2vl qwen3 "
    "qwen3moe qwen3vl qwen3vlmoe refact rwkv6 rwkv7 seed_oss smallthinker stablelm starcoder starcoder2 t5 t5encoder "
    "umt5"
)
_TRANSPOSED = {
    "gpt2": "attn_qkv attn_output ffn_up ffn_down",
    "jais": "attn_qkv attn_output ffn_up ffn_down ffn_gate",
    "gpt-oss": "ffn_gate_exps ffn_up_exps ffn_down_exps",
    "llama4": "ffn_gate_exps ffn_up_exps ffn_down_exps",
    "dbrx": "ffn_down_exps",
}
_META = re.compile(r"layers\.\d+\.attention\.(w[qk])\.weight")
_MOST_BLOCKS = 1000
# value heads of linear attention, which llama.cpp tiles where the original groups them by key head
_REORDERED = dict.fromkeys(("qwen35", "qwen35moe"), "attn_qkv attn_gate ssm_out ssm_alpha ssm_beta ssm_conv1d")
_REGROUPED = frozenset({"bloom", "falcon", "gptneox"})  # q, k, v of all heads in sequence, not head by head


def original_layout(tensors: Iterable[StoredTensor], metadata: Metadata) -> list[StoredTensor]:
    """The `tensors` of a GGUF file as the checkpoint it was made from has them.

    q and k of an architecture of which it is not known whether they were permuted keep their rows, and a warning.

    Args:
        tensors: stored tensors of the GGUF file, or of its parts.
        metadata: metadata of the file by key, as in ``llama.attention.head_count``.
    """
    architecture = str(metadata.get("general.architecture"))
    return [_original(tensor, architecture, metadata) for tensor in tensors]


def gguf_config(metadata: Metadata) -> dict[str, Any]:
    """What a ``config.json`` says of sizes and heads, from the `metadata` of a GGUF file; without a model_type."""
    architecture = metadata.get("general.architecture")
    known = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
    }
    found = {key: metadata.get(f"{architecture}.{theirs}") for key, theirs in known.items()}
    config = {key: value for key, value in found.items() if isinstance(value, int)}
    return config | {"gguf_architecture": architecture}


def meta_layout(
    tensors: Iterable[StoredTensor], params: Mapping[str, Any], config: dict[str, Any]
) -> tuple[list[StoredTensor], dict[str, Any]]:
    """The `tensors` of a model, and its configuration; those of a checkpoint in Meta's format as transformers has them.

    Args:
        tensors: stored tensors of a model.
        params: content of its ``params.json``, which tells the number of heads; empty where there is none.
        config: content of its ``config.json``. Where that has a model_type, the model is in transformers' format.

    Returns:
        The tensors, and the configuration with what `params` adds to it.
    """
    tensors = list(tensors)
    if "model_type" in config or not any(_META.fullmatch(tensor.name) for tensor in tensors):
        return tensors, config
    heads = {"wq": params.get("n_heads", 0), "wk": params.get("n_kv_heads") or params.get("n_heads", 0)}
    found = []
    for tensor in tensors:
        match = _META.fullmatch(tensor.name)
        found.append(_with_rows_back(tensor, heads[match[1]], "its params.json is not there") if match else tensor)
    known = {"num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "hidden_size": "dim"}
    told = {key: params[theirs] for key, theirs in known.items() if isinstance(params.get(theirs), int)}
    return found, config | told


def flax_layout(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """The `tensors`, in which kernels of flax with three axes or more are not guessed at but have a problem.

    A convolution's is (height, width, in, out), an attention's (in, heads, size) or (heads, size, out), and a scanned
    stack has one more axis in front.

    Args:
        tensors: stored tensors of a file.
    """
    why = "{} is a kernel of flax with {} axes, which can be laid out in several ways"
    return [
        replace(tensor, problem=("unsupported", why.format(tensor.name, len(tensor.shape))))
        if len(tensor.shape) > 2 and re.search(r"[./]kernel$", tensor.name) and tensor.problem is None
        else tensor
        for tensor in tensors
    ]


def as_named(
    tensors: Iterable[StoredTensor],
    others: Iterable[StoredTensor],
    config: Mapping[str, Any],
    other_config: Mapping[str, Any],
) -> list[StoredTensor]:
    """The `tensors` of one model under the names of another, where one of the two is a GGUF file.

    Args:
        tensors: stored tensors of the one model; those without a counterpart keep their names.
        others: stored tensors of the other model.
        config: configuration of the one model; that of a GGUF file is from `gguf_config`.
        other_config: configuration of the other model.
    """
    tensors = list(tensors)
    of_gguf = [c for c in (config, other_config) if "gguf_architecture" in c]
    if len(of_gguf) != 1 or (gguf_name := _gguf_names(of_gguf[0])) is None:
        return tensors
    ours = {tensor.name: gguf_name(tensor.name) for tensor in tensors}
    theirs = {gguf_name(other.name): other.name for other in others}
    renamed = {name: theirs[key] for name, key in ours.items() if key in theirs}
    result = [replace(tensor, name=renamed.get(tensor.name, tensor.name)) for tensor in tensors]
    if of_gguf[0]["gguf_architecture"] in _REGROUPED:
        why = "{} holds q, k and v head by head in the one model and not in the other"
        result = [
            replace(new, problem=("unmatched", why.format(new.name))) if ".attn_qkv." in ours[old.name] else new
            for old, new in zip(tensors, result, strict=True)
        ]
    return result


def _gguf_names(config: Mapping[str, Any]) -> Callable[[str], str] | None:
    """Gives a tensor of the original checkpoint its name in a GGUF file; a name without one stays."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next((key for key, value in MODEL_ARCH_NAMES.items() if value == config["gguf_architecture"]), None)
    if number is None:
        return None
    known = get_tensor_name_map(number, min(int(config.get("num_hidden_layers", 0)), _MOST_BLOCKS))

    def name_of(name: str) -> str:
        stem, dot, last = name.rpartition(".")
        found = known.get_name(stem)
        return f"{found}{dot}{last}" if found else name

    return name_of


def _original(tensor: StoredTensor, architecture: str, metadata: Metadata) -> StoredTensor:
    match = re.fullmatch(r"(?:\w+\.)*?blk\.(\d+)\.(\w+)(?:\.\w+)*?\.weight", tensor.name)
    if match is None or tensor.problem is not None or len(tensor.shape) < 2:
        return tensor
    block, leaf = int(match[1]), match[2]
    if leaf in _REORDERED.get(architecture, "").split():
        return _with_rows_back(tensor, 0, f"llama.cpp orders the heads of {architecture} otherwise")
    if leaf in _TRANSPOSED.get(architecture, "").split():
        shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
        return replace(tensor, shape=shape, read=_Changed(tensor.read, len(shape), lambda W: W.swapaxes(-1, -2)))
    if leaf in ("ssm_conv1d", "shortconv") and len(tensor.shape) == 2:
        shape = (tensor.shape[0], 1, tensor.shape[1])
        return replace(tensor, shape=shape, kind="conv", read=_Changed(tensor.read, 0, lambda W: W[:, None]))
    if leaf not in ("attn_q", "attn_k") or architecture in _AS_THEY_ARE.split():
        return tensor
    heads = _heads(leaf, block, architecture, metadata) if architecture in _PERMUTED.split() else 0
    return _with_rows_back(tensor, heads, f"what llama.cpp does to {architecture} is not known")


def _with_rows_back(tensor: StoredTensor, heads: Any, why: str) -> StoredTensor:
    """q or k in transformers' order of rows; with a warning where its `heads` are not known."""
    if tensor.problem is None and isinstance(heads, int) and heads > 0 and tensor.shape[0] % (2 * heads) == 0:
        return replace(tensor, read=_Changed(tensor.read, 0, lambda W: unpermuted(W, heads)))
    warning = f"the order of its rows or columns may not be that of transformers: {why}"
    return replace(tensor, warning="; ".join(filter(None, (tensor.warning, warning))), order=why)


def _heads(leaf: str, block: int, architecture: str, metadata: Metadata) -> int:
    """Heads of q or of k in a block; 0 where not known. Some architectures have a number for each block."""
    keys = ["attention.head_count_kv"] * (leaf == "attn_k") + ["attention.head_count"]
    count: Any = next((metadata[key] for key in (f"{architecture}.{k}" for k in keys) if key in metadata), 0)
    if hasattr(count, "__len__"):
        count = count[block] if block < len(count) else 0
    return int(count)


def unpermuted(W: Array, heads: int) -> Array:
    """W, (rows, …), with the rows of each of its `heads` from (i, half) back to (half, i).

    Examples:
        >>> import numpy as np
        >>> from htsr.matrices.layouts import unpermuted
        >>> unpermuted(np.array([[0], [2], [1], [3]]), heads=1).ravel().tolist()  # stored 0, 2, 1, 3
        [0, 1, 2, 3]
    """
    return W.reshape(heads, W.shape[0] // heads // 2, 2, *W.shape[1:]).swapaxes(1, 2).reshape(tuple(W.shape))


@dataclass(frozen=True)
class _Changed:
    """Reads a tensor and changes it; slices of a stack, of `axes` = 3 axes, are read and changed one by one."""

    read: Callable[..., Array]
    axes: int
    change: Callable[[Array], Array]

    def __call__(self, index: Any = None) -> Array:
        if index is not None and self.axes == 3:
            return self.change(self.read(index))
        whole = self.change(self.read())
        return whole if index is None else whole[index]
