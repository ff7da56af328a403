"""How fast and how small the analyzer is, beside WeightWatcher on the same weights."""
