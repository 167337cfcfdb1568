"""Parameters as the library knows them: the plan that `fuse` carries out, and the rules that pictures are held to."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fuse import hub
from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.families import COMPONENT
from lora_fuse.plan import Plan, make_plan
from lora_fuse.records import Lock
from lora_fuse.regression.verdicts import Limits, Rules
from stages.artifacts import lora_inputs
from stages.params import Params


def plan_of(base: Lock, loras: Mapping[str, Lock], params: Params) -> Plan:
    """The pinned LoRAs against the pinned base, as the recipe chooses and scales them."""
    checkpoint = open_checkpoint(hub.locate(base), COMPONENT, base.files, base.label if base.repo_id else None)
    return make_plan(checkpoint, lora_inputs(loras, params), params.fuse.selection)


def rules_of(params: Params) -> Rules:
    """What the pictures are held to."""
    regress, sigmas = params.regress, params.sampling.sigmas
    limits = (Limits(regress.unfused.bounds), Limits(regress.golden.bounds))
    return Rules(*limits, regress.over_floor, None if sigmas is None else tuple(sigmas))
