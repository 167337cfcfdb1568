"""Measure the export formats: ``python -m benchmarks.exports [--blocks 8]`` prints the table of docs/exports.md.

Three things are measured of each format. Of one block of Qwen-Image with random weights (normal) and a LoRA of rank 64:
bytes, the error of all weights against the exact sum of base and LoRA, and of the targets the energy of that error over
the update's and the cosine of what is left of the update. Of pocket: pictures by the regression, against the merged
ones. Of more blocks: seconds, seconds of one core, and the memory held of its own, beside ``cp`` of the same base.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.export_project import ROOT, ExportProject
from benchmarks.fuse import machine
from benchmarks.make_checkpoint import Noise, make_base, qwen_image_edit_config
from benchmarks.memory_limit import LimitedRun, run_limited
from lora_fuse.exports import read_export, readers_of
from lora_fuse.fusion import Plan, exact_sums, plan_base
from lora_fuse.lora import LoraInput
from lora_fuse.machine import interrupts, progress, text

FORMATS = ("single_file", "int8_convrot", "gguf_q8_0", "fp8_scaled", "fp8_rows", "mxfp8", "nvfp4")
K_TYPES = ("gguf_q6_k", "gguf_q5_k", "gguf_q4_k")  # by an sd-cli
ALPHA = 16.0  # of rank 64: the update is .04 of the weights
ONLY_480 = ("transformer_blocks.*.attn.*", "transformer_blocks.*.net.0.proj")
POCKET = ("download", "fuse", "verify", "export", "regress")
PARTS = ("conf", "pocket", "inputs", "params.yaml")
COLUMNS = (
    "format",
    "readers that were run",
    "bytes",
    "error of targets",
    "noise / update energy",
    "LoRA left, cosine",
    "pocket: latents over the floor",
    "pocket: PSNR, dB",
    "pocket: FLIP",
    "seconds",
    "of one core",
    "memory",
)


@dataclass(frozen=True, slots=True)
class WeightErrors:
    """Sums of squares over all targets: of the exact sums, the update, the error, the update that is left; its product.

    `realised` is of what was read less the base, `overlap` its inner product with the update.
    """

    meant: float
    update: float
    error: float
    realised: float
    overlap: float

    @property
    def relative_l2(self) -> float:
        """Error over what was meant."""
        return math.sqrt(self.error / self.meant)

    @property
    def noise(self) -> float:
        """Energy of the error over that of the update."""
        return self.error / self.update

    @property
    def cosine(self) -> float:
        """Cosine of what is left of the update and the update."""
        return self.overlap / math.sqrt(self.realised * self.update)


def weight_errors(file: Path, plan: Plan) -> WeightErrors:
    """Read an export back and hold its targets against the exact sums of a plan."""
    meant = exact_sums(plan)
    base = exact_sums(replace(plan, targets={}))
    shapes = {name: tensor.shape for name, tensor in plan.checkpoint.tensors().items()}
    sums = np.zeros(5)
    for name, values in read_export(file, shapes):
        if name in plan.targets:
            exact = meant.matrix(name)
            stored = base.matrix(name)
            for at in range(0, len(exact), 512):
                sums += _energies(values[at : at + 512], exact[at : at + 512], stored[at : at + 512])
    return WeightErrors(*sums.tolist())


def _energies(*arrays: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    values, exact, stored = (array.astype(np.float64) for array in arrays)
    update = exact - stored
    left = values - stored
    pairs = [(exact, exact), (update, update), (values - exact, values - exact), (left, left), (left, update)]
    return np.array([np.vdot(*pair) for pair in pairs])


@dataclass(frozen=True, slots=True)
class Speed:
    """A command's seconds, seconds of one core, and bytes that it held of its own."""

    seconds: float
    used: float
    peak: int

    @classmethod
    def best(cls, runs: Sequence[LimitedRun]) -> Speed:
        """The quickest of several runs, and the most memory of any."""
        quickest = min(runs, key=lambda run: run.seconds)
        return cls(quickest.seconds, quickest.used, max(run.peak for run in runs))


@contextmanager
def merged_project(parent: Path | None, blocks: int) -> Iterator[ExportProject]:
    """A project of random weights, fused; removed afterwards."""
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        project = ExportProject(Path(temporary), "benchmark")
        project.make(make_base(project.base, qwen_image_edit_config(blocks), Noise(0)), ALPHA)
        project.run("download")
        project.run("fuse")
        os.sync()
        yield project


def measured_weights(
    parent: Path | None, formats: Sequence[str], given: Sequence[str]
) -> Iterator[tuple[int, WeightErrors]]:
    """Bytes and errors of every format, of one block."""
    with merged_project(parent, 1) as project:
        plan = plan_base(project.base, [LoraInput("lora", project.lora, 1.0)])
        for name in formats:
            project.run("export", f"export.formats=[{name}]", *given)
            (file,) = [path for path in project.exported.rglob("*") if path.suffix in (".safetensors", ".gguf")]
            yield file.stat().st_size, weight_errors(file, plan)


