"""What tests do to this machine: start a program, wait for what it does, make a thing once, mount a small disk."""

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 90.0  # seconds that anything is waited for


def python_path() -> str:
    """`PYTHONPATH` for a program that finds the project's modules, and libraries wherever this process finds them."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def until(
    true: Callable[[], object],
    process: subprocess.Popen[str] | None = None,
    *,
    seconds: float = LONGEST,
    every: float = 0.01,
) -> None:
    """Wait until something is true; it is a failure if `process` ends before, or so many seconds pass."""
    end = time.monotonic() + seconds
    while not true():
        assert process is None or process.poll() is None, "it ended before"
        assert time.monotonic() < end, "it did not happen"
        time.sleep(every)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a disk of a size as `6m` on a new folder; a test that may not do so is skipped."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def start(*command: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Start a program that finds the project's modules; both its outputs are piped."""
    whole = {**os.environ, "PYTHONPATH": python_path(), **env}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=whole, stdout=pipe, stderr=pipe, text=True)


@dataclass(frozen=True, slots=True)
class Once:
    """A folder that all processes of a run share."""

    root: Path

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the folder `name`, filled by `make` in the first process that asks; the others wait for it.

        It is only to be read: a test that changes something works in a copy. Where `make` fails, it fails for each
        process that asks.
        """
        self.root.mkdir(exist_ok=True)
        folder = self.root / name
        done = self.root / f"{name}.done"
        with (self.root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                done.touch()
        return folder
