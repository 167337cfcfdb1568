"""Results of a build held against each other: nothing is believed that follows from something else.

Verdicts follow from numbers, the recipe's limits and the goldens; numbers from the pictures, as far as they are cheap
to measure again; pictures from the candidates' record; all of it is of one manifest. What does not follow from what is
on disk, a NaN that was painted over, the sigmas of the unfused pipeline and the noise floor, is taken as it is said:
the first two only ever fail a case. So are the figures of an export's weights, of the very file that was judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_fuse.errors import BadSource
from lora_fuse.fusion import read_manifest
from lora_fuse.pictures import Case, CaseOf, metrics, picture
from lora_fuse.recipe import Artifacts, Recipe, paths, records
from lora_fuse.regression.candidates import Candidate, Candidates, PictureInputs
from lora_fuse.regression.case_judgement import Measured, judge_measured
from lora_fuse.regression.exported import check_exports
from lora_fuse.regression.gate import case_names
from lora_fuse.regression.goldens import AGAIN, Approved, Goldens
from lora_fuse.regression.recorded_numbers import CLOSE, RecordedNumbers, read_judged
from lora_fuse.regression.run_record import read_run
from lora_fuse.regression.verdicts import CaseResult, Comparison, Facts, Rules, Verdict, worst
from lora_fuse.regression.weight_check import check_manifest, read_weight_check


@dataclass(frozen=True, slots=True)
class Results:
    """The contents of `verify.json` and, if the weights are right, of `metrics.json`, and the goldens of the run."""

    verify: Mapping[str, Any]
    metrics: Mapping[str, Any]
    goldens: tuple[Approved, ...]


def read_results(recipe: Recipe, at: Artifacts) -> Results:
    """Read what a build of a recipe came to, and work out again what follows.

    Raises:
        BadSource: a result is not there or is none, or says something else than what follows; the message has both.
        BadGolden: a golden that was compared with is not as it was approved.
    """
    manifest, sha256 = read_manifest(at.manifest)
    verify = read_weight_check(at.verify)
    check_manifest(at.verify, verify, manifest, sha256)
    if not verify["passed"]:
        return Results(verify, {}, ())
    numbers = RecordedNumbers(at.metrics, paths.read_object(at.metrics, "regress"))
    found = _read_candidates(at)
    run = read_run(at)  # not there where the results came from another machine
    of = {"recipe": recipe.name, "scale": recipe.fuse.scale, "manifest_sha256": sha256}
    for name, follows in (of | ({"environment": str(run.environment.key)} if run else {})).items():
        numbers.check(name, follows)
    if found.manifest_sha256 != sha256:
        raise BadSource(f"{at.candidates} is of manifest {found.manifest_sha256}, and there is {sha256}", rerun=AGAIN)
    cases = Case.of(recipe)
    names = sorted(case.name for case in cases)
    for where, listed in ((at.metrics, case_names(numbers.content)), (at.candidates, list(found.cases))):
        if sorted(listed) != names:
            raise BadSource(f"{where} has the cases {', '.join(listed)}, the recipe {', '.join(names)}", rerun=AGAIN)
    goldens = Goldens(paths.GOLDEN / recipe.name)
    for case in cases:
        _check_made(case, recipe, found.cases[case.name].provenance)
    judged = [_judge(case, numbers, found.cases[case.name], at.images, goldens, Rules.of(recipe)) for case in cases]
    floors = {case.name: numbers.comparison(f"{case.name}.floor", of_clips=case.frames is not None) for case in cases}
    exports = check_exports(recipe, at, numbers, floors)
    said = [Verdict(numbers.text(f"{case.name}.verdict")) for case in cases]
    overall = worst([*said, *(verdict for verdict in exports if not verdict.passed)])
    numbers.check("verdict", overall.value)
    numbers.check("passed", overall.passed)
    return Results(verify, numbers.content, tuple(one.golden for one in judged if isinstance(one.golden, Approved)))


def _read_candidates(at: Artifacts) -> Candidates:
    try:
        return records.from_json(Candidates, paths.read_text(at.candidates, "regress"), str(at.candidates))
    except BadSource as error:
        raise BadSource(str(error).removesuffix("; run its stage again"), rerun=error.rerun or AGAIN) from error


def _check_made(case: Case, recipe: Recipe, made: PictureInputs) -> None:
    """Refuse a candidate of another case than the recipe's, or of other settings."""
    settings = recipe.sampling
    asked = {**_fields(case), "images": [path.as_posix() for path in case.images], **settings.usage}
    used = {
        **_fields(made.case),
        "images": list(made.case.images),
        **{name: getattr(made, name) for name in settings.usage},
    }
    for name, value in asked.items():
        if used[name] != value:
            raise BadSource(
                f"the candidate {case.name} was made with {name} {used[name]}, and the recipe says {value}", rerun=AGAIN
            )


