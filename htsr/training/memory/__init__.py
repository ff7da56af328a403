"""The memory that a training run will need, predicted from the configuration of its model."""
