"""Speed of the low-rank optimizer beside galore-torch."""
