"""Direct preference optimization with some blocks at a time, low-rank optimizer states and a spectral monitor."""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import htsr

model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
pairs = Dataset.from_json("preferences.jsonl")  # records with prompt, chosen and rejected

optimizer = htsr.LowRankAdamW(htsr.low_rank_groups(model, rank=8), lr=1e-3)
sampler = htsr.LayerSampler(model, active=2, interval=2)
arguments = DPOConfig("dpo", max_steps=6, save_steps=3, per_device_train_batch_size=2, report_to="none", bf16=False)
trainer = DPOTrainer(
    model, args=arguments, train_dataset=pairs, processing_class=tokenizer, optimizers=(optimizer, None),
    callbacks=[htsr.LayerSamplerCallback(sampler), htsr.SpectralMonitor(every=3, share=1.0)],
)  # fmt: skip
trainer.train()
