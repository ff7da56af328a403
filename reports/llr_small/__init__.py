"""Layerwise learning rates on a small LLaMA, every arm at its own tuned learning rate."""
