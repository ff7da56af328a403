"""Every way to fine-tune under one protocol: loss, memory, time and forgetting, each at its own learning rate."""
