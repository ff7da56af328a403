"""A spectral monitor with Accelerate: the same script for one process, DDP and FSDP2."""

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import htsr

accelerator = Accelerator()  # log_with="tensorboard", and accelerator.init_trackers("run"), to see it
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
monitor = htsr.SpectralMonitor(model, every=5, share=1.0, path="run/trajectory.jsonl", log=accelerator.log)
accelerator.register_for_checkpointing(monitor)
for _ in range(20):
    tokens = torch.randint(0, 256, (4, 16), device=accelerator.device)
    accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
    optimizer.step()
    monitor.step()
    optimizer.zero_grad()
accelerator.save_state("run/checkpoint-20")
monitor.close()
