"""Training with what the spectra say: optimizers, samplers, adapters, and the memory that they need."""
