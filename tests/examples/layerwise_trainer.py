"""Layerwise learning rates with the transformers Trainer."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import htsr
from htsr.training.callbacks import LayerwiseCallback

config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
tokens = torch.randint(0, 256, (64, 16))
dataset = [{"input_ids": row, "labels": row} for row in tokens]

optimizer = htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=1e-3), model, interval=4, ramp=2)
arguments = TrainingArguments(
    "layerwise-trainer", max_steps=20, warmup_steps=2, lr_scheduler_type="cosine", logging_steps=5, report_to="none"
)
trainer = Trainer(model, arguments, train_dataset=dataset, optimizers=(optimizer, None))
trainer.add_callback(LayerwiseCallback(trainer))
trainer.train()