def measured_speed(
    parent: Path | None, blocks: int, formats: Sequence[str], given: Sequence[str], runs: int
) -> Iterator[Speed]:
    """The speed of ``cp`` of the base first, then of every format; the files are in the page cache if memory allows."""
    with merged_project(parent, blocks) as project:
        copy = ["cp", "-r", "--reflink=never", str(project.base), str(project.root / "copy")]
        yield Speed.best([run_limited(copy, None).well("cp").without(project.root / "copy") for _ in range(runs)])
        for name in formats:
            asked = f"export.formats=[{name}]"
            yield Speed.best([project.run("export", asked, *given).without(project.exported) for _ in range(runs)])


def measured_pictures(formats: Sequence[str], given: Sequence[str]) -> list[dict[str, float]]:
    """Figures of pocket's pictures by the regression, the worst of its cases, of every format.

    A format whose blocks do not divide pocket's 120 columns has only its layers of 480; K types have none.
    """
    figures: dict[str, dict[str, float]] = {}
    whole = [name for name in formats if not name.startswith("gguf_")]
    for group, keep in ((whole, ()), ([name for name in formats if name == "gguf_q8_0"], ONLY_480)):
        if group:
            numbers = _regressed([f"export.formats=[{','.join(group)}]", f"export.keep=[{','.join(keep)}]", *given])
            figures |= {name: _worst(numbers, f"exports.{name}.") for name in group}
    return [figures.get(name, _worst({}, "")) for name in formats]


def _regressed(asked: Sequence[str]) -> dict[str, Any]:
    """The numbers of pocket's regression.

    Raises:
        Refused: a stage failed, but for the verdict.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for part in PARTS:
            (root / part).symlink_to(ROOT / part)
        for stage in POCKET:
            command = [sys.executable, "-m", f"stages.{stage}", "recipe=pocket", *asked]
            run_limited(command, None, cwd=root, env={**os.environ, "PYTHONPATH": str(ROOT)}).well(stage)
        numbers: dict[str, Any] = json.loads((root / "artifacts/regression/metrics.json").read_text(encoding="utf-8"))
        return numbers


def _worst(numbers: Mapping[str, Any], start: str) -> dict[str, float]:
    """The worst of all cases; NaN where nothing was measured, as PSNR is not between equal pictures."""
    found = {}
    for name, pick in {"over_floor": max, "psnr_db": min, "flip": max}.items():
        values = [numbers[key] for key in numbers if key.startswith(start) and key.endswith(f".{name}")]
        found[name] = pick([value for value in values if value is not None], default=math.nan)
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exports", description="measure the export formats")
    parser.add_argument("--blocks", type=int, default=8, help="blocks for the speed (default: 8, 17 GB of disk)")
    parser.add_argument("--runs", type=int, default=2, help="runs of each; the quickest counts (default: 2)")
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    parser.add_argument("--sd-cli", help="a program sd-cli: measure K types too")
    parser.add_argument("--formats", help="names with a comma between; default: all")
    options = parser.parse_args()
    formats = options.formats.split(",") if options.formats else [*FORMATS, *(K_TYPES if options.sd_cli else ())]
    given = [f"export.sd_cli={options.sd_cli}"] if options.sd_cli else []
    text.say(f"{machine()}; errors of 1 block, speed of {options.blocks}")
    weights = list(measured_weights(options.folder, formats, given))
    pictures = measured_pictures(formats, given)
    copied, *speeds = measured_speed(options.folder, options.blocks, formats, given, options.runs)
    text.say(f"cp of the base: {copied.seconds:.1f} s, {copied.used:.1f} s of one core")
    for line in table(formats, weights, pictures, speeds):
        text.say(line)


def table(
    formats: Sequence[str],
    weights: Sequence[tuple[int, WeightErrors]],
    pictures: Sequence[Mapping[str, float]],
    speeds: Sequence[Speed],
) -> Iterator[str]:
    """The table in Markdown, a line a format."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + "---|" * len(COLUMNS)
    for name, (size, errors), picture, speed in zip(formats, weights, pictures, speeds, strict=True):
        readers = "; ".join(f"{engine.name} {engine.ran}" for engine in readers_of(name) if engine.ran)
        cells = [
            f"`{name}`",
            readers,
            progress.human_bytes(size),
            f"{errors.relative_l2:.4f}",
            f"{errors.noise:.3g}",
            f"{errors.cosine:.4f}",
            *map(_picture_figure, picture.values()),
            f"{speed.seconds:.1f}",
            f"{speed.used:.1f}",
            progress.human_bytes(speed.peak),
        ]
        yield f"| {' | '.join(cells)} |"


def _picture_figure(figure: float) -> str:
    return "-" if math.isnan(figure) else f"{figure:.3g}"


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
