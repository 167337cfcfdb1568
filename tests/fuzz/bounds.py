"""Bounds of one example: seconds of the processor, memory, and nothing opened, sent or started elsewhere."""

import os
import resource
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from functools import cache
from pathlib import Path
from types import FrameType

SECONDS = 5.0  # of the processor; the slowest example takes a tenth
MEMORY = 1 << 30  # bytes that an example may have more than there were
ROOT = Path(__file__).resolve().parents[2]
READ_FROM = (
    str(ROOT),
    *{os.path.realpath(path) for path in (*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix)},
    *(
        "/proc/",
        "/sys/",
        "/dev/null",
        "/dev/urandom",
        "/etc/",
        "/usr/",
    ),
)
ASKING = ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate")


class BoundCrossedError(BaseException):
    """A bound was crossed; no `except Exception` on the way hides it."""


class Watch:
    """Watches what this process opens and starts, since an audit hook cannot be taken away again."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.allowed: tuple[str, ...] = ()  # audit events of what may be asked or started nevertheless
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        sys.addaudithook(self._look)

    def taken(self) -> int:
        """Bytes of addresses that this process has."""
        return int(os.pread(self._statm, 100, 0).split()[0]) * resource.getpagesize()

    def _look(self, event: str, given: tuple[object, ...]) -> None:
        if self.folder is None:
            return
        inside = str(self.folder)
        if event == "open" and isinstance(given[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(given[0]))
            writes = isinstance(given[2], int) and given[2] & WRITING
            allowed = (
                (inside,) if writes and path != "/dev/null" and not path.endswith(".pyc") else (inside, *READ_FROM)
            )
            if not path.startswith(allowed) and "__pycache__" not in path:
                raise BoundCrossedError(f"{path} was opened{' to write' if writes else ''}")
        elif event in CHANGING and isinstance(given[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(given[0]))
            if not path.startswith(inside) and "__pycache__" not in path:
                raise BoundCrossedError(f"{event} of {path}")
        elif event in ASKING and event not in self.allowed:
            raise BoundCrossedError(f"{event}: {given}")


@cache
def watch() -> Watch:
    return Watch()


def _late(_: int, __: FrameType | None) -> None:
    raise BoundCrossedError(f"it took more than {SECONDS:g} s of the processor")


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder, which is the current one while it is needed; in memory where that is possible, which is quicker."""
    memory = Path("/dev/shm")  # noqa: S108
    place = memory if os.access(memory, os.W_OK) else None
    made = tempfile.TemporaryDirectory(prefix="fuzz-", dir=place, ignore_cleanup_errors=True)
    with made as folder, chdir(folder):
        yield Path(folder)


@contextmanager
def bounds(folder: Path, allowed: tuple[str, ...] = ()) -> Iterator[None]:
    """Hold what is done inside to the bounds.

    Raises:
        BoundCrossedError: it crossed one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, _late)
    looking = watch()
    resource.setrlimit(resource.RLIMIT_AS, (looking.taken() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    looking.folder, looking.allowed = folder, allowed
    try:
        yield
    finally:
        looking.folder = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
