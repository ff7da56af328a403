"""Tiny transformers and a tokenizer, made on the spot."""

from __future__ import annotations

import json

import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def llama(blocks: int = 3, width: int = 32, vocabulary: int = 64, seed: int = 0, **more) -> LlamaForCausalLM:
    """A LLaMA with random weights and untied embeddings (unless told otherwise)."""
    torch.manual_seed(seed)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 3 * width}
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=blocks,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"attn_implementation": "eager"} | sizes | more,
    )
    return LlamaForCausalLM(config)


def gpt2(blocks: int = 2, width: int = 32, vocabulary: int = 64) -> GPT2LMHeadModel:
    """A GPT-2, whose linear layers are Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=blocks, n_head=4, n_positions=256)
    return GPT2LMHeadModel(config)


def bert(blocks: int = 2, width: int = 32, vocabulary: int = 64) -> BertModel:
    """An encoder."""
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            intermediate_size=64,
        )
    )


def word_tokenizer(vocabulary: int = 64):
    """A tokenizer of the words w4, w5 … with padding, begin, end and unknown in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, vocabulary))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_work(folder) -> None:
    """What a recipe needs: a small LLaMA with its tokenizer under ``model``, and texts in ``train.jsonl``."""
    llama(4).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    lines = [{"text": " ".join(f"w{4 + (i + j) % 60}" for j in range(12))} for i in range(0, 120, 3)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
