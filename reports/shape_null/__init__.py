"""The table of shape nulls that the package carries, and how it is made."""
