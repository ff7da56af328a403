"""Layerwise learning rates with Lightning."""

import lightning
import torch
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

import htsr


class Model(lightning.LightningModule):
    def __init__(self, config):
        super().__init__()
        self.model = LlamaForCausalLM(config)

    def training_step(self, tokens, _):
        return self.model(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        optimizer = htsr.layerwise(optimizer, self, total_steps=steps, interval=4, ramp=2)
        return [optimizer], [{"scheduler": get_scheduler("cosine", optimizer, 2, steps), "interval": "step"}]


config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
model = Model(config)
trainer = lightning.Trainer(max_steps=20, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(model, torch.utils.data.DataLoader(torch.randint(0, 256, (64, 16)), batch_size=2))
