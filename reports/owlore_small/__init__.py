"""Study: SmolLM2-135M-Instruct fine-tuned by every method of `htsr finetune`, on commonsense questions."""
