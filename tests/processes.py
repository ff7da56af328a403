"""What the tests with several gloo processes share."""

import json
import multiprocessing
import os
from contextlib import contextmanager

import torch

# What takes long to import is imported once, by the process that all others are forked from, which runs nothing else.
PRELOADED = ["torch.distributed.tensor", "transformers.trainer", "peft", "htsr.ranks"]
multiprocessing.set_forkserver_preload(PRELOADED)


def in_two_processes(worker, folder):
    """`worker(rank, folder)` in two processes, each of which ends with `leave_with`; what they found, by rank."""
    start(worker, (folder,), 2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def start(worker, arguments, count):
    """`worker(rank, *arguments)` in `count` processes that share nothing with this one but its environment."""
    given = (dict(os.environ), worker, arguments)
    torch.multiprocessing.start_processes(_begin, given, nprocs=count, start_method="forkserver")


def _begin(rank, environment, worker, arguments):
    os.environ.clear()  # that of the process which was forked from is as old as itself
    os.environ.update(environment)
    worker(rank, *arguments)


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
