"""Puts the report together: what was built, what was checked, what the pictures came to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from lora_fuse.checkpoint import blocks
from lora_fuse.models import pair_warnings
from lora_fuse.pictures import encode, environment, metrics, pairs
from lora_fuse.recipe import Manifest, records
from lora_fuse.regression.candidates import WORKERS, Candidates, Provenance, differences
from lora_fuse.regression.case_judgement import JudgedPair
from lora_fuse.regression.exported import JudgedExport, flat_exports
from lora_fuse.regression.gate import case_names, commits_of
from lora_fuse.regression.goldens import Approved
from lora_fuse.regression.report import Baseline, BlockChange, CaseReport, Report
from lora_fuse.regression.run_record import RunRecord
from lora_fuse.regression.verdicts import CaseResult, Rules, Verdict, worst

Seconds: TypeAlias = Mapping[str, Mapping[str, float]]  # see `RunRecord`
Scalar: TypeAlias = float | int | bool | str | None


@dataclass(frozen=True, slots=True)
class Judged:
    """The judged cases of a run, with the records that they are of."""

    manifest: Manifest
    cases: list[JudgedPair]
    found: Candidates
    run: RunRecord
    metrics: dict[str, Scalar]
    exports: tuple[JudgedExport, ...] = ()

    def with_exports(self, judge: Callable[[Sequence[JudgedPair], Seconds], Sequence[JudgedExport]]) -> Judged:
        """The same run with exports, from its cases and the seconds of its pictures and loads.

        An export that fails fails the run, and what the others cost is no drift.
        """
        exports = judge(self.cases, self.run.seconds)
        failed = [export.verdict for export in exports if not export.verdict.passed]
        overall = worst([*(case.result.verdict for case in self.cases), *failed])
        measured = {**self.metrics, "passed": overall.passed, "verdict": overall.value, **flat_exports(exports)}
        return replace(self, metrics=measured, exports=tuple(exports))


def flat_metrics(results: Iterable[CaseResult]) -> dict[str, Scalar]:
    """The judged cases as `metrics.json` has them: `passed`, `verdict`, and one level of dotted keys per case.

    ``{case}.verdict``, ``{case}.reasons`` and, for the pairs ``golden``, ``unfused`` and ``floor``,
    ``{case}.golden.psnr_db`` and so on. Every case has every key (null where nothing was measured, or where the PSNR
    is infinite), so that a difference between two runs shows.
    """
    listed = list(results)
    overall = worst(result.verdict for result in listed)
    flat: dict[str, Scalar] = {"passed": overall.passed, "verdict": overall.value}
    for result in listed:
        name = result.case.name
        flat[f"{name}.verdict"] = result.verdict.value
        flat[f"{name}.reasons"] = " ".join(result.reasons)
        flat[f"{name}.agrees"] = result.agrees
        flat[f"{name}.over_floor"] = _json_number(result.over_floor)
        for pair, comparison in (("golden", result.vs_golden), ("unfused", result.vs_unfused), ("floor", result.floor)):
            for metric in metrics.METRICS if result.case.frames is None else metrics.EVERY:
                value = None if comparison is None else comparison.values.get(metric)
                flat[f"{name}.{pair}.{metric}"] = _json_number(value)
            flat[f"{name}.{pair}.identical"] = comparison is not None and comparison.identical
    return flat


def _json_number(value: float | None) -> float | None:
    """JSON has neither infinity nor NaN."""
    return records.rounded(value) if value is not None and math.isfinite(value) else None


def run_metrics(
    judged: Sequence[JudgedPair],
    found: Candidates,
    key: environment.Key,
    scale: float,
) -> dict[str, Scalar]:
    """The content of `metrics.json`: what was measured and decided, and of what."""
    return flat_metrics(case.result for case in judged) | {
        "recipe": next(iter(found.cases.values())).provenance.recipe,
        "scale": scale,
        "environment": str(key),
        "unfused_by": judged[0].pair.unfused_by,
        "manifest_sha256": found.manifest_sha256,
    }


def case_rows(metrics: Mapping[str, Scalar]) -> list[dict[str, Scalar]]:
    """A row for each case, for `dvc plots`: what `metrics.json` says of it, under the names after the case's own."""
    return [
        {"case": name, **{key.removeprefix(f"{name}."): metrics[key] for key in metrics if key.startswith(f"{name}.")}}
        for name in case_names(metrics)
    ]


