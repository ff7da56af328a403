"""Group-relative policy optimization with layerwise learning rates and a spectral monitor."""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import htsr


def reward(completions, **_):
    """The more different words the better."""
    return [float(len(set(text.split()))) for text in completions]


model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
prompts = Dataset.from_json("preferences.jsonl").select_columns("prompt")

arguments = GRPOConfig(
    "grpo", max_steps=4, learning_rate=1e-3, per_device_train_batch_size=4, num_generations=4,
    max_completion_length=8, logging_steps=1, report_to="none", bf16=False,
)  # fmt: skip
trainer = GRPOTrainer(model, reward, args=arguments, train_dataset=prompts, processing_class=tokenizer)
trainer.add_callback(htsr.LayerwiseCallback(trainer, score=None, embeddings=5))
trainer.add_callback(htsr.SpectralMonitor(every=2, share=1.0))
trainer.train()
