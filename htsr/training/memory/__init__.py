"""What a training run will need, predicted."""
