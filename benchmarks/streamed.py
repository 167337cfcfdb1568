"""Time a fuse of a base that arrives against the fetch and the fuse: ``python -m benchmarks.streamed [--blocks 1]``.

All get the same base of real shapes, with a text encoder that no LoRA changes, from a Hub on the loopback interface,
each in a process of its own with an empty cache, and take turns. The Hub shares the cores with them. `client` is the
Hub's own client alone; `download` and `fuse` are what has to be done without streaming, one after the other. Disk is
what the cache, the result and temporary files take at most; memory is what all processes of a run hold of their own.
The bar: 1.15 times the slower of the client alone, and of fetching first and fusing then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.fuse import machine
from benchmarks.hub import ALONE, LOCKED, REPO
from benchmarks.hub_publish import write_random
from benchmarks.memory_limit import PeakSampler, run_limited
from lora_fuse.machine import interrupts
from tests.hub_server import Entry, LoopbackHub

ROOT = Path(__file__).resolve().parents[1]
BAR = 1.15
MEMORY = 2e9  # bytes
SHARD = 200_000_000  # bytes
ENCODER = 400_000_000  # bytes


@dataclass(frozen=True, slots=True)
class Run:
    """One run: seconds, seconds of one core, and bytes: fetched, on the disk at most, of memory at most."""

    seconds: float
    used: float
    fetched: int
    disk: int
    memory: int


def fill(hub: LoopbackHub, folder: Path, blocks: int) -> int:
    """Give the Hub a pipeline of that many blocks, and put a LoRA for it in `folder`; returns the bytes of weights."""
    make = [sys.executable, "-m", "benchmarks.make_checkpoint", str(folder / "made"), "--blocks", str(blocks)]
    subprocess.run([*make, "--max-shard-bytes", str(SHARD)], check=True, stdout=subprocess.DEVNULL)
    transformer = folder / "made/transformer"
    (folder / "made/lora.safetensors").rename(folder / "lora.safetensors")
    parts = {"text_encoder": "Qwen2_5_VLForConditionalGeneration", "transformer": "QwenImageTransformer2DModel"}
    index = {"_class_name": "QwenImagePipeline", **{name: ["diffusers", kind] for name, kind in parts.items()}}
    small = {f"transformer/{path.name}": path.read_bytes() for path in transformer.glob("*.json")}
    hub.push(REPO, {**small, "model_index.json": json.dumps(index).encode(), "text_encoder/config.json": b"{}"})
    weights = {f"transformer/{path.name}": path for path in transformer.glob("*.safetensors")}
    weights["text_encoder/model.safetensors"] = _encoder(folder / "encoder")
    entries = {}
    for name, path in weights.items():
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        entries[name] = Entry.lfs(sha256, path.stat().st_size, None)
        path.replace(hub.lfs.path(sha256))
    hub.registry.repos[REPO].commit(entries)
    shutil.rmtree(folder / "made")
    return sum(entry.size for entry in entries.values())


def _encoder(path: Path) -> Path:
    """Write weights that nothing is added to."""
    write_random(path, ENCODER, 0)
    header = json.dumps({"weight": {"dtype": "U8", "shape": [ENCODER], "data_offsets": [0, ENCODER]}}).encode()
    header += b" " * (-len(header) % 8)
    with path.with_suffix(".safetensors").open("wb") as file, path.open("rb") as data:
        file.write(len(header).to_bytes(8, "little") + header)
        shutil.copyfileobj(data, file)
    path.unlink()
    return path.with_suffix(".safetensors")


class Turns:
    """Runs of all that is compared, in folders below one, against a Hub."""

    def __init__(self, folder: Path, hub: LoopbackHub) -> None:
        self._hub = hub
        self._lora = folder / "lora.safetensors"
        self._work = folder / "work"
        self._out = self._work / "out"
        self._commit = hub.registry.repos[REPO].head.oid

    def client(self) -> Run:
        """Fetch by the Hub's own client."""
        with self._anew():
            return self._run("-c", ALONE)

    def download_and_fuse(self) -> tuple[Run, Run]:
        """Lock the base, and fuse what lies in the cache then."""
        with self._anew():
            fetched = self._run("-c", LOCKED)
            cached = self._work / f"home/hub/models--{REPO.replace('/', '--')}/snapshots" / self._commit
            return fetched, self._fuse(str(cached))

    def streamed(self) -> Run:
        """Fuse the base while it arrives."""
        with self._anew():
            return self._fuse(f"hf://{REPO}@{self._commit}")

    def _fuse(self, base: str) -> Run:
        return self._run("-m", "lora_fuse", "fuse", base, str(self._out), "--lora", str(self._lora))

    @contextmanager
    def _anew(self) -> Iterator[None]:
        (self._work / "tmp").mkdir(parents=True)
        os.sync()  # what the last one wrote must not be written back during this one
        yield
        shutil.rmtree(self._work)

    def _run(self, *arguments: str) -> Run:
        places = {"HF_HOME": str(self._work / "home"), "TMPDIR": str(self._work / "tmp"), "PYTHONPATH": str(ROOT)}
        hub = {"HF_ENDPOINT": self._hub.url, "HF_TOKEN": "", "HF_HUB_DISABLE_XET": "1"}
        before = len(self._hub.log)
        with PeakSampler(partial(_on_disk, self._work)) as disk:
            run = run_limited([sys.executable, *arguments], None, env={**os.environ, **places, **hub})
        done = run.well(" ".join(arguments))
        fetched = sum(call.sent for call in self._hub.log[before:])
        return Run(done.seconds, done.used, fetched, disk.peak, done.peak)


