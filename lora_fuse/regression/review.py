"""Puts the report together: what was built, what was checked, what the pictures came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_fuse.devices import Environment
from lora_fuse.families import manifest_warnings
from lora_fuse.records import Manifest, MergedLora
from lora_fuse.regression.metrics import amplified_difference, to_levels, to_png
from lora_fuse.regression.pairs import JudgedPair, Setup
from lora_fuse.regression.render import Sampling, open_picture
from lora_fuse.regression.report import Baseline, BuiltFrom, CaseReport, Difference, LoraRow, Report, WeightsCheck
from lora_fuse.regression.verdicts import Limits, worst

FACTOR = 8  # a difference of 32 levels, and any larger one, is shown as white


def review(
    manifest: Manifest,
    verify: Mapping[str, Any],
    judged: Sequence[JudgedPair],
    setup: Setup,
    here: Environment,
    limits: Mapping[str, Limits],
) -> Report:
    """The report of one run.

    Args:
        manifest: of the merged checkpoint.
        verify: the content of `verify.json`.
        judged: every case.
        setup: how both sides were rendered.
        here: where.
        limits: what the cases were held to, of ``unfused`` and ``golden``.
    """
    return Report(
        recipe=manifest.recipe or "merge",
        verdict=worst(case.result.verdict for case in judged),
        built_from=_built_from(manifest, setup, judged[0].pair.merged.sigmas),
        weights=WeightsCheck(
            verify["passed"],
            verify["targets"],
            verify["rows_checked"],
            verify["rows_total"],
            tuple(verify["problems"]),
        ),
        environment={**_environment(here, manifest), "LoRA unfused by": judged[0].pair.unfused_by},
        warnings=tuple(manifest_warnings(manifest)),
        unfused_limits=limits["unfused"],
        golden_limits=limits["golden"],
        cases=tuple(_case(case, setup.baseline) for case in judged),
    )


def _built_from(manifest: Manifest, setup: Setup, sigmas: tuple[float, ...]) -> BuiltFrom:
    shift = {
        key: setup.scheduler[key] for key in ("base_shift", "max_shift", "shift_terminal") if key in setup.scheduler
    }
    return BuiltFrom(
        base=manifest.base.label if manifest.base else "unknown",
        loras=tuple(LoraRow(lora.name, _place(lora), lora.sha256, lora.scale) for lora in manifest.loras),
        pipeline=setup.pipeline,
        steps=setup.sampling.steps,
        true_cfg_scale=setup.sampling.true_cfg_scale,
        scheduler_shift=", ".join(f"{key} {value}" for key, value in shift.items()) or "the base's own",
        sigmas=sigmas,
    )


def _place(lora: MergedLora) -> str:
    return f"{lora.repo_id}@{lora.revision}/{lora.filename}" if lora.repo_id else f"{lora.path}/{lora.filename}"


def _environment(here: Environment, manifest: Manifest) -> dict[str, str]:
    tool = manifest.tool
    return {
        "goldens of": here.key,
        "device": f"{here.device_name}, {here.threads} threads" if here.device == "cpu" else here.device_name,
        "dtype": here.dtype,
        "torch": here.torch,
        "diffusers": here.diffusers,
        "transformers": here.transformers,
        "lora-fuse": f"{tool.version}, {(tool.git or 'no checkout')[:12]}{', modified' if tool.dirty else ''}",
    }


def _case(case: JudgedPair, baseline: Sampling | None) -> CaseReport:
    merged, unfused = to_levels(case.pair.merged.image), to_levels(case.pair.unfused.image)
    others = {"golden": case.golden, "unfused": unfused}
    return CaseReport(
        result=case.result,
        inputs=tuple(to_png(to_levels(open_picture(path, case.pair.case))) for path in case.pair.case.images),
        merged=to_png(merged),
        unfused=to_png(unfused),
        golden=None if case.golden is None else to_png(case.golden),
        differences=tuple(
            Difference(name, FACTOR, to_png(amplified_difference(merged, other, FACTOR)))
            for name, other in others.items()
            if other is not None and other.shape == merged.shape
        ),
        baseline=_baseline(case, baseline),
    )


def _baseline(case: JudgedPair, sampling: Sampling | None) -> Baseline | None:
    alone = case.pair.baseline
    if alone is None or sampling is None:
        return None
    png = to_png(to_levels(alone.image))
    return Baseline(png, sampling.steps, sampling.true_cfg_scale, alone.seconds, case.pair.merged.seconds)
