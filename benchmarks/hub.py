"""Time a download with every check against the client's alone: ``python -m benchmarks.hub [--gib 2] [--runs 3]``.

Both get the same shards from a Hub on the loopback interface into an empty cache, in a process of their own, and take
turns, so that a slow moment of the machine hits both. The Hub shares the cores with them; seconds of one core are those
of the process and its worker alone. The lock's work beyond the transfer: the plan, the watch, and reading every file
back for its sha256 as soon as it is here. The bar is 1.5 times.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.hub_publish import write_random
from lora_fuse.errors import Refused
from lora_fuse.machine import interrupts
from tests.hub_server import Entry, LoopbackHub

BAR = 1.5  # times snapshot_download
REPO = "bob/base"
SHARD = 1 << 29  # bytes

ALONE = f"from huggingface_hub import snapshot_download; snapshot_download({REPO!r})"
LOCKED = (
    "from lora_fuse import hub; from lora_fuse.recipe import Source;"
    f"hub.lock_base(Source(repo_id={REPO!r}, path=None, revision='main'), previous=None)"
)


def fill(hub: LoopbackHub, size: int) -> None:
    """Give the Hub a pipeline of random shards, `size` bytes in all."""
    names = [f"transformer/model-{number}.safetensors" for number in range(-(-size // SHARD))]
    index = {"weight_map": {str(number): Path(name).name for number, name in enumerate(names)}}
    small = {
        "model_index.json": {"_class_name": "QwenImagePipeline", "transformer": ["diffusers", "Any"]},
        "transformer/config.json": {},
        "transformer/model.safetensors.index.json": index,
    }
    hub.push(REPO, {name: json.dumps(content).encode() for name, content in small.items()})
    shards = {}
    for number, name in enumerate(names):
        part = min(SHARD, size - number * SHARD)
        written = hub.lfs.path("").parent / f"shard-{number}"
        sha256 = write_random(written, part, number)
        written.replace(hub.lfs.path(sha256))
        shards[name] = Entry.lfs(sha256, part, None)
    hub.registry.repos[REPO].commit(shards)


def measure(code: str, home: Path, environment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds, and seconds of one core, that a new process takes, into an empty cache.

    Raises:
        Refused: it failed.
    """
    shutil.rmtree(home, ignore_errors=True)
    os.sync()  # what the last one wrote must not be written back during this one
    used = _used()
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Refused(f"it failed: {done.stderr}")
    return time.perf_counter() - begun, _used() - used


def _used() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the Hub, take turns, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hub", description="time a checked download")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the base (default: 2)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts (default: 3)")
    parser.add_argument("--folder", type=Path, help="for the files, twice their size; default: a temporary one")
    options = parser.parse_args(arguments)
    size = int(options.gib * (1 << 30))
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        hub = LoopbackHub(folder / "hub")
        fill(hub, size)
        environment = {"HF_TOKEN": "", "HF_HUB_DISABLE_XET": "1"}
        times: dict[str, list[tuple[float, float]]] = {"snapshot_download": [], "locked": []}
        with hub.run():
            for _ in range(options.runs):
                for name, code in zip(times, (ALONE, LOCKED), strict=True):
                    times[name].append(measure(code, folder / "home", {**environment, "HF_ENDPOINT": hub.url}))
    alone, locked = (statistics.median(seconds for seconds, _ in runs) for runs in times.values())
    for name, runs in times.items():
        each = ", ".join(f"{seconds:.1f}" for seconds, _ in runs)
        median = statistics.median(seconds for seconds, _ in runs)
        best = size / 1e9 / min(seconds for seconds, _ in runs)
        used = statistics.median(used for _, used in runs)
        print(f"{name}: {each} s; median {median:.1f} s, {best:.2f} GB/s at best; {used:.1f} s of one core")
    verdict = "ok" if locked <= BAR * alone else "missed"
    print(f"{locked / alone:.2f} times snapshot_download alone, the bar is {BAR}: {verdict}")


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
