"""The place of this process among those that a launcher (`accelerate launch`, torchrun) started together.

Read from the environment that every process of a launch has; nothing is imported for it, and without a launcher a
process is the only one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from lora_fuse.errors import ProcessLost
from lora_fuse.machine import text

Result = TypeVar("Result")

LOST = (
    "another process of this run ended, or its launcher was told to; nothing was written, earlier results are as they "
    "were: run again"
)


@dataclass(frozen=True, slots=True)
class Process:
    """One of `count`: `rank` of all, `local` of those on this machine, both from 0."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        """True for the process that judges, writes and prints for all."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """True where there is no other process."""
        return self.count == 1


def this_process() -> Process:
    """Read this process's ranks. Clusters set ``WORLD_SIZE`` for their own ends; a launcher sets ``LOCAL_RANK`` too."""
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    return Process(*map(int, given)) if all(map(str.isdecimal, given)) else Process()


def is_first_to_fail() -> bool:
    """True for the first process of this machine and launch that asks: one error line of a run is enough.

    The launcher gives each process a file for its error, all below one folder of the launch, where the first one
    leaves a mark. Without it, the first process of the machine speaks.
    """
    here = this_process()
    if here.is_alone:
        return True
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return _is_first_of_machine(here)
    try:
        (Path(error_file).parents[1] / "lora-fuse.failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return _is_first_of_machine(here)
    return True


def _is_first_of_machine(here: Process) -> bool:
    """By its rank, as a process that took a GPU has another `LOCAL_RANK`; ranks go machine by machine."""
    of_machine = os.environ.get("LOCAL_WORLD_SIZE", "")
    return here.rank % (int(of_machine) if of_machine.isdecimal() and int(of_machine) else here.count) == 0


class PeerWatcher:
    """Ends this process with one error line when the launcher ends it, which it does when another one has ended.

    Signals wait for Python's main thread, and that may wait for the lost process itself; so a thread takes this one.
    """

    def __init__(self) -> None:
        self._done = False
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that are made from now on have it too
        threading.Thread(target=self._wait, daemon=True).start()

    def part(self) -> None:
        """End from now on as any process does, without a word: the others are not needed any more."""
        self._done = True

    def _wait(self) -> None:
        signal.sigwait({signal.SIGTERM})
        if not self._done and is_first_to_fail():
            text.say(f"error: {LOST}", sys.stderr)
        os._exit(128 + signal.SIGTERM if self._done else 2)


@contextmanager
def _leaving_signals() -> Iterator[None]:
    """Start processes within, which no Ctrl-C reaches; what is blocked here stays so.

    Python's resource tracker, started with the first of them, lets SIGTERM through to the thread that starts it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerProcesses:
    """Processes beside this one until the end of a `with`, at most one a core: for libraries that keep Python's lock.

    Each is started when there is work for it, leaves Ctrl-C to this process, and ends with it.
    """

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
        with _leaving_signals():
            self._pool = ProcessPoolExecutor(os.cpu_count(), spawn, initializer=_end_with_parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, work: Callable[..., Result], *items: object) -> Callable[[], Result]:
        """Begin some work, a function of a module; returns a function that waits for its result and gives it.

        Raises:
            ProcessLost: a process was ended from outside, as by the kernel where memory is short. That function raises
                it too, and what the work raises.
        """
        with _leaving_signals(), _telling_of_the_lost():
            running = self._pool.submit(work, *items)

        def result() -> Result:
            with _telling_of_the_lost():
                return running.result()

        return result


@contextmanager
def _telling_of_the_lost() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise ProcessLost(f"{LOST}, with more memory if that was short") from error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
