"""Work shared among processes that see everything this one has loaded.

They are forked, so that a library of gigabytes is neither loaded again nor sent to them. Where a fork is not safe
(other systems than Linux, a program with threads) all is done in this process; the results are the same.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Thing = TypeVar("Thing")
Result = TypeVar("Result")

_shared: list[Any] = []
"""In a forked process: the work, and the things to do it with."""


def usable() -> int:
    """How many processes may share work: the cores this program may use, or 1 where a fork is not safe."""
    if sys.platform != "linux" or threading.active_count() > 1:
        return 1
    return len(os.sched_getaffinity(0))


def spread(work: Callable[[Thing], Result], things: Sequence[Thing], processes: int) -> list[Result]:
    """What ``work`` makes of each of ``things``, in their order.

    With more than one process nothing is sent to the others but the place of a thing in the list. What ``work``
    returns, or raises, is sent back.

    Raises:
        BrokenProcessPool: one of the processes was ended from outside.
    """
    processes = min(processes, len(things))
    if processes < 2:
        return [work(thing) for thing in things]
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(processes, get_context("fork"), _begin, (work, things)) as pool:
        return list(pool.map(_do, range(len(things))))


def _begin(work: Callable[[Any], Any], things: Sequence[Any]) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is answered by the process that waits for all of them
    _shared[:] = work, things


def _do(place: int) -> Any:
    work, things = _shared
    return work(things[place])
