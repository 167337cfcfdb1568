"""Parameters as the library knows them: the plan that `fuse` carries out, and the rules that pictures are held to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_fuse import hub
from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.fusion.plan import Plan, make_plan
from lora_fuse.models.families import COMPONENT
from lora_fuse.pictures.pairs import Setup
from lora_fuse.pictures.render import Case, Sampling
from lora_fuse.recipe.paths import GOLDEN, lora_inputs
from lora_fuse.recipe.recipe import Params
from lora_fuse.recipe.records import Lock
from lora_fuse.regression.goldens import Goldens
from lora_fuse.regression.verdicts import Limits, Rules
from lora_fuse.studies.validation.evidence import Bounds

OVER_FLOOR = 2.0  # where a recipe leaves it open: a right merge comes to at most 1.7 (docs/regression.md)


def plan_of(base: Lock, loras: Mapping[str, Lock], params: Params) -> Plan:
    """The pinned LoRAs against the pinned base, as the recipe chooses and scales them."""
    checkpoint = open_checkpoint(hub.locate(base), COMPONENT, base.files, base.label if base.repo_id else None)
    return make_plan(checkpoint, lora_inputs(loras, params), params.fuse.selection)


def rules_of(params: Params) -> Rules:
    """What the pictures are held to."""
    regress, sigmas = params.regress, params.sampling.sigmas
    limits = (Limits(regress.unfused.bounds), Limits(regress.golden.bounds))
    return Rules(*limits, regress.over_floor, None if sigmas is None else tuple(sigmas))


def setup_of(params: Params) -> Setup:
    """How both sides are rendered."""
    area, regress = params.base.condition_area, params.regress
    baseline = baseline_of(params) if regress.baseline else None
    sampling = Sampling(**params.sampling.usage, condition_area=area)
    return Setup(params.base.pipeline, sampling, params.scheduler_config, regress.placement, regress.dtype, baseline)


def goldens_of(params: Params, base: Lock) -> Goldens:
    """The recipe's approved pictures, for the base that is pinned.

    Raises:
        BadGolden: they were approved for another base.
    """
    goldens = Goldens(GOLDEN / params.name)
    goldens.refuse_other_base(str(base.repo_id or base.path), base.files)
    return goldens


def baseline_of(params: Params) -> Sampling:
    """How the base alone is run."""
    return Sampling(**params.base.sampling.usage, condition_area=params.base.condition_area)


def bounds_of(params: Params) -> Bounds:
    """What a new version of a LoRA is held to."""
    held, over_floor = params.validation, params.regress.over_floor or OVER_FLOOR
    return Bounds(held.alignment, held.strength, held.gain_kept, held.noise, held.comb_db, over_floor)


def cases_of(params: Params) -> list[Case]:
    """The pictures to make."""
    cases = params.regress.cases.items()
    return [Case(name, c.prompt, c.seed, tuple(map(Path, c.images)), c.height, c.width) for name, c in cases]
