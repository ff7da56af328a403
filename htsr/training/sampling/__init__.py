"""Which blocks of a transformer train now."""
