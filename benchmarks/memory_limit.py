"""Run a command under a limit of memory and say what it held: ``python -m benchmarks.memory_limit 2e9 -- COMMAND …``.

Held of its own is what no file backs (`RssAnon` and `RssShmem` of proc_pid_status(5), which needs Linux 4.5): mapped
files and the page cache are the system's to drop. It is summed over a process and all below it, several times a second.

The limit is one of two. `cgroup`, a scope of systemd's on cgroup v2 (``systemd-run --scope -p MemoryMax=``), holds for
all processes together and counts the page cache as well, which is dropped before anybody is killed; it needs a systemd
that takes orders, and containers have none. `RLIMIT_DATA` (setrlimit(2), since Linux 4.7 also of private mappings)
works for every user everywhere; it holds for each process alone, and what is set aside counts, written or not: a
thread's stack is its 8 MB, and CUDA, which sets aside all of the address space, does not start under it. An allocation
beyond it fails; beyond the limit of a cgroup the kernel kills.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import psutil

from lora_fuse.errors import Refused
from lora_fuse.machine import interrupts, progress, text

EVERY = 0.05  # seconds between two looks
OWN = ("RssAnon:", "RssShmem:")  # in kB


@dataclass(frozen=True, slots=True)
class LimitedRun:
    """A command that ran: exit code, output, seconds, seconds of one core, and bytes that it held of its own at most.

    `how` is the mechanism of the limit: ``cgroup``, ``RLIMIT_DATA``, or ``none`` without a limit. `resident` are the
    most bytes that one of its processes held, of its own or not (ru_maxrss of getrusage(2)).
    """

    code: int
    output: str
    seconds: float
    used: float
    peak: int
    how: str
    resident: int

    def well(self, name: str) -> LimitedRun:
        """The same run, of a command that is called `name`.

        Raises:
            Refused: it failed.
        """
        if self.code:
            raise Refused(f"{name} ended with {self.code}: {self.output[-2000:]}")
        return self

    def without(self, written: Path) -> LimitedRun:
        """The same run, the folder that it wrote removed: that must not be written back during the next one."""
        shutil.rmtree(written)
        os.sync()
        return self


def run_limited(
    command: Sequence[str], limit: float | None, *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> LimitedRun:
    """Run a command, with at most `limit` bytes of memory (None for as many as it wants).

    A command that does not keep the limit fails, by its own error or by SIGKILL (code -9, or 137 of a shell); that is
    for the caller to see. `output` is stdout and stderr together.
    """
    how = "none" if limit is None else mechanism()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [*limiting(how, int(limit or 0)), *command],
            cwd=cwd,
            env=None if env is None else dict(env),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        with PeakSampler(partial(memory_of_all, process.pid)) as sampler, ended_with(process.pid):
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        used = usage.ru_utime + usage.ru_stime
        resident = usage.ru_maxrss * 1024
        return LimitedRun(process.returncode, output.read(), seconds, used, sampler.peak, how, resident)


@contextmanager
def ended_with(pid: int) -> Iterator[None]:
    """Kill a process and all below it where what waits for them is interrupted."""
    try:
        yield
    except BaseException:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for one in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        raise


def limiting(how: str, limit: int) -> list[str]:
    """The beginning of a command line that puts the rest of it under a limit of so many bytes."""
    if how == "cgroup":
        return [*_scope(), f"--property=MemoryMax={limit}", "--property=MemorySwapMax=0"]
    return ["prlimit", f"--data={limit}"] if how == "RLIMIT_DATA" else []


@cache
def mechanism() -> str:
    """The mechanism that works here, by trying: ``cgroup`` or else ``RLIMIT_DATA``."""
    if shutil.which("systemd-run") and Path("/sys/fs/cgroup/cgroup.controllers").exists():
        done = subprocess.run([*limiting("cgroup", 1 << 30), "true"], capture_output=True, check=False)
        if done.returncode == 0:
            return "cgroup"
    return "RLIMIT_DATA"


def _scope() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user"]
    return ["systemd-run", *user, "--scope", "--quiet", "--collect"]


class PeakSampler:
    """The most that something came to at one moment, as `measured` says every `EVERY` seconds, within a `with`.

    What lasts for less may be missed.
    """

    def __init__(self, measured: Callable[[], int]) -> None:
        self.peak = 0
        self._measured = measured
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> PeakSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, self._measured())
            self._stop.wait(EVERY)


def memory_of_all(pid: int) -> int:
    """Bytes that a process and all below it hold of their own now; pages that a fork shares count in both."""
    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return 0
    return sum(own_memory(one) for one in (pid, *(child.pid for child in below)))


def own_memory(pid: int) -> int:
    """Bytes that a process holds of its own now; 0 for one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(OWN))


def main() -> int:
    """Run the command line; the exit code is the command's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_limit", description="run under a limit")
    parser.add_argument("limit", type=float, help="bytes, as 2e9; 0 for no limit")
    parser.add_argument("command", nargs="+", help="after --")
    options = parser.parse_args()
    run = run_limited(options.command, options.limit or None)
    for line in run.output.splitlines():
        text.say(line)
    figures = f"{run.seconds:.1f} s, {run.used:.1f} s of one core, {progress.human_bytes(run.peak)} of its own at most"
    text.say(f"{figures}; limit {progress.human_bytes(options.limit)} by {run.how}, exit code {run.code}")
    return run.code if run.code >= 0 else 128 - run.code


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
