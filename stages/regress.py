"""Stage `regress`: render merged and unfused, compare with each other and with the goldens, write the report."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from lora_fuse.files import replace_text
from lora_fuse.manifest import read_manifest
from lora_fuse.progress import Clock
from lora_fuse.records import to_json
from lora_fuse.regression.candidates import candidates
from lora_fuse.regression.environment import environment, make_deterministic
from lora_fuse.regression.pairs import check_cases, judge_pairs, render_pairs, save_pictures
from lora_fuse.regression.report import report_html
from lora_fuse.regression.review import block_changes, case_rows, review, run_metrics
from lora_fuse.regression.watch import Task, watching
from stages.artifacts import HERE, Artifacts, read_object
from stages.config import run_stage
from stages.console import PLAIN, Console
from stages.params import Params
from stages.planning import cases_of, goldens_of, plan_of, rules_of, setup_of

GATE = "dvc repro gate"
KEPT = "the last pictures are as they were, none of this run's is kept; `dvc repro` goes on with them from the first"


def regress(params: Params, at: Artifacts = HERE, console: Console = PLAIN) -> int:
    """Write the pictures, the candidates, `metrics.json` and `report.html`; the gate decides on them."""
    settings, (base, loras) = params.regress, at.read_locks()
    manifest, manifest_sha256 = read_manifest(at.manifest)
    verify = read_object(at.verify, "verify")
    make_deterministic(settings.threads, on_gpu=settings.placement != "cpu")
    here, cases, setup = environment(settings.placement, settings.dtype), cases_of(params), setup_of(params)
    rules = rules_of(params)
    check_cases(cases, setup)
    approved = goldens_of(params).for_run(here.key, [case.name for case in cases])
    task, clock = Task(f"regress {params.name} {here.key}", len(cases), setup.sides), Clock()
    console.will("regress", f"{task}, on {here.key}{task.guess}")
    with watching(task) as watch:
        pairs = render_pairs(at.merged, plan_of(base, loras, params), cases, setup, watch)
    judged = judge_pairs(pairs, {name: [one.golden for one in found] for name, found in approved.items()}, rules)
    found = candidates(judged, manifest, manifest_sha256, setup, here)
    save_pictures(judged, at.images)
    replace_text(at.candidates, to_json(found))
    metrics = run_metrics(judged, found, params.fuse.scale)
    blocks = [asdict(block) for block in block_changes(verify["changes"])]
    for path, content in ((at.metrics, metrics), (at.cases, case_rows(metrics)), (at.blocks, blocks)):
        replace_text(path, json.dumps(content, indent=2) + "\n")
    report = review(manifest, verify, judged, found, approved, rules, setup)
    replace_text(at.report, report_html(replace(report, next_step=at.worded(report.next_step))))
    facts = {"verdict": metrics["verdict"], "environment": str(here.key), "report": str(at.report)}
    line = f"{metrics['verdict']} on {here.key}, see {at.report}"
    console.done("regress", line, task.took(clock.seconds), facts=facts | {"seconds": clock.seconds}, then=GATE)
    return 0


if __name__ == "__main__":
    run_stage(regress, kept=KEPT)
