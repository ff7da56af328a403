"""The `htsr` command."""
