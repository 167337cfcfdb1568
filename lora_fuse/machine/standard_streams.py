"""Standard streams that cannot end the work: what stdout and stderr do not take is dropped, and said at the end."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

STREAMS = ("stdin", "stdout", "stderr")  # by their file descriptors


class Sturdy(io.FileIO):
    """A standard stream that drops what it cannot write, on a full disk or where it is closed."""

    trouble: OSError | None = None  # the first

    def write(self, data: Any, /) -> int:
        """Write all, or as much as possible; the rest counts as written.

        Raises:
            BrokenPipeError: the reader of stdout has had enough.
        """
        left = memoryview(data).cast("B")
        try:
            while left:
                written = super().write(left)
                if written is None:  # it does not block, and takes nothing now
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as error:
            if isinstance(error, BrokenPipeError) and self.fileno() == STREAMS.index("stdout"):
                raise
            self.trouble = self.trouble or error
        return memoryview(data).nbytes


@contextmanager
def sturdy_streams() -> Iterator[Callable[[], OSError | None]]:
    """Let no output end the work; yields the function that says what kept stdout from being written, if anything.

    Characters that a stream's encoding lacks, as in the name of a file that is not UTF-8, are escaped. Streams that
    are not the process's own, as a test or a notebook has them, are left as they are.
    """
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        yield lambda: None
        return
    _fill_closed()
    before = (sys.stdout, sys.stderr)
    stdout = Sturdy(1, "w", closefd=False)
    sys.stdout = _text(stdout, before[0], line_buffering=stdout.isatty())
    sys.stderr = _text(Sturdy(2, "w", closefd=False), before[1], line_buffering=True)

    def trouble() -> OSError | None:
        sys.stdout.flush()
        return stdout.trouble

    try:
        yield trouble
    finally:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        sys.stdout, sys.stderr = before


def _fill_closed() -> None:
    """Open what is closed, for reading: or else the next file that is opened would be a standard stream.

    As in gnulib's ``stdopen``: writing there is the error that it would be on a closed stream.
    """
    for number in range(len(STREAMS)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)  # it takes the lowest number that is free


def _text(raw: Sturdy, before: TextIO | None, *, line_buffering: bool) -> TextIO:
    encoding = "utf-8" if before is None else before.encoding
    if before is not None:
        before.flush()
    # Without a BufferedWriter, as `python -u` has it: one would write once more what an interrupted write has written.
    return io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)
