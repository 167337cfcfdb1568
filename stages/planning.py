"""The plan that stages share: what `fuse` carries out and `regress` puts beside the base."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fuse import hub
from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.families import COMPONENT
from lora_fuse.plan import Plan, make_plan
from lora_fuse.records import Lock
from stages.artifacts import lora_inputs
from stages.params import Params


def plan_of(base: Lock, loras: Mapping[str, Lock], params: Params) -> Plan:
    """The pinned LoRAs against the pinned base, as the recipe chooses and scales them."""
    checkpoint = open_checkpoint(hub.locate(base), COMPONENT, base.files, base.label if base.repo_id else None)
    return make_plan(checkpoint, lora_inputs(loras, params), params.fuse.selection)
