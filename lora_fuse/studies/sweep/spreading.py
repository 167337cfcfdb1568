"""A sweep over the nodes of a fleet: each point is pinned, built and recorded on a node as it would be here.

The key of a point has everything that its pictures depend on, and it is worked out where they are made; so a point that
a node builds has the record that it has when it is built here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_fuse.errors import Refused
from lora_fuse.fleet import Demands, Done, Fleet, Job, Needs, archive, node
from lora_fuse.recipe import paths
from lora_fuse.studies.sweep.building import BASELINE, PointBuilder
from lora_fuse.studies.sweep.pins import SourceLocks
from lora_fuse.studies.sweep.planning import PlannedPoint, SweepPlan, SweptPoint, plan_sweep
from lora_fuse.studies.sweep.points import BASELINES, POINTS, Point, read_record
from lora_fuse.studies.sweep.running import SweepProgress, run

HERE = paths.ROOT / "sweep"  # on a node, below the folder of the job


@dataclass(frozen=True, slots=True)
class PointWork:
    """A point for a node; what the head has already, points and base pictures by folder name, is not sent again."""

    asked: SweptPoint
    merge: paths.Merge
    done: frozenset[str]
    baselines: frozenset[str]


@dataclass(frozen=True, slots=True)
class BuiltPoint:
    """A point from a node: its plan, its folder and the base's pictures as archives, None for what is there already."""

    planned: PlannedPoint
    words: str
    folder: bytes | None
    refused: str | None = None
    baselines: Mapping[str, bytes] = field(default_factory=dict)


def build_point(work: PointWork) -> BuiltPoint:
    """Build one point in the folder of a job; the base's own pictures stay on the node for its other points.

    Raises:
        Refused: the point cannot be tried here: no room, no GPU, or its base is not to be had.
    """
    HERE.mkdir(parents=True, exist_ok=True)
    shared = node.work_folder() / BASELINES
    shared.mkdir(parents=True, exist_ok=True)
    (HERE / BASELINES).symlink_to(shared)
    (planned,) = plan_sweep([work.asked], HERE, keep=False).points
    if planned.point.folder.name in work.done:
        return BuiltPoint(planned, "done already", None)
    words: list[str] = []
    builder = PointBuilder(HERE, keep=False, merge=work.merge)
    built = run(
        [planned.point],
        lambda _: builder.build(planned),
        inputs={planned.point: planned.inputs},
        keep=False,
        tell=lambda _, result: words.append(result),
    )
    made = {name: archive.pack(shared / name) for name in builder.baselines if name not in work.baselines}
    folder = archive.pack(planned.point.folder)
    return BuiltPoint(planned, words[0], folder, built.refused.get(planned.point), made)


@dataclass(frozen=True, slots=True)
class SpreadSweep:
    """A sweep to be spread over nodes: its points as they were asked for, at the commits that branches mean now."""

    asked: tuple[SweptPoint, ...]
    pinned: tuple[SweptPoint, ...]
    needs: tuple[Needs, ...]
    pins: SourceLocks
    folder: Path

    @classmethod
    def of(cls, swept: Sequence[SweptPoint], folder: Path) -> SpreadSweep:
        """Know commits and sizes, so that no node asks what a branch means; no file is fetched here.

        Raises:
            BadConfig, BadSource: see `Demands.of`.
        """
        base, loras = paths.HERE.earlier_locks()
        known = loras.values() if base is None else [base, *loras.values()]
        pins = SourceLocks(folder / "locks.json", known, swept[0].recipe.download)
        demands = Demands(pins.known)
        found = [demands.of(point.recipe) for point in swept]
        pinned = tuple(SweptPoint(point.overrides, recipe) for point, (recipe, _) in zip(swept, found, strict=True))
        return cls(tuple(swept), pinned, tuple(needs for _, needs in found), pins, folder)

    def jobs(self, merge: paths.Merge) -> list[Job]:
        """The jobs of the points, two that are the same once."""
        done = frozenset(path.name for path in (self.folder / POINTS).glob("*") if _is_done(path))
        baselines = frozenset(path.parent.name for path in (self.folder / BASELINES).glob(f"*/{BASELINE}"))
        found: dict[str, Job] = {}
        for point, needs in zip(self.pinned, self.needs, strict=True):
            work = PointWork(point, merge, done, baselines)
            found.setdefault(_name(point), Job(" ".join(point.overrides), work, needs, point.recipe.base.repo_id))
        return list(found.values())

    def run(
        self, fleet: Fleet, merge: paths.Merge, tell: Callable[[str, str], None]
    ) -> tuple[SweepPlan, SweepProgress]:
        """Build the points on the nodes, and put what each sends in its place as soon as it is there.

        Raises:
            Refused: some points could not be tried; the others are there, and the message says which and why.
        """
        progress = SweepProgress()
        planned: dict[str, PlannedPoint] = {}
        lost: list[Done] = []
        jobs = self.jobs(merge)
        for done in fleet.run(build_point, jobs):
            if done.error is None:
                planned[_name(done.job.argument.asked)] = self._take(done.result, progress)
                tell(done.job.label, f"{done.result.words} (on {done.host})")
            else:
                lost.append(done)
                tell(done.job.label, f"not built on {done.host}")
        if lost:
            raise Refused(
                f"{len(lost)} of {len(jobs)} points were not built, the first of them {lost[0].job.label} on "
                f"{lost[0].host}: {lost[0].error}; the others stay, and the same command goes on with the rest"
            )
        every = [
            replace(planned[_name(pinned)], asked=asked) for asked, pinned in zip(self.asked, self.pinned, strict=True)
        ]
        for one in every:
            self.pins.keep(one.asked.recipe.base, None, one.base)
            for name, lock in one.loras.items():
                self.pins.keep(one.asked.recipe.loras[name], one.asked.recipe.loras[name].filename, lock)
        self.pins.write()
        once = tuple({one.point.key: one for one in reversed(every)}.values())[::-1]
        return SweepPlan(once, (), 0, len(every) - len(once), keep=False), progress

    def _take(self, built: BuiltPoint, progress: SweepProgress) -> PlannedPoint:
        """Unpack a point and the base's pictures."""
        sent = built.planned.point
        point = replace(sent, folder=self.folder / POINTS / sent.folder.name)
        for name, content in built.baselines.items():
            place = self.folder / BASELINES / name
            if not (place / BASELINE).exists():
                archive.unpack(content, place)
        if built.folder is not None:
            archive.unpack(built.folder, point.folder)
        if built.refused is not None:
            progress.refused[point] = built.refused
        elif built.folder is not None:
            progress.built.append(point)
        return replace(built.planned, point=point)


def _name(point: SweptPoint) -> str:
    return point.recipe.model_dump_json()


def _is_done(folder: Path) -> bool:
    record = read_record(folder)
    return record is not None and Point("", record.key, folder).is_done()
