"""A checkpoint of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def make_llama(folder: Path, *, blocks: int, width: int, inner: int, kv: int, vocabulary: int) -> Path:
    """`folder` with a LLaMA checkpoint of synthetic heavy-tailed float32 weights, one shard a block; made once."""
    if (folder / "config.json").exists():
        return folder
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)

    def heavy(rows: int, columns: int) -> Any:
        scale = (1 - random.random(columns, dtype=np.float32)) ** -0.35
        return (random.standard_normal((rows, columns), dtype=np.float32) * scale * 0.02).astype(np.float32)

    shards: dict[str, str] = {}

    def save(file: str, tensors: dict[str, Any]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shards.update(dict.fromkeys(tensors, file))

    save("model-ends.safetensors", {
        "model.embed_tokens.weight": heavy(vocabulary, width),
        "lm_head.weight": heavy(vocabulary, width),
        "model.norm.weight": np.ones(width, np.float32),
    })  # fmt: skip
    for i in range(blocks):
        name = f"model.layers.{i}"
        save(f"model-{i:02}.safetensors", {
            f"{name}.self_attn.q_proj.weight": heavy(width, width),
            f"{name}.self_attn.k_proj.weight": heavy(kv, width),
            f"{name}.self_attn.v_proj.weight": heavy(kv, width),
            f"{name}.self_attn.o_proj.weight": heavy(width, width),
            f"{name}.mlp.gate_proj.weight": heavy(inner, width),
            f"{name}.mlp.up_proj.weight": heavy(inner, width),
            f"{name}.mlp.down_proj.weight": heavy(width, inner),
            f"{name}.input_layernorm.weight": np.ones(width, np.float32),
            f"{name}.post_attention_layernorm.weight": np.ones(width, np.float32),
        })  # fmt: skip
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": blocks, "num_attention_heads": width // 64, "num_key_value_heads": kv // 64,
        "vocab_size": vocabulary, "tie_word_embeddings": False, "dtype": "float32", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))  # last: it says that the rest is there
    return folder
