"""Selection by signal-to-noise ratio: what Spectrum's edge finds in noise, and what `htsr.select` does."""
