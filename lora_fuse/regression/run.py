"""Rendered pairs judged by a recipe's rules, for a build's regression and for a point of a sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_fuse.fusion.manifest import read_manifest
from lora_fuse.machine.files import replace_text
from lora_fuse.pictures.environment import Environment
from lora_fuse.pictures.pairs import JudgedPair, Pair, Setup, judge_pairs, save_pictures
from lora_fuse.recipe.paths import Artifacts
from lora_fuse.recipe.recipe import Params
from lora_fuse.recipe.records import Manifest, to_json
from lora_fuse.regression.candidates import candidates
from lora_fuse.regression.goldens import Approved, Candidates, pictures_of
from lora_fuse.regression.report import report_html
from lora_fuse.regression.review import block_changes, case_rows, review, run_metrics
from lora_fuse.regression.verdicts import Scalar
from stages.planning import rules_of


@dataclass(frozen=True, slots=True)
class Judged:
    """What a run came to, and all that it is of."""

    manifest: Manifest
    cases: list[JudgedPair]
    found: Candidates
    metrics: dict[str, Scalar]
    approved: Mapping[str, Sequence[Approved]]


def judge(
    params: Params,
    at: Artifacts,
    setup: Setup,
    here: Environment,
    pairs: Sequence[Pair],
    approved: Mapping[str, Sequence[Approved]],
) -> Judged:
    """Compare every pair with each other and with the goldens, and measure.

    Args:
        params: the recipe.
        at: where its merge lies.
        setup: how it was rendered.
        here: on what.
        pairs: what was rendered.
        approved: the goldens by case.
    """
    cases = judge_pairs(pairs, pictures_of(approved), rules_of(params))
    manifest, manifest_sha256 = read_manifest(at.manifest)
    found = candidates(cases, manifest, manifest_sha256, setup, here)
    return Judged(manifest, cases, found, run_metrics(cases, found, params.fuse.scale), approved)


def write_regression(params: Params, at: Artifacts, setup: Setup, judged: Judged, verify: Mapping[str, Any]) -> None:
    """Write the pictures, the candidates, the metrics, the plots' data and the report."""
    save_pictures(judged.cases, at.images)
    replace_text(at.candidates, to_json(judged.found))
    blocks = [asdict(block) for block in block_changes(verify["changes"])]
    contents = ((at.metrics, judged.metrics), (at.cases, case_rows(judged.metrics)), (at.blocks, blocks))
    for path, content in contents:
        replace_text(path, json.dumps(content, indent=2) + "\n")
    parts = (judged.manifest, verify, judged.cases, judged.found, judged.approved)
    report = review(*parts, rules_of(params), setup)
    replace_text(at.report, report_html(replace(report, next_step=at.worded(report.next_step))))
