"""Time the ways to take over a file that does not change: ``python -m benchmarks.taking_over [--megabytes 1500]``.

The ways take turns, so that a slow moment of the machine hits all of them, and each ends when the disk has the bytes
(fsync). The file is in the page cache as far as memory allows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lora_fuse.machine import files, interrupts

WAYS: tuple[files.Untouched, ...] = ("reflink", "hardlink", "copy")
MEGABYTE = 1_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the file, take turns, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.taking_over", description="time reflink, link and copy")
    parser.add_argument("--megabytes", type=int, default=1500, help="of the file (default: 1500)")
    parser.add_argument("--runs", type=int, default=5, help="of each way; the median counts (default: 5)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        source = Path(temporary, "source")
        with source.open("wb") as file:
            for _ in range(options.megabytes):
                file.write(os.urandom(MEGABYTE))
        files.make_read_only(source)
        runs: dict[str, list[tuple[str, float, int]]] = {way: [] for way in WAYS}
        for _ in range(options.runs):
            for way in WAYS:
                runs[way].append(_measure(source, Path(temporary, "target"), way))
    print("| asked for | done | seconds, each run | median | MB of the disk |")
    print("|---|---|---|---|---|")
    for asked, of_way in runs.items():
        each = ", ".join(f"{seconds:.4f}" for _, seconds, _ in of_way)
        median = statistics.median(seconds for _, seconds, _ in of_way)
        print(f"| {asked} | {of_way[0][0]} | {each} | {median:.4f} | {of_way[0][2] / MEGABYTE:.0f} |")


def _measure(source: Path, target: Path, way: files.Untouched) -> tuple[str, float, int]:
    """The way that was gone in the end, seconds, and bytes that the disk has less."""
    os.sync()
    free = os.statvfs(source.parent)
    begun = time.perf_counter()
    done = files.take_over(source, target, way)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    left = os.statvfs(source.parent)
    target.unlink()
    return done, seconds, (free.f_bfree - left.f_bfree) * free.f_frsize


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
