"""Warnings of what merges and may be a mistake: base, strength or scheduler is another's, or the base is odd."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadCheckpoint
from lora_fuse.fusion.plan import Plan
from lora_fuse.machine import files
from lora_fuse.models import alpha_warnings, distillation, pair_warnings
from lora_fuse.recipe import hf_cache


def cautions(plan: Plan, scheduler: Mapping[str, object] | None = None) -> list[str]:
    """A sentence for each; `scheduler` are the settings that the result gets, None or nothing for the base's own."""
    base, _ = hf_cache.cached_from(plan.checkpoint.root.absolute())
    warnings = pair_warnings(base, [hf_cache.cached_from(given.path.absolute()) for given in plan.inputs])
    warnings += alpha_warnings([(lora.path.name, lora.missing_alphas) for lora in plan.loras])
    warnings += plan.checkpoint.remarks
    if scheduler:
        return warnings
    own: dict[str, object] | None = None
    if plan.checkpoint.kind == "pipeline":
        path = plan.checkpoint.root / repository_files.SCHEDULER_CONFIG
        own = files.read_json(path, dict, BadCheckpoint, "fetch the base again") if path.exists() else {}
    known = [found for given in plan.inputs if (found := distillation(given.path.name)) is not None]
    return warnings + [said for one in known if (said := one.warning(own)) is not None]
