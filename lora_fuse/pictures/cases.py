"""Pictures to make, and the settings to make them with, as a recipe has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from lora_fuse.models import pipeline_call
from lora_fuse.recipe import Recipe

Images = TypeVar("Images")


@dataclass(frozen=True, slots=True)
class CaseOf(Generic[Images]):
    """One picture to make.

    `images` are the input pictures: their paths, or in a record their sha256 by path. Height and width are in pixels,
    `frames` the number of those of a clip; None leaves them to the pipeline.
    """

    name: str
    prompt: str
    seed: int
    images: Images
    height: int | None = None
    width: int | None = None
    frames: int | None = None


@dataclass(frozen=True, slots=True)
class Case(CaseOf[tuple[Path, ...]]):
    """One picture to make, its input pictures by path."""

    images: tuple[Path, ...] = ()

    @staticmethod
    def of(recipe: Recipe) -> list[Case]:
        """List a recipe's cases."""
        cases = recipe.regress.cases.items()
        return [
            Case(name, c.prompt, c.seed, tuple(map(Path, c.images)), c.height, c.width, c.frames) for name, c in cases
        ]

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels, of a clip those of the frames that are shown; None unless both are given."""
        return (self.width * min(self.frames or 1, 3), self.height) if self.width and self.height else None


@dataclass(frozen=True, slots=True)
class Sampling:
    """The arguments of a pipeline's call that all cases share.

    Attributes:
        steps: of denoising.
        true_cfg_scale: the number that `guidance` says what it is of.
        negative_prompt: None leaves it out.
        condition_area: pixels, see `lora_fuse.pictures.render.condition_area`.
        call_sigmas: those that go into the call, as many as steps; empty leaves them to the scheduler.
        guidance: of the pipeline's class.
    """

    steps: int
    true_cfg_scale: float
    negative_prompt: str | None
    condition_area: int | None = None
    call_sigmas: tuple[float, ...] = ()
    guidance: pipeline_call.Guidance = pipeline_call.TRUE_CFG

    @property
    def guided(self) -> bool:
        """True where the model runs twice a step, the second time without the prompt."""
        return self.guidance.doubles(self.true_cfg_scale, self.negative_prompt)

    @property
    def beside_prompt(self) -> tuple[bool, str | None, int | None]:
        """The part of the settings that the embeddings of a case's prompts depend on."""
        return self.guided, self.negative_prompt if self.guided else None, self.condition_area
