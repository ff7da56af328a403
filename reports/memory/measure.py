"""Peak memory of real training steps, by torch's own allocator on the CPU."""

from __future__ import annotations

import copy
import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from htsr.training.lowrank.groups import low_rank_groups
from htsr.training.lowrank.gum import GUM
from htsr.training.lowrank.gum_groups import gum_groups
from htsr.training.lowrank.optimizer import LowRankAdamW
from htsr.training.lowrank.rounding import NARROW
from htsr.training.sampling.sampler import LayerSampler

STEPS = "training steps"


def peak_allocated(run: Callable[[], Any]) -> int:
    """Most bytes that torch's CPU allocator held at once, of those allocated in `run`, from its mark `STEPS` on."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # models of before that only the collector frees would count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    begin = min((event["ts"] for event in events if event.get("name") == STEPS), default=0)
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    before = int(memory[0]["args"]["Total Allocated"]) - int(memory[0]["args"]["Bytes"])
    return max(int(event["args"]["Total Allocated"]) for event in memory if event["ts"] >= begin) - before


def train(config: Any, method: str, batch: int, sequence: int, *, rank: int, warm_up: int = 8, **options: Any) -> None:
    """Two real steps of a freshly made model, the first of few tokens; options as in `htsr.predict_memory`.

    With a `frozen_state` there are twenty first ones, in which all blocks are drawn.

    `seed` is that of the draws of matrices.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = copy.deepcopy(config)  # transformers notes the dtype in it
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.get("dtype") or "float32"))
    model.config.use_cache = False
    model.train()
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if method == "qlora":
        quantise(model)
    in_tiles = {}
    if options.get("logits") == "chunked":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        in_tiles = {"fused_lm_head": True}
    if method in ("lora", "qlora"):
        import peft

        if options.get("checkpointing"):
            model.enable_input_require_grads()
        adapters = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options.get("lora_options", {})}
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, **adapters))
    samples = method in ("lisa", "owlore")
    drawn = {name: options[name] for name in ("unit", "frozen_state") if samples and name in options}
    if samples and not drawn:
        frozen = () if options.get("embeddings") else (model.get_input_embeddings(), model.get_output_embeddings())
        for module in (*frozen, *model.model.layers[options["active_blocks"] :]):
            module.requires_grad_(False)
    rounding = options.get("rounding") or "stochastic"
    if method in ("galore", "owlore", "apollo"):
        low = options.get("embeddings") == "lowrank"
        groups = low_rank_groups(model, rank, embeddings=low, refresh_every=1)
        if method == "apollo":
            groups[0] |= {"scaled_by": "channel", "method": "random"}
        if "projector" in options:
            groups[0]["method"] = options["projector"]
        state_dtype = options.get("state_dtype", "float32")
        gradients = options.get("gradients", "keep")
        optimizer: Any = LowRankAdamW(groups, gradients=gradients, state_dtype=state_dtype, rounding=rounding)
    elif method == "gum":
        groups = gum_groups(
            model, rank, refresh_every=2, unit=options.get("unit", "block")
        )  # whose end drops the states
        names = ("gradients", "state_dtype", "base")
        own = {name: options[name] for name in names if name in options}
        each = sum("unit" in group for group in groups) // config.num_hidden_layers
        optimizer = GUM(groups, active=options["active_blocks"] * each, rounding=rounding, **own)
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        if rounding == "nearest" or not any(p.dtype in NARROW for p in trained):
            optimizer = torch.optim.AdamW(trained, fused=True)
        else:
            optimizer = LowRankAdamW(trained, state_dtype="bfloat16", rounding=rounding)
    if drawn:
        embedding = options.get("embeddings", "freeze")
        drawn |= {"active": options["active_blocks"], "embedding": embedding, "seed": options.get("seed", 0)}
        LayerSampler(model, interval=1, **drawn).attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    first = [(1, min(warm_up, sequence))] * (20 if "frozen_state" in drawn else 1)  # makes the optimizer's states
    with torch.profiler.record_function(STEPS):
        for shape in (*first, (batch, sequence)):
            for _ in range(options.get("accumulation", 1)):
                tokens = torch.randint(0, config.vocab_size, shape, generator=generator)
                model(input_ids=tokens, labels=tokens, **in_tiles).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if evaluated := options.get("evaluation"):
            tokens = torch.randint(0, config.vocab_size, (evaluated, sequence), generator=generator)
            with torch.no_grad():
                model.eval()(input_ids=tokens, labels=tokens, **in_tiles)


def quantise(model: Any) -> None:
    """The blocks' linear layers in 4 bits as QLoRA has them: NF4, double quantisation; the rest stays as it is."""
    import bitsandbytes as bnb

    for block in model.model.layers:
        for name, linear in [(n, m) for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)]:
            dense, dtype = linear.weight.detach(), linear.weight.dtype
            packed = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=dtype,
                quant_type="nf4",
                device="meta",
            )
            packed.weight = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4", compress_statistics=True)
            block.set_submodule(name, packed.to("cpu"))
    model.is_loaded_in_4bit = True  # peft then puts its adapters around the packed layers
