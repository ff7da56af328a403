"""Time of whole training steps by method."""
