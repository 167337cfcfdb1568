"""The pocket model through the real pipelines, at the settings that the evaluation compares."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_fuse.fusion import FuseJob, Plan, plan_base
from lora_fuse.lora import LoraInput
from lora_fuse.models import LIGHTNING
from lora_fuse.pictures import metrics, pairs, picture, render
from pocket import LORAS, POCKET, SCHEDULER, SIDE
from pocket.tasks import Task

EDIT = "QwenImageEditPipeline"
BATCH = 25  # tasks that one call of a pipeline makes together


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings of a pipeline; `scale` is that of the unfused LoRA, None for none, `fused` takes the merged weights."""

    name: str
    steps: int
    scheduler: Mapping[str, Any]
    cfg: float = 1.0
    scale: float | None = None
    fused: bool = False


MANY = Setting("base, 40 steps", 40, SCHEDULER)
FEW = Setting("base, 4 steps", 4, LIGHTNING)
MERGED = Setting("merged, 4 steps", 4, LIGHTNING, fused=True)
SCALES = tuple(replace(FEW, name=f"base + LoRA x {scale}", scale=scale) for scale in (0.8, 0.9, 1.0, 1.1, 1.2))
OWN_SCHEDULER = replace(MERGED, name="merged, the base's scheduler", scheduler=SCHEDULER)
EIGHT = replace(MERGED, name="merged, 8 steps", steps=8)
GUIDED = (replace(MANY, name="base, 40 steps, CFG 2", cfg=2.0), replace(MANY, name="base, 40 steps, CFG 4", cfg=4.0))


class Bench(ExitStack):
    """Pipelines of the pocket folder `pocket`; `lora` names the Lightning file in its ``lora/``."""

    def __init__(self, pocket: Path = POCKET, lora: str = LORAS["v2"], device: str = "cpu") -> None:
        super().__init__()
        self.model = pocket / "model"
        self.device = device
        self.lightning = pocket / "lora" / lora
        self.style = pocket / "lora" / LORAS["pastel"]

    @cached_property
    def base(self) -> Any:
        """The base alone."""
        return render.load_pipeline(self.model, EDIT, dtype="float32").to(self.device)

    @cached_property
    def unfused(self) -> Any:
        """Base and Lightning LoRA side by side."""
        pipe = self._sibling(EDIT, self.model)
        pairs.attach_beside(pipe, self._plan([self.lightning]))
        return pipe

    @cached_property
    def _merged(self) -> Path:
        return self._merge([self.lightning])

    @cached_property
    def merged(self) -> Any:
        """The Lightning LoRA fused by this project."""
        return self._sibling(EDIT, self._merged)

    @cached_property
    def merged_plus(self) -> Any:
        """The same for two input pictures."""
        return self._sibling("QwenImageEditPlusPipeline", self._merged)

    @cached_property
    def styled(self) -> Any:
        """Lightning and style LoRA fused together."""
        return self._sibling(EDIT, self._merge([self.lightning, self.style]))

    def _merge(self, loras: Sequence[Path]) -> Path:
        out = Path(self.enter_context(tempfile.TemporaryDirectory())) / "merged"
        FuseJob(self._plan(loras), out, device="cpu").run()
        return out

    def _plan(self, loras: Sequence[Path]) -> Plan:
        return plan_base(self.model, [LoraInput(path.stem, path, 1.0) for path in loras])

    def _sibling(self, pipeline: str, folder: Path) -> Any:
        shared = render.shared_components(self.base)
        return render.load_pipeline(folder, pipeline, dtype="float32", shared=shared).to(self.device)

    def pictures(self, setting: Setting, tasks: Sequence[Task]) -> list[Image.Image]:
        """One picture a task."""
        if setting.scale is not None:
            self.unfused.set_adapters(["lora_0"], [setting.scale])
            return self.run(self.unfused, setting, tasks)
        return self.run(self.merged if setting.fused else self.base, setting, tasks)

    def run(self, pipe: Any, setting: Setting, tasks: Sequence[Task]) -> list[Image.Image]:
        """One picture a task from a certain pipeline."""
        pipe.scheduler = type(pipe.scheduler).from_config(dict(setting.scheduler))
        several = any(len(task.images) > 1 for task in tasks)  # which the pipeline takes as one prompt's
        batch = 1 if several else BATCH
        out = []
        for i in range(0, len(tasks), batch):
            part = tasks[i : i + batch]
            images = [image for task in part for image in task.images]
            with render.condition_area(SIDE**2):
                out += pipe(
                    prompt=[task.prompt for task in part],
                    negative_prompt=[" "] * len(part) if setting.cfg > 1 else None,
                    true_cfg_scale=setting.cfg,
                    num_inference_steps=setting.steps,
                    generator=[torch.Generator("cpu").manual_seed(task.seed) for task in part],
                    **({"image": images} if images else {}),
                    height=SIDE,
                    width=SIDE,
                ).images
        return out

    @torch.no_grad()
    def round_trip(self, tasks: Sequence[Task]) -> list[float]:
        """PSNR in dB of the VAE's reconstruction of the first right answer of each task."""
        vae = self.base.vae
        processor = self.base.image_processor
        out = []
        for task in tasks:
            x = processor.preprocess(task.answers[0]).unsqueeze(2).to(vae.device)
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample.squeeze(2)
            out.append(psnr(processor.postprocess(y.cpu())[0], task.answers[0]))
        return out


def psnr(a: Image.Image, b: Image.Image) -> float:
    """PSNR in dB between two pictures of one size, 99 for equal ones, so that a mean stays finite."""
    return min(metrics.psnr_db(picture.levels_of(a), picture.levels_of(b)), 99.0)


def nearest(image: Image.Image, task: Task) -> float:
    """PSNR in dB to the nearest right answer."""
    return max(psnr(image, answer) for answer in task.answers)
