"""Stage `regress`: render merged, unfused and exports, compare with each other and with the goldens, write the report.

`accelerate launch --num_processes N -m stages.regress` spreads the cases over N processes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lora_fuse.fusion import plan_of, read_manifest
from lora_fuse.machine import Console, progress
from lora_fuse.pictures import Case, DistributedRenderer, environment, pairs, render_progress
from lora_fuse.recipe import Artifacts, Recipe, paths
from lora_fuse.regression import case_judgement, goldens, judge, weight_check, write_regression
from lora_fuse.regression.exported import decoders_of, judge_exports
from stages.run import PLAIN, command, run_stage

GATE = "dvc repro gate"
KEPT = "the last pictures are as they were, none of this run's is kept; `dvc repro` goes on with them from the first"


def regress(recipe: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Write the pictures, the candidates, `metrics.json` and `report.html`; the gate decides on them."""
    base, loras = at.locks_of(recipe)
    read_manifest(at.manifest)
    verify = weight_check.read_weight_check(at.verify)
    setup = pairs.Setup.of(recipe)
    cases = Case.of(recipe)
    with paths.held([base, *loras.values()], _pictures(recipe)):
        team = DistributedRenderer(setup.placement, recipe.regress.threads)
        here, seconds = _start(recipe, setup)
        pairs.check_cases(cases, setup)
        approved = goldens.Goldens.of(recipe, base).for_run(here.key, [case.name for case in cases])
        exports = decoders_of(recipe, at)
        task = render_progress.Task(
            f"regress {recipe.name} {here.key}", team.share(len(cases)), setup.sides_with(len(exports))
        )
        clock = progress.Stopwatch()
        console.will("regress", f"{task}{team}, on {here.key}{task.estimate}")
        plan = plan_of(base, loras, recipe)
        with case_judgement.Comparisons(approved, beside=team.has_idle_cores) as compared:
            with render_progress.watching(task, seconds, compared.while_made) as watch:
                rendered = team.render(
                    cases,
                    str(here.key),
                    lambda mine: pairs.render_pairs(at.merged, plan, mine, setup, watch, exports=exports),
                )
            if rendered is None:  # another process judges and writes
                return 0
            judged = judge(recipe, at, setup, here, rendered, compared, watch.seconds).with_exports(
                partial(judge_exports, recipe, at, plan)
            )
    write_regression(recipe, at, setup, judged, verify, partial(command, at=at))
    verdict = judged.metrics["verdict"]
    console.done(
        "regress",
        f"{verdict} on {here.key}, see {at.report}",
        task.took(clock.seconds),
        facts={"verdict": verdict, "environment": str(here.key), "report": str(at.report), "seconds": clock.seconds},
        then=GATE,
    )
    return 0


def _start(recipe: Recipe, setup: pairs.Setup) -> tuple[environment.Environment, dict[str, float]]:
    """The environment, made deterministic; and the seconds of that, and of the process until then."""
    seconds = {"start": progress.process_age()}
    with render_progress.spending(seconds, "torch, the device"):
        environment.make_deterministic(recipe.regress.threads)
        here = environment.environment(setup.placement, setup.dtype, compiled=setup.compiled)
    return here, seconds


def _pictures(recipe: Recipe) -> list[Path]:
    """The files that are read beside base and LoRAs: what is edited, and the goldens with their records."""
    goldens_of = filter(Path.is_file, (paths.GOLDEN / recipe.name).rglob("*"))
    return [*(image for case in Case.of(recipe) for image in case.images), *goldens_of]


if __name__ == "__main__":
    run_stage(regress, kept=KEPT, spread=True)
