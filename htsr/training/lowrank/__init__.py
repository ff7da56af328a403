"""AdamW whose states, and if wanted gradients, live in low-rank subspaces of the gradients."""
