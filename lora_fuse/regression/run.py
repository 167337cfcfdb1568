"""Rendered pairs judged by a recipe's rules, for a build's regression and for a point of a sweep."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lora_fuse.errors import Rerun
from lora_fuse.fusion import read_manifest
from lora_fuse.machine import staging
from lora_fuse.pictures import environment, pairs, render_progress
from lora_fuse.recipe import Artifacts, Recipe, records
from lora_fuse.regression.candidates import candidates, save_pictures
from lora_fuse.regression.case_judgement import Comparisons
from lora_fuse.regression.gate import next_step
from lora_fuse.regression.report import report_html
from lora_fuse.regression.review import Judged, block_changes, case_rows, review, run_metrics
from lora_fuse.regression.run_record import RunRecord
from lora_fuse.regression.verdicts import Rules


def judge(
    params: Recipe,
    at: Artifacts,
    setup: pairs.Setup,
    here: environment.Environment,
    rendered: Sequence[pairs.Pair],
    compared: Comparisons,
    loads: Mapping[str, float] | None = None,
) -> Judged:
    """Compare every pair with each other and with the goldens by case, and measure; `loads` took so many seconds."""
    loads = dict(loads or {})
    with render_progress.spending(loads, "comparisons"):
        cases = compared.judge(rendered, Rules.of(params))
    manifest, manifest_sha256 = read_manifest(at.manifest)
    with render_progress.spending(loads, "PNG"):
        found = candidates(cases, manifest, manifest_sha256, setup)
    run = RunRecord.of(records.to_json(found), here, rendered, loads)
    measured = run_metrics(cases, found, here.key, params.fuse.scale)
    return Judged(manifest, cases, found, run, measured)


def write_regression(
    params: Recipe,
    at: Artifacts,
    setup: pairs.Setup,
    judged: Judged,
    verify: Mapping[str, Any],
    command: Callable[[Rerun], str],
) -> None:
    """Write the pictures, the candidates, the metrics, the plots' data, the run's record and the report, at once."""
    blocks = [asdict(block) for block in block_changes(verify["changes"])]
    contents = ((at.metrics, judged.metrics), (at.cases, case_rows(judged.metrics)), (at.blocks, blocks))
    texts = {path: json.dumps(content, indent=2) + "\n" for path, content in contents}
    then = next_step(judged.metrics) if verify["passed"] else Rerun("fuse", force=True)
    took: dict[str, float] = {}
    with staging.whole(at.regression) as folder:
        with render_progress.spending(took, "PNG"):
            save_pictures(judged.cases, folder / at.images.name)
        with render_progress.spending(took, "report"):
            texts[at.report] = report_html(review(judged, verify, Rules.of(params), setup, command(then)))
        texts |= {at.candidates: records.to_json(judged.found), at.run: records.to_json(judged.run.and_took(took))}
        for path, text in texts.items():
            (folder / path.name).write_text(text, encoding="utf-8")
