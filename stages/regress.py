"""Stage `regress`: render merged and unfused, compare with each other and with the goldens, write the report.

`accelerate launch --num_processes N -m stages.regress` spreads the cases over N processes.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from lora_fuse.files import replace_text
from lora_fuse.manifest import read_manifest
from lora_fuse.records import to_json
from lora_fuse.regression.candidates import candidates
from lora_fuse.regression.environment import environment, make_deterministic
from lora_fuse.regression.goldens import Goldens
from lora_fuse.regression.pairs import check_cases, judge_pairs, render_pairs, save_pictures
from lora_fuse.regression.report import report_html
from lora_fuse.regression.review import block_changes, case_rows, review, run_metrics
from lora_fuse.regression.spread import Team
from stages.artifacts import GOLDEN, HERE, Artifacts, read_object
from stages.config import run_stage
from stages.console import PLAIN, Console
from stages.params import Params
from stages.planning import cases_of, plan_of, rules_of, setup_of


def regress(params: Params, at: Artifacts = HERE, console: Console = PLAIN) -> int:
    """Write the pictures, the candidates, `metrics.json` and `report.html`; the gate decides on them."""
    settings, (base, loras) = params.regress, at.read_locks()
    manifest, manifest_sha256 = read_manifest(at.manifest)
    verify = read_object(at.verify, "verify")
    team = Team(settings.placement, settings.threads)
    make_deterministic(settings.threads, on_gpu=settings.placement != "cpu")
    here, cases, setup = environment(settings.placement, settings.dtype), cases_of(params), setup_of(params)
    rules = rules_of(params)
    check_cases(cases, setup)
    approved = Goldens(GOLDEN / params.name).for_run(here.key, [case.name for case in cases])
    plan = plan_of(base, loras, params)
    pairs = team.render(cases, str(here.key), lambda mine: render_pairs(at.merged, plan, mine, setup))
    if pairs is None:  # another process judges and writes
        return 0
    judged = judge_pairs(pairs, {name: [one.golden for one in found] for name, found in approved.items()}, rules)
    found = candidates(judged, manifest, manifest_sha256, setup, here)
    save_pictures(judged, at.images)
    replace_text(at.candidates, to_json(found))
    metrics = run_metrics(judged, found, params.fuse.scale)
    blocks = [asdict(block) for block in block_changes(verify["changes"])]
    for path, content in ((at.metrics, metrics), (at.cases, case_rows(metrics)), (at.blocks, blocks)):
        replace_text(path, json.dumps(content, indent=2) + "\n")
    replace_text(at.report, report_html(review(manifest, verify, judged, found, approved, rules, setup)))
    facts = {"verdict": metrics["verdict"], "environment": str(here.key), "report": str(at.report)}
    console.done("regress", f"{metrics['verdict']} on {here.key}, see {at.report}", facts=facts)
    return 0


if __name__ == "__main__":
    run_stage(regress, spread=True)
