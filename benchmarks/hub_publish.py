"""Time and bytes of publishing to the tests' Hub on the loopback: ``python -m benchmarks.hub_publish [--gib 2]``.

Three publications of four shards of random bytes: everything, the same again, and with one shard changed. Bytes are
counted where they arrive. The loopback has no latency to speak of: what is measured is this machine's work (hashing
and chunking), and what is sent at all.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_fuse.errors import CheckFailed
from lora_fuse.hub import publish
from lora_fuse.machine import interrupts, progress
from lora_fuse.recipe import Manifest, records
from tests.hub_server import LoopbackHub

SHARDS = 4
BLOCK = 1 << 24  # bytes made at once
AGAIN = 5.0  # seconds that publishing the same again may take


def main(arguments: Sequence[str] | None = None) -> None:
    """Publish three times, print the table.

    Raises:
        CheckFailed: publishing the same again took too long, or more was sent than had changed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hub_publish", description="time publishing")
    parser.add_argument("--gib", type=float, default=2.0, help="of all shards (default: 2)")
    parser.add_argument("--without-xet", action="store_true", help="send by LFS alone")
    parser.add_argument("--folder", type=Path, help="for the files, three times their size; default: a temporary one")
    options = parser.parse_args(arguments)
    size = int(options.gib * (1 << 30)) // SHARDS
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        with LoopbackHub(folder / "hub").run() as hub:
            os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_write"}
            os.environ["HF_HUB_DISABLE_XET"] = "1" if options.without_xet else ""
            _measure(hub, folder / "merged", size, "LFS" if options.without_xet else "Xet")


def _measure(hub: LoopbackHub, merged: Path, size: int, how: str) -> None:
    files = {f"transformer/model-{number}.safetensors": number for number in range(SHARDS)}
    records = {name: _write(merged / name, size, seed) for name, seed in files.items()}
    print(f"{SHARDS} shards, {progress.human_bytes(SHARDS * size)}, {how}; {os.cpu_count()} cores")
    print("| publication         | seconds | sent |")
    print("|---------------------|---|---|")
    _publish(hub, merged, records, "everything")
    seconds, sent = _publish(hub, merged, records, "the same again")
    if seconds > AGAIN or sent:
        raise CheckFailed(f"the same again took {seconds:.1f} s (at most {AGAIN:g}) and sent {sent} bytes (0)")
    name = next(iter(records))
    records[name] = _write(merged / name, size, SHARDS)
    _, sent = _publish(hub, merged, records, "one of four changed")
    if not size <= sent <= 1.01 * size:
        raise CheckFailed(f"one shard of {size} bytes changed, and {sent} bytes were sent")


def _write(path: Path, size: int, seed: int) -> records.MergedFile:
    return records.MergedFile(size, write_random(path, size, seed), "fused")


def write_random(path: Path, size: int, seed: int) -> str:
    """Write `size` random bytes; their sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, size, BLOCK):
            block = rng.bytes(min(BLOCK, size - start))
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _publish(hub: LoopbackHub, merged: Path, hashed: dict[str, records.MergedFile], label: str) -> tuple[float, int]:
    manifest = Manifest(1, "benchmark", None, (records.MergedLora("lora", 1.0, "5" * 64),), 1.0, 1, hashed)
    before = hub.uploaded()
    begun = time.perf_counter()
    publish(merged, manifest, "---\nlibrary_name: diffusers\n---\n", repo_id="alice/benchmark", message="benchmark")
    seconds = time.perf_counter() - begun
    sent = hub.uploaded() - before
    print(f"| {label:19} | {seconds:.1f} | {progress.human_bytes(sent)} |", flush=True)
    return seconds, sent


if __name__ == "__main__":
    sys.exit(interrupts.guarded(lambda: main(sys.argv[1:])))
