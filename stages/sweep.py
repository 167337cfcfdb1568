"""``python -m stages.sweep fuse.scale=0.6,0.8,1.0 lora=v1,v2 [--keep]``: build every point, look at it, throw it away.

``--ray [HOST:PORT]`` builds them on the nodes of a Ray cluster.
Exit 0: every point was built. 1: a point was refused, or is not base + LoRA; the others are there all the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import lora_fuse
import stages
from lora_fuse.errors import BadConfig, Busy
from lora_fuse.fleet import AUTO, Package, connected, project_files
from lora_fuse.machine import Console
from lora_fuse.recipe import Artifacts, paths
from lora_fuse.studies.sweep import (
    PointBuilder,
    SpreadSweep,
    SweepPlan,
    SweepProgress,
    SweptPoint,
    plan_sweep,
    run,
    sheet_of,
    write_sheet,
    wrong_points,
)
from stages.config import load
from stages.config.composition import split_sweep
from stages.run import PLAIN, merge, run_stage, take_ray

SWEEP = Artifacts(paths.ROOT / "sweep")
SHEET = tuple(SWEEP.root / f"sweep.{kind}" for kind in ("html", "json", "md"))


@dataclass(frozen=True, slots=True)
class Swept:
    """A sweep as it was asked for, and its points; two of them may be the same.

    `ray` is the address of the cluster that builds them, None for this machine.
    """

    arguments: tuple[str, ...]
    points: tuple[SweptPoint, ...]
    ray: str | None = None


def expand(arguments: Sequence[str]) -> Swept:
    """Every point of a sweep in Hydra's grammar (``fuse.scale=0.6,0.8 lora=v1,v2``), in Hydra's order, all checked.

    Raises:
        BadConfig: nothing is swept, a sweep is not of single values, or a point does not compose; nothing was built.
    """
    arguments, ray = take_ray(arguments)
    swept = split_sweep(arguments)
    given = " ".join(arguments) or "no arguments"
    if swept is None:
        raise BadConfig(f"{given}: nothing to sweep; give a key several values: fuse.scale=0.6,0.8,1.0,1.2")
    if not swept[1]:
        raise BadConfig(f"{given}: a sweep of no points, as a range or choice in it is empty; give it values")
    fixed, points = swept
    return Swept(tuple(arguments), tuple(SweptPoint(point, load([*fixed, *point])) for point in points), ray)


def sweep(swept: Swept, at: Artifacts = SWEEP, console: Console = PLAIN, *, keep: bool = False) -> int:
    """Write `points/KEY/` for each point, then `sweep.html`, `sweep.json` and `sweep.md`."""
    command = command_of(swept, keep)
    builder = PointBuilder(at.root, keep, merge)
    plan, progress = (build_here if swept.ray is None else spread)(swept, builder, command, console)
    facts: dict[str, object] = {"points": len(plan.points), "built": len(progress.built)}
    if busy := [point.label for point in progress.busy]:
        line = f"{len(busy)} of {len(plan.points)} points are being built by another run, which will write the sheet"
        console.done("sweep", line, facts=facts | {"busy": busy})
        return 0
    sheet = sheet_of(plan, progress.refused, builder, command)
    with suppress(Busy):  # the other process that has ended just now writes the same
        write_sheet(sheet, at.root)
    wrong = wrong_points(sheet)
    for label, sentence in wrong.items():
        console.wrong("sweep", f"{label}: {sentence}")
    best = sheet.recommendation
    page = at.root / "sweep.html"
    facts |= {"wrong": wrong, "recommended": best.label, "scale": best.scale, "reason": best.reason, "sheet": str(page)}
    first = f"{len(plan.points)} points, {len(progress.built)} built now, {len(progress.refused)} refused"
    console.done("sweep", first, f"recommended {best.label or 'none'}: {best.reason}", f"see {page}", facts=facts)
    return 1 if wrong else 0


def command_of(swept: Swept, keep: bool) -> str:
    """The command that starts the same sweep again."""
    address = [] if swept.ray is None else ["--ray"] if swept.ray == AUTO else ["--ray", swept.ray]
    return shlex.join(["python", "-m", "stages.sweep", *swept.arguments, *address, *(["--keep"] if keep else [])])


def build_here(swept: Swept, builder: PointBuilder, command: str, console: Console) -> tuple[SweepPlan, SweepProgress]:
    """Plan the points and build them in this process."""
    plan = plan_sweep(swept.points, builder.folder, keep=builder.keep)
    console.will("sweep", str(plan))
    return plan, build_points(plan, builder, command, console)


def spread(swept: Swept, builder: PointBuilder, command: str, console: Console) -> tuple[SweepPlan, SweepProgress]:
    """Build the points on the nodes of a cluster; an interrupted sweep says how to go on.

    Raises:
        BadConfig: the merged checkpoints are to be kept.
    """
    if builder.keep:
        raise BadConfig(
            "--keep and --ray: nodes keep no merged checkpoint; build the point that you want without --ray"
        )
    package = Package.of((lora_fuse, stages), project_files(point.recipe for point in swept.points))
    with connected(swept.ray or AUTO, package) as fleet:
        plan = SpreadSweep.of(swept.points, builder.folder)
        console.will("sweep", f"{len(plan.jobs(builder.merge))} points for {fleet}")
        try:
            return plan.run(fleet, builder.merge, lambda label, words: console.will("sweep", f"{label}: {words}"))
        except KeyboardInterrupt:
            console.wrong("sweep", f"the points that are here stay, no job is left; go on with the rest: {command}")
            raise


def build_points(plan: SweepPlan, builder: PointBuilder, command: str, console: Console) -> SweepProgress:
    """Build what is missing; an interrupted sweep says how to go on."""
    planned = {planned.point: planned for planned in plan.points}
    try:
        return run(
            list(planned),
            lambda point: builder.build(planned[point]),
            inputs={point: made.inputs for point, made in planned.items()},
            keep=builder.keep,
            tell=lambda point, result: console.will("sweep", f"{plan.number(point)}, {point.label}: {result}"),
        )
    except KeyboardInterrupt:
        done = sum(point.is_done(keep=builder.keep) for point in planned)
        console.wrong("sweep", f"{done} of {len(planned)} points are done and stay; go on with the rest: {command}")
        raise


if __name__ == "__main__":
    run_stage(sweep, "keep", read=expand, at=SWEEP, writes=False, pages=SHEET)  # several processes may share one