def review(judged: Judged, verify: Mapping[str, Any], rules: Rules, setup: pairs.Setup, next_step: str) -> Report:
    """The report of one run, from the content of `verify.json` and the command that comes next."""
    first = next(iter(judged.found.cases.values())).provenance
    goldens = [case.result.golden for case in judged.cases]
    commits = commits_of(golden.path for golden in goldens if isinstance(golden, Approved))
    approved = {"goldens approved in": commits} if commits else {}

    def show(one: JudgedPair) -> CaseReport:
        return _case(one, Provenance.of(judged.found.cases[one.name].provenance, judged.run), setup)

    with ThreadPoolExecutor(WORKERS, "show") as pool:
        cases = tuple(pool.map(show, judged.cases))
    return Report(
        recipe=first.recipe,
        verdict=Verdict(str(judged.metrics["verdict"])),
        next_step=next_step,
        manifest=judged.manifest,
        setup=setup,
        sigmas=first.sigmas,
        verify=verify,
        blocks=block_changes(verify["changes"]),
        environment={**_environment(judged.run), "LoRA unfused by": judged.cases[0].pair.unfused_by, **approved},
        warnings=tuple(pair_warnings(*judged.manifest.pair)),
        rules=rules,
        cases=cases,
        exports=judged.exports,
    )


def block_changes(changes: Mapping[str, Mapping[str, float]]) -> tuple[BlockChange, ...]:
    """The largest relative norm by block, see `lora_fuse.checkpoint.blocks`, in the order of the model."""
    largest: dict[str, float] = {}
    for name, change in changes.items():
        block = blocks.block_of(name)
        largest[block] = max(largest.get(block, 0.0), change["relative_norm"])
    return tuple(BlockChange(block, largest[block]) for block in blocks.in_order(largest))


def _environment(run: RunRecord) -> dict[str, str]:
    here = run.environment
    tool = run.tool
    shown = {"goldens of": str(here.key), "device": here.device_name, "placement": here.placement}
    shown |= {name: text for name, text in (("driver", here.driver), ("CUDA", here.cuda)) if text is not None}
    shown |= {name: getattr(here, name) for name in ("torch", "diffusers", "transformers", "python")}
    shown["lora-fuse"] = f"{tool.version}, {(tool.git or 'no checkout')[:12]}{', modified' if tool.dirty else ''}"
    shown["flags"] = ", ".join(f"{name} {value}" for name, value in here.flags.items())
    return shown


def _case(case: JudgedPair, provenance: Provenance, setup: pairs.Setup) -> CaseReport:
    merged = case.pair.merged
    golden = case.result.golden
    others = {"golden": golden, "unfused": case.pair.unfused}
    return CaseReport(
        result=case.result,
        inputs=tuple(encode.encoded(pairs.open_picture(path, case.pair.case)) for path in case.pair.case.images),
        merged=encode.encoded(merged),
        unfused=encode.encoded(case.pair.unfused),
        golden=None if golden is None else encode.encoded(golden),
        heat={
            name: encode.encoded_map(metrics.heat_map(merged.levels, other.levels, encode.LARGE))
            for name, other in others.items()
            if other is not None and other.size == merged.size
        },
        cost=_cost(case),
        changed=tuple(differences(provenance, golden.record.provenance)) if isinstance(golden, Approved) else None,
        baseline=_baseline(case, setup),
        exports={name: encode.encoded(export) for name, export in case.pair.exports.items()},
        clips={
            name: encode.playing(side.frames, side.frames_per_second)
            for name, side in (("merged", merged), ("unfused", case.pair.unfused))
            if side.frames is not None
        },
    )


def _cost(case: JudgedPair) -> str:
    cost = case.pair.merged.cost
    parts = [f"{cost.seconds:.2f} s"]
    if cost.steps_per_s is not None:
        parts.append(f"{cost.steps_per_s:.2f} steps/s")
    if cost.peak_gpu_bytes is not None:
        parts.append(f"{cost.peak_gpu_bytes / 2**30:.2f} GiB of GPU memory")
    return ", ".join([*parts, f"{cost.peak_host_bytes / 2**30:.2f} GiB of host memory"])


def _baseline(case: JudgedPair, setup: pairs.Setup) -> Baseline | None:
    alone = case.pair.baseline
    sampling = setup.baseline
    if alone is None or sampling is None:
        return None
    times = (alone.cost.seconds, case.pair.merged.cost.seconds)
    return Baseline(encode.encoded(alone), sampling.steps, sampling.true_cfg_scale, *times)
