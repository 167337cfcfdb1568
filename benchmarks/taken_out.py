"""Measure extract and unmerge: ``python -m benchmarks.taken_out [--blocks 8]`` prints the tables of docs/explain.md.

A Qwen-Image transformer of true shapes with random weights (normal) and a LoRA of rank 64, as ``benchmarks.exports``
has them, fused at 0.8. Of each command: seconds, seconds of one core, and the memory held of its own. Of what is
extracted: what is left when it is fused. Of what is unmerged: the elements that cannot be told, those that are not the
base's, and whether its fuse is the merge again. One result is on the disk at a time, beside base and merge.

A second table is of one weight, merged in several ways and at several strengths: the sums that are impossible as they
are taken, over those that would be if nothing had been merged. By this a checkpoint is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks.fuse import machine
from benchmarks.make_checkpoint import Noise, make_base, make_lora, qwen_image_edit_config, tensor_shapes
from benchmarks.memory_limit import LimitedRun, run_limited
from lora_fuse.differences import open_pair
from lora_fuse.differences.taking_out import unmerge
from lora_fuse.errors import BadLora
from lora_fuse.lora import LoraInput
from lora_fuse.machine import files, interrupts, progress, text

RANK = 64
ALPHA = 16.0  # the update is .04 of the weights
SCALE = "0.8"
EXTRACTS = (("--rank", str(RANK)), ("--rank", "16"), ("--residual", "0.2"))
SHAPE = (1024, 2048)  # of the weight that is merged in several ways
FEW = 32  # rank of its LoRA
STRENGTHS = [(dtype, update) for dtype in ("BF16", "F16") for update in (0.001, 0.01, 0.04)]  # shares of the weight
WAYS = (
    ("once", "once, 0.8"),
    ("once, in float32", "once, 0.8"),
    ("twice", "once, 0.8"),
    ("thrice", "once, 0.8"),
    ("twice", "twice, 0.8"),
    ("thrice", "thrice, 0.8"),
    ("once", "twice, 0.8"),
    ("once", "once, 0.79"),
    ("nothing", "once, 0.8"),
)
REFUSED = re.compile(r"(\d+) of \d+ elements are no such sum; without the LoRAs it would be about (\d+)")
COLUMNS = ("command", "seconds", "of one core", "memory", "result")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.taken_out", description="extract and unmerge")
    parser.add_argument("--blocks", type=int, default=8, help="transformer blocks, 0.7 GB each (default 8)")
    blocks = parser.parse_args().blocks
    with tempfile.TemporaryDirectory(prefix="taken-out-") as folder:
        text.say(f"{blocks} blocks of Qwen-Image in BF16, LoRA of rank {RANK} at {SCALE}; {machine()}")
        _print([COLUMNS, *_rows(Path(folder), blocks)])
    with tempfile.TemporaryDirectory(prefix="taken-out-") as folder, progress.silence():
        _print([("merged", "taken as", *(f"{dtype}, {update:g}" for dtype, update in STRENGTHS)), *_told(Path(folder))])


def _print(rows: Sequence[Sequence[object]]) -> None:
    for line in text.markdown_table(rows).splitlines():
        text.say(line)


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


def _told(folder: Path) -> Iterator[Sequence[str]]:
    """A row for each way to merge and to take out: at each strength, the share of impossible sums."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows, columns = SHAPE
    weight, up, down = (torch.randn(*shape, generator=generator) for shape in (SHAPE, (rows, FEW), (FEW, columns)))
    found: dict[tuple[str, str], list[str]] = {way: [] for way in WAYS}
    for dtype, update in STRENGTHS:
        kind = torch.bfloat16 if dtype == "BF16" else torch.float16
        base, a, b = ((one * size).to(kind) for one, size in ((weight, 0.02), (down, 0.02 * update), (up, FEW**-0.5)))
        product = b.float() @ a.float()
        made = {
            "once": base.double() + 0.8 * (b.double() @ a.double()),
            "once, in float32": base.float() + 0.8 * product,
            "twice": base + (0.8 * product).to(kind),
            "thrice": base + product.to(kind) * 0.8,
            "nothing": base,
        }
        lora = folder / "lora.safetensors"
        save_file({"x.lora_A.weight": a, "x.lora_B.weight": b}, lora)
        for merged, taken in WAYS:
            save_file({"x.weight": made[merged].to(kind)}, folder / "merged.safetensors")
            rounding, scale = taken.split(", ")
            found[merged, taken].append(f"{_impossible(folder, lora, rounding, float(scale)):.2g}")
    for way, shares in found.items():
        yield *way, *shares


def _impossible(folder: Path, lora: Path, rounding: Any, scale: float) -> float:
    """Impossible sums over those that would be without the LoRA; where it is refused, of the first that decided it."""
    try:
        given = [LoraInput("lora", lora, scale)]
        made = unmerge(folder / "merged.safetensors", given, folder / "undone.safetensors", rounding=rounding)
    except BadLora as error:
        numbers = REFUSED.search(str(error))
        if numbers is None:
            raise
        return int(numbers[1]) / int(numbers[2])
    counts = made.manifest.unmerged
    return counts.impossible / counts.telling if counts else math.nan


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
