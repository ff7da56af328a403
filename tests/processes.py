"""What the tests with several gloo processes share."""

import os

import torch


def leave():
    """End a worker whose results are written. Threads of gloo can abort a process that ends in the usual way."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)
