"""Layerwise learning rates with Accelerate: the same script for one process, DDP and FSDP2."""

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

import htsr

accelerator = Accelerator()
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
)
steps = 20
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
optimizer = htsr.layerwise(optimizer, model, total_steps=steps, interval=4, ramp=2)
scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=steps)
model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
for _ in range(steps):
    tokens = torch.randint(0, 256, (4, 16), device=accelerator.device)
    accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    accelerator.log(htsr.log_values(optimizer))
