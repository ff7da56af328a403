"""Whether a fine-tuned model can be repaired from its weights alone."""
