"""A 7B-shaped checkpoint in little memory: interrupted, resumed, and shared by two processes."""
