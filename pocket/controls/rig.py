"""The bench of all controls: the recipe, the right merge and its pictures, base + LoRA unfused."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from lora_fuse.fusion import FuseJob, Plan, plan_base
from lora_fuse.lora import LoraInput, Selection
from lora_fuse.pictures import Case, environment, pairs, picture, render
from lora_fuse.recipe import Recipe
from lora_fuse.regression import verdicts
from stages.config import load

RECIPE = "pocket_photo"  # its photograph sees more than any drawing
NAME = "lightning"  # of the LoRA in the recipe


@dataclass(frozen=True, slots=True)
class Built:
    """A merged repository and its pictures, one a case.

    `same_files` says that it has the base's shards, as `verify_merge` wants; if not, its tensors are compared with the
    right merge's, bit for bit.
    """

    folder: Path
    pictures: Sequence[picture.Rendered]
    same_files: bool = True
    references: pairs.References | None = None  # base + LoRA unfused, where the LoRA's file is not the recipe's


class Rig(ExitStack):
    """Merges and renders; made in the project's folder, as the recipe's paths are relative.

    The right merge is rendered once, and its pictures are the goldens; text encoder and VAE are loaded once.
    """

    def __init__(self, rules: verdicts.Rules | None = None, recipe: str = RECIPE) -> None:
        super().__init__()
        self.params: Recipe = load([f"recipe={recipe}"])
        self.setup = pairs.Setup.of(self.params)
        self.cases = Case.of(self.params)
        self.rules = rules or verdicts.Rules.of(self.params)
        self.base = Path(str(self.params.base.path))
        self.loras = self.base.parent / "lora"
        self.lora = self.loras / self.params.loras[NAME].filename

    def __enter__(self) -> Self:
        self.callback(torch.set_num_threads, torch.get_num_threads())
        self.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        self.work = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="controls-")))
        environment.make_deterministic(self.params.regress.threads)
        self.right = self.merge(self.work)
        pipe = render.load_pipeline(self.right, self.setup.pipeline, dtype=self.setup.dtype)
        self.shared = render.shared_components(pipe)
        pictures = self.render(pipe)
        self.unfused = self.references(self.plan())
        floors = map(verdicts.compare, self.unfused.floor, self.unfused.unfused)
        self.goldens = {
            case.name: [verdicts.Golden(right.levels, name=f"{case.name}.png", floor=floor.values)]
            for case, right, floor in zip(self.cases, pictures, floors, strict=True)
        }
        return self

    def plan(
        self, *loras: Path, scale: float | None = None, selection: Selection | None = None, base: Path | None = None
    ) -> Plan:
        """The recipe's fuse, or another; `loras` are files."""
        scale = self.params.fuse.scale_of(NAME) if scale is None else scale
        inputs = [LoraInput(NAME, path, scale) for path in loras or (self.lora,)]
        return plan_base(base or self.base, inputs, selection)

    def merge(self, folder: Path, plan: Plan | None = None, scheduler: Mapping[str, object] | None = None) -> Path:
        """Write a merged repository into `folder`, by default the recipe's; an empty scheduler keeps the base's."""
        scheduler = self.setup.scheduler if scheduler is None else scheduler
        out = folder / "merged"
        FuseJob(plan or self.plan(), out, device="cpu", pipeline=self.setup.pipeline, scheduler=scheduler).run()
        return out

    def references(self, plan: Plan) -> pairs.References:
        """The base with a plan's LoRA unfused beside it, and with its weights moved by rounding."""
        return pairs.BaseSides(self.base, self.cases, self.setup, pairs.Shared(self.shared)).references(plan)

    def load(self, folder: Path) -> render.Pipeline:
        """Load a merged repository; all but its transformer and scheduler is what is loaded already."""
        return render.load_pipeline(folder, self.setup.pipeline, dtype=self.setup.dtype, shared=self.shared)

    def render(
        self, pipe: render.Pipeline, cases: Sequence[Case] | None = None, steps: int | None = None
    ) -> list[picture.Rendered]:
        """One picture a case, by default the recipe's cases in the recipe's steps."""
        sampling = self.setup.sampling if steps is None else replace(self.setup.sampling, steps=steps)
        return pairs.render_all(pipe, self.cases if cases is None else cases, sampling, self.setup.placement)

    def built(self, folder: Path, *, same_files: bool = True) -> Built:
        """A merged repository, loaded and rendered as the recipe says."""
        return Built(folder, self.render(self.load(folder)), same_files)

    def fused(self, folder: Path, plan: Plan | None = None, scheduler: Mapping[str, object] | None = None) -> Built:
        """A merge as by `merge`, loaded and rendered as the recipe says."""
        return self.built(self.merge(folder, plan, scheduler))

    def rerendered(self, cases: Sequence[Case] | None = None, steps: int | None = None) -> Built:
        """The right merge, rendered once more, perhaps in another way."""
        return Built(self.right, self.render(self.load(self.right), cases, steps))

    def repainted(self, change: Callable[[picture.Levels], picture.Levels]) -> Built:
        """The right merge with other pixels, the latents as they were."""
        return Built(self.right, [replace(each, levels=change(each.levels)) for each in self.rerendered().pictures])
