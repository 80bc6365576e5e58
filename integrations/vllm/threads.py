"""Where the CPU engine's threads run.

vLLM's CPU worker binds each of torch's threads to a core of its own, the main thread among them. A
thread started later inherits the main thread's binding, so all of ours would share one core.
"""

from __future__ import annotations

import os

import torch

from fi_backend import merge_states

# Enough rows that a merge is shared out to every thread.
ROWS_PER_THREAD = 1024


def start_threads() -> None:
    """Start the engine's threads while the calling thread may run on all cores of torch's threads.

    Does nothing where torch has one thread, or where nothing is bound.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not hasattr(os, "sched_setaffinity"):
        return
    own = os.sched_getaffinity(0)
    cores = own.union(*(_cores(int(task)) for task in os.listdir("/proc/self/task")))
    if cores == own:
        return
    os.sched_setaffinity(0, cores)
    try:
        rows = ROWS_PER_THREAD * threads
        merge_states(torch.zeros(1, rows, 1, 1), torch.zeros(1, rows, 1))
    finally:
        os.sched_setaffinity(0, own)


def _cores(thread: int) -> set[int]:
    try:
        return os.sched_getaffinity(thread)
    except ProcessLookupError:  # it has ended since it was listed
        return set()
