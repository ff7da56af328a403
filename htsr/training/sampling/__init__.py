"""Layer sampling: which blocks of a transformer train now (LISA, OwLore and their relatives)."""
