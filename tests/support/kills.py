"""Kills a process at every step in which it changes files, one after another."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def kill_at_every_step(work: Callable[[], object], below: Path, look: Callable[[], object]) -> int:
    """Do `work` in a process that gets kill -9 at its first change `below` a folder, then at its second, and so on.

    `look` is called after each, also after the last, which is killed no more. Returns the number of kills.
    """
    for step in range(1000):
        child = os.fork()
        if child == 0:
            _do(work, below, step)
        _, status = os.waitpid(child, 0)
        look()
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return step
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("there is no end to its steps")


def _do(work: Callable[[], object], below: Path, last: int) -> None:
    """In the child: work until the step with the number `last`."""
    seen = [0]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        changes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)
        swaps = event == "ctypes.dlsym" and arguments[1] == "renameat2"
        if swaps or (changes and str(arguments[0]).startswith(str(below))):
            if seen[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1

    code = 1
    try:
        sys.addaudithook(watch)
        work()
        code = 0
    finally:
        os._exit(code)
