"""Layerwise learning rates and weight decay around any torch optimizer."""
