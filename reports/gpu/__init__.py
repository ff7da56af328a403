"""What htsr does on an accelerator."""
