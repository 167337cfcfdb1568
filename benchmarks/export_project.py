"""A folder in which the stages fuse and export a transformer of real shapes."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.make_checkpoint import Noise, Shapes, make_lora
from benchmarks.memory_limit import LimitedRun, run_limited

ROOT = Path(__file__).resolve().parents[1]
RANK = 64
PARTS = {"scheduler": "FlowMatchEulerDiscreteScheduler", "transformer": "QwenImageTransformer2DModel"}


@dataclass(frozen=True, slots=True)
class ExportProject:
    """A project whose base is ``base/transformer``, which the caller makes; `name` is the model's."""

    root: Path
    name: str

    @property
    def base(self) -> Path:
        """The transformer's folder."""
        return self.root / "base/transformer"

    @property
    def lora(self) -> Path:
        """The LoRA's file."""
        return self.root / "lora/lora.safetensors"

    @property
    def merged(self) -> Path:
        """The merged repository."""
        return self.root / "artifacts/merged"

    @property
    def exported(self) -> Path:
        """The folder of exports."""
        return self.root / "artifacts/export"

    def make(self, shapes: Shapes, alpha: float) -> None:
        """Write everything but the base's weights: the rest of its pipeline, and a LoRA for `shapes`."""
        index = {name: ["diffusers", kind] for name, kind in PARTS.items()}
        (self.root / "base/scheduler").mkdir(parents=True)
        (self.root / "base/model_index.json").write_text(
            json.dumps({"_class_name": "QwenImageEditPlusPipeline", **index})
        )
        scheduler = json.dumps({"_class_name": PARTS["scheduler"]})
        (self.root / "base/scheduler/scheduler_config.json").write_text(scheduler)
        self.lora.parent.mkdir()
        make_lora(self.lora, shapes, RANK, alpha, Noise(1))
        (self.root / "conf").symlink_to(ROOT / "conf")

    def run(self, stage: str, *overrides: str) -> LimitedRun:
        """Run a stage in a process of its own, measured.

        Raises:
            Refused: it failed.
        """
        given = ["base.path=base", "loras.lightning.path=lora", f"loras.lightning.filename={self.lora.name}"]
        command = [sys.executable, "-m", f"stages.{stage}", f"name={self.name}", *given, *overrides]
        return run_limited(command, None, cwd=self.root, env={**os.environ, "PYTHONPATH": str(ROOT)}).well(stage)
