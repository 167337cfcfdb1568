"""Measure extract and unmerge: ``python -m benchmarks.taken_out [--blocks 8]`` prints the tables of docs/explain.md.

A Qwen-Image transformer of true shapes with random weights (normal) and a LoRA of rank 64, as ``benchmarks.exports``
has them, fused at 0.8. Of each command: seconds, seconds of one core, and the memory held of its own. Of what is
extracted: what is left when it is fused. Of what is unmerged: the elements that cannot be told, those that are not the
base's, and whether its fuse is the merge again. One result is on the disk at a time, beside base and merge.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fuse import machine
from benchmarks.make_checkpoint import Noise, make_base, make_lora, qwen_image_edit_config, tensor_shapes
from benchmarks.memory_limit import LimitedRun, run_limited
from lora_fuse.differences import open_pair
from lora_fuse.machine import files, interrupts, progress, text

RANK = 64
ALPHA = 16.0  # the update is .04 of the weights
SCALE = "0.8"
EXTRACTS = (("--rank", str(RANK)), ("--rank", "16"), ("--residual", "0.2"))
COLUMNS = ("command", "seconds", "of one core", "memory", "result")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.taken_out", description="extract and unmerge")
    parser.add_argument("--blocks", type=int, default=8, help="transformer blocks, 0.7 GB each (default 8)")
    blocks = parser.parse_args().blocks
    with tempfile.TemporaryDirectory(prefix="taken-out-") as folder:
        text.say(f"{blocks} blocks of Qwen-Image in BF16, LoRA of rank {RANK} at {SCALE}; {machine()}")
        text.say(text.markdown_table([COLUMNS, *_rows(Path(folder), blocks)]).replace("\\", ""))


def _rows(folder: Path, blocks: int) -> Iterator[Sequence[str]]:
    base = folder / "base"
    lora = folder / "lora.safetensors"
    config = qwen_image_edit_config(blocks)
    make_base(base, config, Noise(0))
    make_lora(lora, tensor_shapes(config), RANK, ALPHA, Noise(1))
    merged = folder / "merged"
    given = ["--lora", str(lora), "--scale", SCALE]
    size = progress.human_bytes(files.total_size(base))
    yield _row("fuse", _run("fuse", str(base), str(merged), *given), size)
    for how in EXTRACTS:
        out = folder / "extracted.safetensors"
        run = _run("extract", str(merged), "--base", str(base), *how, "-o", str(out), "--json")
        yield _row(f"extract {' '.join(how)}", run, _extracted(json.loads(run.output.splitlines()[-1])))
        out.unlink()
    undone = folder / "undone"
    run = _run("unmerge", str(merged), str(undone), *given, "--json")
    counts = json.loads(run.output.splitlines()[-1])
    share = counts["uncertain"] / counts["elements"]
    told = f"{share:.2%} cannot be told, off by {counts['largest_error']:.2g} at most, {_other(undone, base):.2%} other"
    yield _row("unmerge", run, told)
    before = _sums(merged)
    shutil.rmtree(merged)
    again = _run("fuse", str(undone), str(merged), *given)
    yield _row("fuse of that", again, "the merge's weights" if _sums(merged) == before else "OTHER weights")


def _run(*arguments: str) -> LimitedRun:
    return run_limited([sys.executable, "-m", "lora_fuse", *arguments], None).well(arguments[0])


def _row(name: str, run: LimitedRun, result: str) -> Sequence[str]:
    return name, f"{run.seconds:.0f}", f"{run.used:.0f}", progress.human_bytes(run.peak), result


def _extracted(answer: dict[str, Any]) -> str:
    ranks = sorted(weight["rank"] for weight in answer["weights"].values())
    left = f"{answer['residual']:.3g} left, {answer['before_rounding']:.3g} before rounding"
    return f"rank {ranks[0]} to {ranks[-1]}, {progress.human_bytes(answer['size'])}: {left}"


def _other(undone: Path, base: Path) -> float:
    """The share of the elements of changed weights that are not the base's."""
    other = total = 0
    for tensor in open_pair(undone, base).tensors:
        counted = sum(int((piece.other != piece.base).sum()) for piece in tensor.pieces())
        other += counted
        total += tensor.size if counted else 0
    return other / max(total, 1)


def _sums(root: Path) -> dict[str, str]:
    """The sha256 of each file's weights, of which its header is no part."""
    found = {}
    for path in sorted(root.rglob("*.safetensors")):
        with path.open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
