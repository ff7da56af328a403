"""Where htsr and WeightWatcher agree, and where they differ on purpose."""
