"""Models run on texts: norms of activations, outliers, multiple-choice answers; and how models and texts are read."""
