"""What a run leaves for approval: every merged picture's sha256 and everything that it came from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_fuse.machine import files
from lora_fuse.pictures import Case, Setup, environment
from lora_fuse.recipe import Manifest, checkout
from lora_fuse.regression.case_judgement import JudgedPair
from lora_fuse.regression.goldens import SCHEMA, Candidate, Candidates, CaseRecord, Provenance, digest
from lora_fuse.regression.verdicts import Comparison


def candidates(
    judged: Sequence[JudgedPair], manifest: Manifest, manifest_sha256: str, setup: Setup, here: environment.Environment
) -> Candidates:
    """The record of a run's merged pictures."""
    return Candidates(
        SCHEMA,
        manifest_sha256,
        {
            one.name: Candidate(
                sha256=hashlib.sha256(one.pair.merged.png).hexdigest(),
                agrees=one.result.agrees,
                reasons=one.result.reasons,
                floor=_finite(one.result.floor),
                provenance=_provenance(one, manifest, manifest_sha256, setup, here),
            )
            for one in judged
        },
    )


def _finite(floor: Comparison | None) -> dict[str, float]:
    return {} if floor is None else {name: value for name, value in floor.values.items() if math.isfinite(value)}


def _provenance(
    one: JudgedPair, manifest: Manifest, manifest_sha256: str, setup: Setup, here: environment.Environment
) -> Provenance:
    base = manifest.base
    return Provenance(
        recipe=manifest.recipe or "merge",
        base=base.label if base else "unknown",
        base_sha256=digest(base.files if base else {}),
        loras=manifest.loras,
        manifest_sha256=manifest_sha256,
        pipeline=setup.pipeline,
        case=_case_record(one.pair.case),
        steps=setup.sampling.steps,
        true_cfg_scale=setup.sampling.true_cfg_scale,
        negative_prompt=setup.sampling.negative_prompt,
        scheduler=_plain(setup.scheduler),
        sigmas=one.pair.merged.sigmas,
        environment=here,
        tool=checkout.this_tool(),
    )


def _case_record(case: Case) -> CaseRecord:
    images = {Path(path).as_posix(): files.hash_file(path).sha256 for path in case.images}
    return CaseRecord(case.name, case.prompt, case.seed, images, case.height, case.width)


def _plain(scheduler: Mapping[str, Any]) -> dict[str, bool | int | float | str | None]:
    return dict(scheduler)
