"""How α behaves as an estimator: bias, variance, coverage, and what a difference has to be to mean something."""
