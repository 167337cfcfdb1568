"""Scales that ``explain`` finds in merges: ``python -m benchmarks.explained [--blocks 8]``, a table in Markdown.

On pocket and on Qwen-Image-Edit's real shapes, one to three LoRAs are fused in float16 and bfloat16, and all three are
asked for. Real shapes are made as by `benchmarks.make_checkpoint`, in a folder that goes: 1.4 GB a block.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.make_checkpoint import Noise, make_base, make_lora, qwen_image_edit_config
from benchmarks.memory_limit import run_limited
from lora_fuse import LoraInput, fuse, plan
from lora_fuse.machine import interrupts, progress, text

ROOT = Path(__file__).resolve().parents[1]
POCKET = ROOT / "pocket"
POCKET_LORAS = ("pocket-lightning-4steps-v1", "pocket-pastel", "pocket-lightning-4steps-v2")
SCALES = (0.8, 0.35, -0.625)
DTYPES = ("bfloat16", "float16")
RANK = 64
ALPHA = 8.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explained", description="scales that explain finds")
    parser.add_argument("--blocks", type=int, default=8, help="of the real shapes; 0 leaves them out")
    parser.add_argument("--folder", type=Path, help="where to make them (default: the system's)")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder, progress.silence():
        root = Path(folder)
        text.say("| model | dtype | LoRAs | scales | largest error | its bar | verdict | CPU seconds | own memory |")
        text.say("|---|---|---|---|---|---|---|---|---|")
        loras = [POCKET / f"lora/{name}.safetensors" for name in POCKET_LORAS]
        _table("pocket", POCKET / "model/transformer", loras, root)
        if given.blocks:
            noise = Noise(0)
            shapes = make_base(root / "base", qwen_image_edit_config(given.blocks), noise)
            made = [root / f"lora{number}.safetensors" for number in range(len(SCALES))]
            for path in made:
                make_lora(path, shapes, RANK, ALPHA, noise)
            _table(f"{given.blocks} blocks", root / "base", made, root)


def _table(name: str, base: Path, loras: Sequence[Path], root: Path) -> None:
    """A line for each dtype and number of LoRAs; all are asked for, those that are not in it too."""
    for dtype in DTYPES:
        for count in range(1, len(loras) + 1):
            out = root / "merged"
            inputs = [LoraInput(path.stem, path, scale) for path, scale in zip(loras, SCALES, strict=False)][:count]
            shutil.rmtree(out, ignore_errors=True)
            fuse(plan(base, inputs, dtype=dtype), out, device="cpu")
            options = [part for path in loras for part in ("--lora", str(path))]
            command = [sys.executable, "-m", "lora_fuse", "explain", str(out), "--base", str(base), *options, "--json"]
            ran = run_limited(command, None, cwd=ROOT).well("explain")
            said = json.loads(ran.output)
            wanted = [*SCALES[:count], *[0.0] * (len(loras) - count)]
            errors = [abs(one["scale"] - scale) for one, scale in zip(said["loras"], wanted, strict=True)]
            claims = [one["found"] for one in said["loras"]] == [scale != 0 for scale in wanted]
            way = f"{'exactly, ' if said['exact'] else ''}{said['way']}" if claims else "WRONG"
            shown = ", ".join(f"{scale:g}" for scale in SCALES[:count])
            bar = max(one["error"] for one in said["loras"])
            memory = progress.human_bytes(ran.peak)
            text.say(
                f"| {name} | {dtype} | {count} of {len(loras)} | {shown} | {max(errors):.2g} | {bar:.1g} | {way} | "
                f"{ran.used:.1f} | {memory} |"
            )


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
