"""Peak memory of real training steps, by torch's own allocator on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from htsr.training.lowrank import LowRankAdamW
from htsr.training.lowrank_groups import low_rank_groups


def peak_allocated(run: Callable[[], Any]) -> int:
    """Most bytes that torch's CPU allocator held at once while `run` ran, of those allocated in it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return max(int(event["args"]["Total Allocated"]) for event in events if event.get("name") == "[memory]")


def train(config: Any, method: str, batch: int, sequence: int, *, rank: int, steps: int = 2, **options: Any) -> None:
    """A few real steps of a freshly made model; options as in `htsr.predict_memory`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = getattr(torch, options.get("dtype") or "float32")
    if method == "qlora":
        model: Any = quantised(config, dtype)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = False
    model.train()
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if method in ("lora", "qlora"):
        import peft

        if options.get("checkpointing"):
            model.enable_input_require_grads()
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    if method in ("lisa", "owlore"):
        frozen = () if options.get("embeddings") else (model.get_input_embeddings(), model.get_output_embeddings())
        for module in (*frozen, *model.model.layers[options["active_blocks"] :]):
            module.requires_grad_(False)
    if method in ("galore", "owlore"):
        low = options.get("embeddings") == "lowrank"
        groups = low_rank_groups(model, rank, embeddings=low, refresh_every=1)
        state_dtype = options.get("state_dtype", "float32")
        optimizer: Any = LowRankAdamW(groups, gradients=options.get("gradients", "update"), state_dtype=state_dtype)
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, config.vocab_size, (batch, sequence), generator=generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def quantised(config: Any, dtype: torch.dtype) -> Any:
    """A freshly made model with its linear layers in NF4, scales quantised too, by bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=four_bits, device_map={"": "cpu"}
        )
        for parameter in model.parameters():
            if parameter.dtype == dtype:
                parameter.data = parameter.data.clone()  # out of the file, into the allocator that is watched
    return model
