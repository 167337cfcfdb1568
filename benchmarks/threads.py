"""Processor time of a fuse by thread: ``python -m benchmarks.threads [--blocks 8]``. Linux only.

A fuse in this process, whose threads are named for what they do; what each has used is read from the kernel.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import psutil

from lora_fuse.cli import main as lora_fuse
from lora_fuse.machine import interrupts

EVERY = 0.02  # seconds between two looks

DOES = {
    "MainThread": "start, plan, links",
    "shard": "base is read, from the cache or the disk",
    "add": "LoRA factors are read and widened, product and rounding",
    "hash": "SHA-256",
    "write": "to the disk",
    "other": "what is no shard is copied and hashed",
}


class ThreadTimes(threading.Thread):
    """Reads what every thread of this process has used, until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.used: dict[tuple[str, int], tuple[float, float]] = {}
        self.stop = threading.Event()

    def run(self) -> None:
        """Look again and again."""
        process = psutil.Process()
        while not self.stop.wait(EVERY):
            names = {thread.native_id: thread.name.partition("_")[0] for thread in threading.enumerate()}
            for thread in process.threads():
                if thread.id in names.keys() - {self.native_id}:
                    self.used[names[thread.id], thread.id] = (thread.user_time, thread.system_time)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the checkpoint, fuse, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description="where a fuse spends its time")
    parser.add_argument("--blocks", type=int, default=8, help="transformer blocks of 60 (default: 8, 5.5 GB)")
    parser.add_argument("--folder", type=Path, help="for the files, twice their size; default: a temporary one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        make = [sys.executable, "-m", "benchmarks.make_checkpoint", str(folder), "--blocks", str(options.blocks)]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        os.sync()
        times = ThreadTimes()
        times.start()
        begun = time.perf_counter()
        lora_fuse(["fuse", f"{folder}/transformer", f"{folder}/out", "--lora", f"{folder}/lora.safetensors"])
        seconds = time.perf_counter() - begun
        times.stop.set()
        times.join()
    user: defaultdict[str, float] = defaultdict(float)
    system: defaultdict[str, float] = defaultdict(float)
    for (name, _), (of_user, of_system) in times.used.items():
        user[name] += of_user
        system[name] += of_system
    print(f"{seconds:.1f} s on {os.cpu_count()} cores")
    print("| thread | seconds of one core | of them in the kernel | does |\n|---|---|---|---|")
    for name in sorted(user, key=lambda name: -user[name] - system[name]):
        print(f"| {name} | {user[name] + system[name]:.1f} | {system[name]:.1f} | {DOES.get(name, '')} |")


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
