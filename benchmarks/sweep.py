"""Time that a sweep saves: ``python -m benchmarks.sweep [--points 5]``, on the pocket model.

The same points twice in a folder of their own: by one `stages.sweep`, and one after another by the stages, each a
process of its own. The sweep also renders the base alone, in 40 steps, which the stages do not here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lora_fuse.machine import interrupts

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("download", "fuse", "verify", "regress")


def main(arguments: Sequence[str] | None = None) -> None:
    """Time both, print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description="what a sweep saves")
    parser.add_argument("--points", type=int, default=5, metavar="N", help="scales to build (default 5)")
    count = parser.parse_args(arguments).points
    scales = [f"{0.6 + 0.2 * at:.1f}" for at in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("conf", "pocket", "params.yaml"):
            (root / name).symlink_to(ROOT / name)
        (root / "artifacts").mkdir()
        (root / "artifacts/golden").symlink_to(ROOT / "artifacts/golden")
        swept = _seconds(root, [["sweep", f"fuse.scale={','.join(scales)}"]])
        alone = _seconds(root, [[stage, f"fuse.scale={scale}"] for scale in scales for stage in STAGES])
    print(f"{count} points, the base alone included, by one sweep: {swept:.1f} s, {swept / count:.1f} s a point")
    print(f"{count} points by {', '.join(STAGES)}, a process each: {alone:.1f} s, {alone / count:.1f} s a point")


def _seconds(root: Path, commands: Sequence[Sequence[str]]) -> float:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    for name, override in commands:
        command = [sys.executable, "-m", f"stages.{name}", override]
        subprocess.run(command, cwd=root, env=env, check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
