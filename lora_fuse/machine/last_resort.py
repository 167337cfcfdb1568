"""The last resort: what nobody caught becomes one line and exit code 2, and its traceback a file.

Python prints a traceback and ends with 1, which only ever means that a check failed. Of a disk, a right or the memory,
the line says what to do; of a library and of a bug, where the traceback is: in a file that only this user can read.
`LORA_FUSE_DEBUG=1` prints it too.
"""

from __future__ import annotations

import errno
import os
import platform
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType

from lora_fuse.errors import LoraFuseError, Refused
from lora_fuse.machine import text

DEBUG = "LORA_FUSE_DEBUG"
OURS = frozenset({"lora_fuse", "stages", "pocket", "benchmarks", "__main__"})
WAYS_OUT = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room in your quota",
    errno.EACCES: "give yourself the right to it",
    errno.EPERM: "give yourself the right to it",
    errno.EROFS: "its disk is mounted to be read only; name another place",
    errno.EMFILE: "let a process open more files, `ulimit -n`",
    errno.EIO: "check its disk",
    errno.ENOENT: "bring it back",
    errno.ENOTDIR: "a file is where a folder should be; take it away",
    errno.EISDIR: "a folder is where a file should be; take it away",
    errno.ENAMETOOLONG: "give it a shorter name",
}


def refusal(error: BaseException, doing: str = "") -> LoraFuseError:
    """The error that a user is told of instead of one that nobody caught; one raised on purpose is itself.

    `doing` is the stage or command. The traceback of what may be a bug is written to a file.
    """
    if isinstance(error, LoraFuseError):
        return error
    if os.environ.get(DEBUG):
        for line in "".join(traceback.format_exception(error)).splitlines():
            text.say(line, sys.stderr)
    before = f"{doing}: " if doing else ""
    return Refused(f"{before}{_outside(error) or _inside(error)}")


@contextmanager
def hooked() -> Iterator[None]:
    """Say in one line what a thread ends with that nobody waits for."""

    def told(thread: threading.ExceptHookArgs) -> None:
        if thread.exc_value is not None and not isinstance(thread.exc_value, SystemExit):
            text.say(f"error: in a thread: {refusal(thread.exc_value)}", sys.stderr)

    before = threading.excepthook
    threading.excepthook = told
    try:
        yield
    finally:
        threading.excepthook = before


def install(kept: str) -> None:
    """End this process with a line, whatever happens before and after its work is guarded, as while it imports.

    `kept` is what is left after Ctrl-C. For programs: whoever imports the library keeps Python's own hook.
    """

    def told(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):  # Python ends by that signal itself
            text.say(f"error: interrupted; {kept}", sys.stderr)
            return
        text.say(f"error: {refusal(error)}", sys.stderr)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(2)  # Python would end with 1

    sys.excepthook = told


def _outside(error: BaseException) -> str | None:
    """A sentence on an error that is the machine's or the installation's; None for another one."""
    at = _at_work_on(error)
    if isinstance(error, OSError):
        what = text.redacted(str(error.filename)) if error.filename is not None else at
        reason = error.strerror or str(error) or type(error).__name__
        way_out = WAYS_OUT.get(error.errno or 0, "look at it, and run again")
        return f"{what}: {reason}; {way_out}" if what else f"{reason}; {way_out}"
    where = f", at work on {at}" if at else ""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        more = f" ({error})" if str(error) else ""
        return f"the memory is not enough{more}{where}; end other programs, or take a machine that has more"
    if isinstance(error, RecursionError):
        return f"something is nested too deeply ({error}){where}; if it is a file, get a good copy"
    if isinstance(error, ImportError):
        return f"{error}; the installation is not whole: install lora-fuse again"
    return None


def _inside(error: BaseException) -> str:
    """A sentence on an error of a library, or of ours, and where its traceback is."""
    at = _at_work_on(error)
    where = f", at work on {at}" if at else ""
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    kept = _keep(error)
    traces = f"the traceback is in {kept}" if kept else f"no traceback can be kept, {DEBUG}=1 shows it"
    if library := _library(error):
        return f"{library} cannot go on{where} ({words}); {traces}"
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({Path(last[0].filename).name}:{last[0].lineno})" if last else ""
    return f"this is a bug in lora-fuse{where}: {words}{place}; {traces}, please report it"


def _frames(error: BaseException) -> list[FrameType]:
    """The frames of an error's traceback, the innermost first."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _library(error: BaseException) -> str | None:
    """The library that raised an error, by the error's class or by who called last; None if that was this project."""
    own = _package(type(error).__module__)
    if own != "builtins" and (own in sys.stdlib_module_names or _is_installed(own)):
        return own
    if isinstance(error, UnicodeError):
        return "Python"
    packages = (_package(frame.f_globals.get("__name__")) for frame in _frames(error))
    first = next((package for package in packages if package not in sys.stdlib_module_names), "")
    return first if _is_installed(first) else None


def _is_installed(package: str) -> bool:
    """True for a library, which lies among the installed ones; so may this project."""
    return package not in OURS and "site-packages" in (getattr(sys.modules.get(package), "__file__", "") or "")


def _at_work_on(error: BaseException) -> str:
    """The path that this project's own code had at hand, the nearest to the error; empty if it had none."""
    for frame in _frames(error):
        package = _package(frame.f_globals.get("__name__"))
        if package not in sys.stdlib_module_names and not _is_installed(package):
            for value in reversed(list(frame.f_locals.values())):
                if isinstance(value, Path):
                    return text.redacted(str(value))
    return ""


def _keep(error: BaseException) -> str | None:
    """Write a traceback to a file for this user alone, and give its path; None where that is not possible."""
    said = [f"{time.strftime('%Y-%m-%dT%H:%M:%S')} Python {platform.python_version()} {sys.argv}\n"]
    content = text.xml("".join([*said, *traceback.format_exception(error)])).encode()
    for folder in (os.environ.get("XDG_STATE_HOME") or "~/.local/state", tempfile.gettempdir()):
        with suppress(OSError, RuntimeError):  # no home, no right, no room
            place = Path(folder).expanduser() / "lora-fuse"
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(".log", "traceback-", place)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            return name
    return None
