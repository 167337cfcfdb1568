"""Signals that end a run: Ctrl-C and SIGTERM both unwind it, so that it cleans up."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

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


# The signals that end a run: the handler that Python begins with, and what is raised instead.
SIGNALS: dict[signal.Signals, tuple[Any, type[KeyboardInterrupt]]] = {
    signal.SIGINT: (signal.default_int_handler, KeyboardInterrupt),
    signal.SIGTERM: (signal.SIG_DFL, Terminated),
}
_asked: list[type[KeyboardInterrupt]] = []  # what came since the work began


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, and remember both for `check`; other handlers than Python's own stay."""
    _asked.clear()
    mine: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        mine = [number for number, (own, _) in SIGNALS.items() if signal.getsignal(number) == own]
    for number in mine:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, SIGNALS[number][0])


def check() -> None:
    """Raise once more what a signal raised where it was lost, as in a library that catches everything."""
    if _asked:
        raise _asked[0]


def leave(code: int) -> NoReturn:
    """End this program with an exit code, which a Ctrl-C on the way out changes no more: all is done and said."""

    def out() -> None:
        for number, (own, _) in SIGNALS.items():
            if signal.getsignal(number) == own:
                signal.signal(number, lambda *_: os._exit(code))

    atexit.register(out)  # the first of all that is called there, as the last that is registered
    sys.exit(code)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """As shells have it: 128 and the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def _interrupt(number: int, _: FrameType | None) -> None:
    _asked.append(SIGNALS[signal.Signals(number)][1])
    raise _asked[-1]


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
