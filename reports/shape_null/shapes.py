"""The shapes of weight matrices in common transformers, as their configurations have them."""

from __future__ import annotations

# hidden size: the other sides of the matrices that stand on it (queries, keys and values, MLP, vocabulary, positions)
SIDES: dict[int, tuple[int, ...]] = {
    128: (128, 512, 768, 30000, 30522),  # BERT tiny, ALBERT's embeddings
    192: (192, 768, 1000),  # ViT and DeiT tiny
    256: (256, 1024, 30522),  # BERT mini, ELECTRA small
    384: (384, 512, 1000, 1536, 30522, 51864, 51865),  # MiniLM, BGE small, ViT small, Whisper tiny
    512: (512, 768, 1024, 2048, 30522, 32128, 49408, 50272, 50304, 51865),  # BERT small, T5 small, CLIP, Pythia 70M
    576: (192, 576, 1536, 49152),  # SmolLM2 135M
    640: (256, 1024, 2048, 262144),  # Gemma 3 270M
    768: (
        512, 514, 768, 1000, 1024, 1152, 2048, 2304, 3072, 21128, 28996, 30522, 32128, 49408, 50257, 50265, 50272,
        50304, 50368, 51865, 105879, 119547, 128100, 250002,
    ),  # BERT, RoBERTa, GPT-2, OPT, Pythia, T5, CLIP, ViT, Whisper, DeBERTa, ModernBERT: base
    896: (128, 896, 4864, 151936),  # Qwen2.5 0.5B
    960: (320, 960, 2560, 49152),  # SmolLM2 360M
    1024: (
        512, 514, 1000, 1024, 2048, 2624, 2816, 3072, 4096, 8194, 28996, 30522, 32128, 50257, 50265, 50272, 50304,
        50368, 51865, 128100, 151936, 250002, 250880,
    ),  # large encoders, GPT-2 medium, Pythia 410M, BLOOM 560M, T5 large, Qwen1.5 0.5B, Qwen3 0.6B
    1152: (256, 1024, 1152, 4304, 6912, 262144),  # SigLIP, Gemma 3 1B
    1280: (1024, 1280, 5120, 50257, 51865, 51866),  # GPT-2 large, ViT huge, Whisper large
    1536: (256, 1536, 4096, 6144, 8960, 128100, 151936, 250880),  # Qwen2.5 1.5B, DeBERTa xlarge, DINOv2
    1600: (1024, 1600, 6400, 50257),  # GPT-2 XL
    2048: (
        256, 512, 768, 1024, 2048, 4096, 5120, 5504, 5632, 6144, 8192, 11008, 16384, 32000, 32128, 32256, 49152,
        50257, 50272, 50304, 51200, 92544, 100352, 128256, 131072, 151936, 256000,
    ),  # TinyLlama, Llama 3.2 1B, SmolLM2 1.7B, SmolLM3, Qwen2.5 3B, Qwen3 1.7B, Gemma 2B, OLMo 1B, Pythia 1B, Phi 1.5
    2304: (1024, 2048, 2304, 5760, 9216, 122753, 256000),  # Gemma 2 2B, MiniCPM
    2560: (
        1024, 2048, 2560, 4096, 6912, 9728, 10240, 50257, 50272, 50304, 51200, 151936, 250880, 262208,
    ),  # Qwen3 4B, Gemma 3 4B, Pythia 2.8B, OPT 2.7B, BLOOM 3B, Phi 2, StableLM 3B
    3072: (256, 1024, 3072, 4096, 8192, 9216, 12288, 24576, 32064, 49152, 128256, 131072, 200064, 256000),
    # Llama 3.2 3B, Phi 3 and 4 mini, Falcon 3 3B, Gemma 7B, StarCoder2 3B
    3584: (512, 2048, 3584, 4096, 14336, 18944, 152064, 256000),  # Qwen2.5 7B, Gemma 2 9B
    3840: (2048, 3840, 4096, 15360, 262208),  # Gemma 3 12B
    4096: (
        512, 1024, 2048, 4096, 11008, 12288, 14336, 16384, 32000, 32768, 50272, 50304, 50400, 50432, 64000, 100352,
        102400, 128256, 151936, 250880,
    ),  # Llama 7B and 8B, Mistral 7B, Qwen3 8B, OLMo 7B, Pythia 6.9B, OPT 6.7B, GPT-J, Yi 6B
    5120: (
        1024, 1280, 4096, 5120, 8192, 13824, 14336, 17408, 17920, 20480, 25600, 27648, 32000, 32768, 50688, 100352,
        131072, 151936, 152064,
    ),  # Llama 13B, Qwen2.5 14B and 32B, Qwen3 14B and 32B, Phi 4, Mistral Nemo and Small, Pythia 12B
}  # fmt: skip

# beside those, one matrix of each other kind that a null is drawn for, so that a change of any is seen:
# smaller side, larger side, pieces, rank, whether it is a product
OTHERS: tuple[tuple[int, int, int, int | None, bool], ...] = (
    (64, 192, 1, None, False),  # the dense solver
    (64, 64, 9, None, False),  # few pieces, then many, of a pool
    (48, 96, 100, None, False),
    (384, 1536, 1, 16, False),
    (384, 1536, 1, 16, True),
    (384, 384, 3, 16, True),
)


def nulls() -> list[tuple[int, int, int, int | None, bool]]:
    """Arguments of `htsr.spectra.null.alpha_null`, but for the fit, of all that the table holds."""
    shapes = {(min(h, other), max(h, other)) for h, others in SIDES.items() for other in others}
    return [*((M, N, 1, None, False) for M, N in sorted(shapes)), *OTHERS]
