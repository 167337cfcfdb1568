"""Stage `regress`: render merged and unfused, compare with each other and with the goldens, write the report.

`accelerate launch --num_processes N -m stages.regress` spreads the cases over N processes.
"""

from __future__ import annotations

from functools import partial

from lora_fuse.fusion.manifest import read_manifest
from lora_fuse.fusion.plan import plan_of
from lora_fuse.machine.console import PLAIN, Console
from lora_fuse.machine.progress import Stopwatch
from lora_fuse.pictures.asked import cases_of, setup_of
from lora_fuse.pictures.distributed import DistributedRenderer
from lora_fuse.pictures.environment import environment, make_deterministic
from lora_fuse.pictures.pairs import check_cases, render_pairs
from lora_fuse.pictures.render_progress import Task, watching
from lora_fuse.recipe.paths import HERE, Artifacts, read_object
from lora_fuse.recipe.recipe import Recipe
from lora_fuse.regression.run import goldens_of, judge, write_regression
from stages.run import command, run_stage

GATE = "dvc repro gate"
KEPT = "the last pictures are as they were, none of this run's is kept; `dvc repro` goes on with them from the first"


def regress(params: Recipe, at: Artifacts = HERE, console: Console = PLAIN) -> int:
    """Write the pictures, the candidates, `metrics.json` and `report.html`; the gate decides on them."""
    settings, (base, loras) = params.regress, at.read_locks()
    read_manifest(at.manifest)
    verify = read_object(at.verify, "verify")
    team = DistributedRenderer(settings.placement, settings.threads)
    make_deterministic(settings.threads, on_gpu=settings.placement != "cpu")
    here, cases, setup = environment(settings.placement, settings.dtype), cases_of(params), setup_of(params)
    check_cases(cases, setup)
    approved = goldens_of(params, base).for_run(here.key, [case.name for case in cases])
    task, clock = Task(f"regress {params.name} {here.key}", team.share(len(cases)), setup.sides), Stopwatch()
    console.will("regress", f"{task}{team}, on {here.key}{task.estimate}")
    plan = plan_of(base, loras, params)
    with watching(task) as watch:
        pairs = team.render(cases, str(here.key), lambda mine: render_pairs(at.merged, plan, mine, setup, watch))
    if pairs is None:  # another process judges and writes
        return 0
    judged = judge(params, at, setup, here, pairs, approved)
    write_regression(params, at, setup, judged, verify, partial(command, at=at))
    verdict = judged.metrics["verdict"]
    facts = {"verdict": verdict, "environment": str(here.key), "report": str(at.report), "seconds": clock.seconds}
    lines = (f"{verdict} on {here.key}, see {at.report}", task.took(clock.seconds))
    console.done("regress", *lines, facts=facts, then=GATE)
    return 0


if __name__ == "__main__":
    run_stage(regress, kept=KEPT, spread=True)