def _on_disk(folder: Path) -> int:
    """Bytes of all files below a folder; a hole takes none, and two names of a file are one."""
    taken = {}
    for above, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # just removed
                info = Path(above, name).lstat()
                taken[info.st_ino] = info.st_blocks * 512
    return sum(taken.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the Hub, take turns, print the table; 1 where the bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streamed", description="time a fuse of what arrives")
    parser.add_argument("--blocks", type=int, default=1, help="transformer blocks of 60 (default: 1)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts (default: 3)")
    parser.add_argument("--folder", type=Path, help="for the files, three times their size; default: a temporary one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        hub = LoopbackHub(folder / "hub")
        size = fill(hub, folder, options.blocks)
        print(f"{options.blocks} of 60 blocks and {ENCODER / 1e9:.2f} GB, {size / 1e9:.2f} GB in all; {machine()}")
        runs: dict[str, list[Run]] = {"client": [], "download": [], "fuse": [], "streamed": []}
        with hub.run():
            turns = Turns(folder, hub)
            for _ in range(options.runs):
                runs["client"].append(turns.client())
                for name, run in zip(("download", "fuse"), turns.download_and_fuse(), strict=True):
                    runs[name].append(run)
                runs["streamed"].append(turns.streamed())
    return _report(runs, size)


def _report(runs: dict[str, list[Run]], size: int) -> int:
    print("| | seconds, each run | median | of one core | fetched | peak disk | peak memory |")
    print("|---|---|---|---|---|---|---|")
    for name, some in runs.items():
        each = ", ".join(f"{run.seconds:.1f}" for run in some)
        used = statistics.median(run.used for run in some)
        sizes = [max(getattr(run, what) for run in some) / 1e9 for what in ("fetched", "disk", "memory")]
        print(
            f"| {name} | {each} | {_median(some):.1f} | {used:.1f} | " + " | ".join(f"{n:.2f} GB" for n in sizes) + " |"
        )
    medians = {name: _median(some) for name, some in runs.items()}
    first = statistics.median(
        one.seconds + two.seconds for one, two in zip(runs["download"], runs["fuse"], strict=True)
    )
    slower = max(medians["client"], first)
    longest = max(medians[name] for name in ("client", "download", "fuse"))
    streamed = medians["streamed"]
    over = max(run.disk for run in runs["streamed"]) - size
    memory = max(run.memory for run in runs["streamed"])
    is_good = streamed <= BAR * slower and memory <= MEMORY and over <= SHARD
    print(f"{streamed / slower:.2f} times the slower of the client alone and of download, then fuse; the bar is {BAR}")
    print(f"{streamed / longest:.2f} times the slowest of client, download and fuse, each alone")
    print(f"peak disk is the result and {max(over, 0) / 1e6:.0f} MB: {'ok' if is_good else 'missed'}")
    return 0 if is_good else 1


def _median(runs: Sequence[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
