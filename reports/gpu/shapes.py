"""The sizes that are measured."""

from __future__ import annotations

SHAPES = {  # the matrices of LLaMA-2-7B's blocks: rows, columns, how many
    "attn.q/k/v/o": (4096, 4096, 128),
    "mlp.gate/up": (11008, 4096, 64),
    "mlp.down": (4096, 11008, 32),
}
SMALL_SHAPES = {"attn.q/k/v/o": (96, 96, 2), "mlp.gate/up": (256, 96, 2), "mlp.down": (96, 256, 1)}

SEVEN_B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
SMALL = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
_SIZES = {
    "60M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "135M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1B": {"hidden_size": 2048, "intermediate_size": 5461, "num_hidden_layers": 24, "num_attention_heads": 32},
}
LAYERED = {name: sizes | {"vocab_size": 32000} for name, sizes in _SIZES.items()}
