"""Signals that end a run: Ctrl-C and SIGTERM both unwind it, so that it cleans up."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lora_fuse.machine import text

# Other rooms know them by this module.
from lora_fuse.machine.last_resort import hooked as hooked  # noqa: PLC0414
from lora_fuse.machine.last_resort import install as install  # noqa: PLC0414
from lora_fuse.machine.last_resort import refusal as refusal  # noqa: PLC0414
from lora_fuse.machine.launch import is_first_to_fail
from lora_fuse.machine.standard_streams import sturdy_streams

KEPT = "earlier results are as they were; run it again"


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, unless it has another handler."""
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """As shells have it: 128 and the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def _terminate(_: int, __: FrameType | None) -> None:
    raise Terminated


def guarded(work: Callable[[], int | None], kept: str = KEPT, doing: str = "") -> int:
    """Run `work` for its exit code; an error becomes one line on stderr and its exit code, see `last_resort.refusal`.

    Of the processes of a launch, only the first that fails prints its error. After Ctrl-C or SIGTERM, `kept` says what
    is left, and how to go on. Work whose output cannot be written is done all the same, and 2 is its exit code.
    """
    with sturdy_streams() as trouble, hooked():
        try:
            code = _guarded(work, kept, doing)
            if (reason := trouble()) is not None and code == 0:
                return _failed(f"stdout cannot be written ({reason.strerror}); what was asked for is done", 2)
        except BrokenPipeError:  # the reader has had enough, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
    return code


def _guarded(work: Callable[[], int | None], kept: str, doing: str) -> int:
    try:
        with stoppable():
            return work() or 0
    except BrokenPipeError:
        raise
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            raise
        return _failed(str(end.code), 2)  # Python would print it and end with 1
    except Exception as error:  # noqa: BLE001 - the last resort
        known = refusal(error, doing)
        return _failed(str(known), known.exit_code)
    except KeyboardInterrupt as interrupt:
        return _failed(f"interrupted; {kept}", exit_code(interrupt))


def _failed(why: str, code: int) -> int:
    if is_first_to_fail():
        text.say(f"error: {why}", sys.stderr)
    return code
