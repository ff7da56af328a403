"""Predicted and measured peak memory of training."""
