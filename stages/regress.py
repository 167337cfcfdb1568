"""Stage `regress`: render merged and unfused, compare with each other and with the goldens, write the report."""

from __future__ import annotations

import json
from pathlib import Path

from lora_fuse.devices import environment, make_deterministic, resolve_device
from lora_fuse.files import replace_text
from lora_fuse.manifest import read_manifest
from lora_fuse.regression.pairs import Setup, judge_pairs, render_pairs, save_pictures
from lora_fuse.regression.render import Case, Sampling
from lora_fuse.regression.report import report_html
from lora_fuse.regression.review import review
from lora_fuse.regression.verdicts import Limits, flat_metrics
from stages import artifacts as at
from stages.config import run_stage
from stages.params import Params
from stages.planning import plan_of


def regress(params: Params) -> int:
    """Write the pictures, `metrics.json` and `report.html`; the gate decides on them."""
    settings, (base, loras) = params.regress, at.read_locks()
    manifest, manifest_sha256 = read_manifest(at.MANIFEST)
    make_deterministic()
    area = params.base.condition_area
    here = environment(resolve_device(settings.device), settings.dtype)
    setup = Setup(
        pipeline=params.base.pipeline,
        sampling=Sampling(**params.sampling.model_dump(), condition_area=area),
        scheduler=params.scheduler_config,
        device=here.device,
        dtype=here.dtype,
        baseline=Sampling(**params.base.sampling.model_dump(), condition_area=area) if settings.baseline else None,
    )
    pairs = render_pairs(at.MERGED, plan_of(base, loras, params), _cases(params), setup)
    limits = {"unfused": Limits(settings.unfused.bounds), "golden": Limits(settings.golden.bounds)}
    judged = judge_pairs(pairs, at.GOLDEN / params.name / here.key, limits)
    save_pictures(judged, at.IMAGES)
    facts = {"recipe": params.name, "scale": params.fuse.scale, "environment": here.key}
    facts |= {"unfused_by": pairs[0].unfused_by, "manifest_sha256": manifest_sha256}
    metrics = {**flat_metrics(case.result for case in judged), **facts}
    replace_text(at.METRICS, json.dumps(metrics, indent=2) + "\n")
    replace_text(
        at.REPORT, report_html(review(manifest, at.read_object(at.VERIFY, "verify"), judged, setup, here, limits))
    )
    print(f"regress: {metrics['verdict']} on {here.key}, see {at.REPORT}")
    return 0


def _cases(params: Params) -> list[Case]:
    cases = params.regress.cases.items()
    return [Case(name, c.prompt, c.seed, tuple(map(Path, c.images)), c.height, c.width) for name, c in cases]


if __name__ == "__main__":
    run_stage(regress)
