"""A merge that is large enough to be caught in the middle, by the command line, in a process of its own."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.support import tiny

SHARDS = 6
LINEAR = (1024, 1024)


def write_base(folder: Path) -> Path:
    """A component of six shards, 4 MB each, one linear in each of them a target."""
    rng = np.random.default_rng(1)
    tensors: dict[str, tiny.Array] = {}
    for block in range(SHARDS):
        tensors[f"blocks.{block}.to_q.weight"] = rng.standard_normal(LINEAR).astype(tiny.BF16)
        tensors[f"blocks.{block}.to_r.weight"] = rng.standard_normal(LINEAR).astype(tiny.BF16)
    return tiny.write_component(folder, tensors, SHARDS)


def write_coded_base(folder: Path) -> Path:
    """The same weights as numbers of 8 bits with a scale each, which lies in another shard."""
    rng = np.random.default_rng(1)
    tensors: dict[str, tiny.Array] = {}
    for block in range(SHARDS):
        for linear in ("to_q", "to_r"):
            codes = rng.standard_normal(LINEAR).astype(ml_dtypes.float8_e4m3fn)
            tensors[f"blocks.{block}.{linear}.weight"] = codes
            tensors[f"blocks.{block}.{linear}.scale_weight"] = np.array(0.5, np.float32)
    return tiny.write_component(folder, tensors, SHARDS)


def write_lora(path: Path) -> Path:
    rng = np.random.default_rng(2)
    tensors = {}
    for block in range(SHARDS):
        tensors[f"blocks.{block}.to_q.lora_down.weight"] = rng.standard_normal((8, 1024)).astype(np.float32)
        tensors[f"blocks.{block}.to_q.lora_up.weight"] = rng.standard_normal((1024, 8)).astype(np.float32)
    return tiny.write_lora(path, tensors)


def start(place: Path, scale: str = "1.0", **how: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lora_fuse", "fuse", "base", "out", "--lora", "l.safetensors", "--scale", scale]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=place, env=env, text=True, **pipes, **how)  # type: ignore[call-overload, no-any-return]


def run(place: Path, scale: str = "1.0", **how: object) -> tuple[int, str]:
    process = start(place, scale, **how)
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def left(place: Path) -> list[str]:
    return sorted(path.name for path in place.glob(".out.*") if path.name != ".out.lock")