def _fields(case: CaseOf[Any]) -> dict[str, Any]:
    return {name: getattr(case, name) for name in CaseOf.__dataclass_fields__}


def _judge(
    case: Case, numbers: RecordedNumbers, candidate: Candidate, images: Path, goldens: Goldens, rules: Rules
) -> CaseResult:
    """Judge a case again from its numbers, and refuse what is said of it if that does not follow."""
    name = case.name
    merged = read_judged(images / f"{name}.merged.png", candidate.sha256)
    unfused = read_judged(images / f"{name}.unfused.png")
    of_clips = case.frames is not None
    vs_unfused, floor, vs_golden = (
        numbers.comparison(f"{name}.{pair}", of_clips=of_clips) for pair in ("unfused", "floor", "golden")
    )
    numbers.measured_again(f"{name}.unfused", vs_unfused, merged, unfused)
    golden = _golden_of(name, numbers, merged, vs_golden, goldens)
    if of_clips and golden is not None and vs_golden is not None:
        for metric, found in metrics.OF_CLIPS.items():
            if metric not in candidate.clip or metric not in golden.clip:
                raise BadSource(f"the candidate {name} or its golden says no {metric} of its clip", rerun=AGAIN)
            numbers.check(f"{name}.golden.{metric}", found.measure(candidate.clip[metric], golden.clip[metric]))
    facts = {side: Facts.of(picture.Picture(levels)) for side, levels in (("merged", merged), ("unfused", unfused))}
    sigmas = {"merged": candidate.provenance.sigmas}
    result = judge_measured(case, facts, Measured(vs_unfused, floor, vs_golden, golden), rules, sigmas)
    verdict = numbers.text(f"{name}.verdict")
    apart = numbers.content.get(f"{name}.agrees") is False
    if not (verdict == Verdict.INVALID or (verdict == Verdict.REGRESSION and apart)):  # see above: what is not on disk
        numbers.check(f"{name}.verdict", result.verdict.value)
        numbers.check(f"{name}.agrees", result.agrees)
    numbers.check(f"{name}.over_floor", result.over_floor)
    numbers.check(f"{name}.agrees", candidate.agrees)
    measured = {} if floor is None else {key: value for key, value in floor.values.items() if math.isfinite(value)}
    if candidate.floor != measured:
        raise BadSource(
            f"the candidate {name} has the noise floor {candidate.floor}, and the run {measured}", rerun=AGAIN
        )
    return result


def _golden_of(
    name: str, numbers: RecordedNumbers, merged: picture.Levels, said: Comparison | None, goldens: Goldens
) -> Approved | None:
    """Find the golden that a case was compared with: its distance to the picture is the one that is said.

    Where nothing was compared it is one of the run's environment of another size, if there is one.
    """
    key = numbers.text("environment")
    for golden in goldens.of_case(name, key):
        same_size = golden.levels.shape == merged.shape
        if said is None and (same_size or golden.elsewhere):
            continue
        if said is None:
            return golden
        if same_size and math.isclose(metrics.psnr_db(merged, golden.levels), said.values["psnr_db"], rel_tol=CLOSE):
            numbers.measured_again(f"{name}.golden", said, merged, golden.levels)
            return golden
    if said is not None:
        raise numbers.untrue(f"{name}.golden.psnr_db", "no golden that is so far from the picture")
    return None
