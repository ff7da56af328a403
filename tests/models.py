"""Small models with trained-like spectra, made on the spot."""

from __future__ import annotations

import numpy as np
import torch


def heavy_matrix(random: np.random.Generator, rows: int, columns: int) -> torch.Tensor:
    """Power-law correlations on a noise floor, float32."""
    rank = min(rows, columns)
    factor = random.standard_normal((rows, rank)) * (1 - random.random(rank)) ** -0.4
    W = factor @ random.standard_normal((rank, columns)) / rank + 0.3 * random.standard_normal((rows, columns))
    return torch.from_numpy((0.05 * W).astype(np.float32))


def state_dict(blocks: int = 3, width: int = 32, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LLaMA-like state dict."""
    random = np.random.default_rng(seed)
    state = {"model.embed_tokens.weight": heavy_matrix(random, 5 * width, width)}
    for i in range(blocks):
        for part, rows, columns in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", width // 2, width),
            ("mlp.up_proj", 3 * width, width),
            ("mlp.down_proj", width, 3 * width),
        ):
            state[f"model.layers.{i}.{part}.weight"] = heavy_matrix(random, rows, columns)
        state[f"model.layers.{i}.input_layernorm.weight"] = torch.ones(width)
    return state


def save_folder(folder, state: dict[str, torch.Tensor]) -> str:
    """`state` as a folder with one safetensors file; returns its path as text."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    return str(folder)
