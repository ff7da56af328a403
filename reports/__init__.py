"""Studies that anyone can run again: `python -m reports.NAME`, with `--quick` for a short pass."""
