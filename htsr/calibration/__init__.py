"""What a model says of texts: its activations, its outliers, its answers; and the texts themselves."""
