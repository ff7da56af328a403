"""What the tests with several gloo processes share."""

import json
import os
from contextlib import contextmanager

import torch


def in_two_processes(worker, folder):
    """`worker(rank, folder)` in two processes, each of which ends with `leave_with`; what they found, by rank."""
    torch.multiprocessing.spawn(worker, (folder,), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def leave_with(found, rank, folder):
    """End a worker of `in_two_processes`."""
    (folder / f"{rank}.json").write_text(json.dumps(found))
    leave()


def leave():
    """End a worker whose results are written. Threads of gloo can abort a process that ends in the usual way."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


@contextmanager
def one_thread():
    """Sums in the order of a worker, which has one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
