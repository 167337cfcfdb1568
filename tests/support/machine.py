"""What tests do to this machine: start a program, wait for what it does, mount a disk that is too small."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 90.0  # seconds that anything is waited for


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
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=whole, stdout=pipe, stderr=pipe, text=True)
