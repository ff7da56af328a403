"""Layerwise learning rates with the transformers Trainer."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import htsr

config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
tokens = torch.randint(0, 256, (64, 16))
dataset = [{"input_ids": row, "labels": row} for row in tokens]

arguments = TrainingArguments(
    "layerwise-trainer", max_steps=20, learning_rate=1e-3, weight_decay=0.1, warmup_steps=2,
    lr_scheduler_type="cosine", logging_steps=5, report_to="none",
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=dataset)
trainer.add_callback(htsr.LayerwiseCallback(trainer, interval=4, ramp=2))
trainer.train()
