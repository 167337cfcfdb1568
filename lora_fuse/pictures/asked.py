"""A recipe as the renderer knows it: the pictures to make, and how each side makes them."""

from __future__ import annotations

from pathlib import Path

from lora_fuse.pictures.pairs import Setup
from lora_fuse.pictures.render import Case, Sampling
from lora_fuse.recipe import Recipe


def cases_of(params: Recipe) -> list[Case]:
    """The pictures to make."""
    cases = params.regress.cases.items()
    return [Case(name, c.prompt, c.seed, tuple(map(Path, c.images)), c.height, c.width) for name, c in cases]


def setup_of(params: Recipe) -> Setup:
    """How both sides are rendered."""
    area, regress = params.base.condition_area, params.regress
    baseline = baseline_of(params) if regress.baseline else None
    sampling = Sampling(**params.sampling.usage, condition_area=area)
    return Setup(params.base.pipeline, sampling, params.scheduler_config, regress.placement, regress.dtype, baseline)


def baseline_of(params: Recipe) -> Sampling:
    """How the base alone is run."""
    return Sampling(**params.base.sampling.usage, condition_area=params.base.condition_area)
