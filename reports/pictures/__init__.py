"""The README's pictures, made by the program."""
