"""Training with the spectra: layerwise learning rates and weight decay."""
