"""A 7B-shaped checkpoint in little memory: killed, resumed, and shared by two processes."""
