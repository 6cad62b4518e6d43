"""Runs of a stage side by side, each in a process of its own."""

import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from rlprune.errors import InputError


def jobs() -> int:
    """``$RLPRUNE_JOBS``, how many runs go side by side; 1 if it is not set.

    Small networks leave cores idle: several with fewer threads each use them better.
    """
    given = os.environ.get("RLPRUNE_JOBS") or "1"
    if not given.isdecimal() or int(given) < 1:
        raise InputError(f"RLPRUNE_JOBS must be a whole number of at least 1, not {given!r}.")
    return int(given)


def threads(count: int) -> int:
    """Threads that each of ``count`` runs side by side has."""
    return max(1, torch.get_num_threads() // count)


def side_by_side(work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], budgets: Collection[str] = ()) -> int:
    """Call ``work`` on every task, as many at a time as `jobs` says; what it makes it leaves in files.

    A stage calls this before its own loop, which then finds every run finished. One job at a time, or a single task,
    is left to the loop, which has all threads. So are runs under a budget on latency, which would be measured beside
    another run: ``budgets`` are the names of their costs.

    Returns:
        how many are at work at a time; 1 where the loop does it all.

    Raises:
        whatever a task raises; those that are at work are finished, the others are not begun.
    """
    count = 1 if "latency" in budgets else min(jobs(), len(tasks))
    if count <= 1:
        return 1
    # a forked process would inherit the locks of this one's threads
    pool = ProcessPoolExecutor(count, get_context("spawn"), _begin, (threads(count), os.getpid()))
    with pool:
        futures = [pool.submit(work, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return count


def _begin(count: int, parent: int) -> None:
    """Make a process ready: its threads, and its end if its parent is killed."""
    torch.set_num_threads(count)
    threadpool_limits(count, "blas")  # numpy's and scipy's, too
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End this process soon after its parent: it would work on beside a run that is started again."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
