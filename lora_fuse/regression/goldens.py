"""Approved pictures: ``artifacts/golden/RECIPE/KEY/CASE.png``, each with a record of what it is a picture of, and why.

``CASE.png`` is the first of a case, ``CASE.2.png`` another one that was approved as well; ``CASE.json`` and so on are
their records, and `SHA256SUMS` the list of both, see `approved_list`. A picture without a record, a record without its
picture, one that is not the recorded one, and whatever is not as the list has it is refused: nothing is a golden that
nobody approved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_fuse.errors import BadGolden, BadSource, Rerun
from lora_fuse.machine import FileRecord, files
from lora_fuse.pictures import environment, metrics, picture
from lora_fuse.recipe import Lock, Recipe, paths, records
from lora_fuse.regression import approved_list
from lora_fuse.regression.approved_list import restoring
from lora_fuse.regression.candidates import SCHEMA, Candidate, Provenance, digest
from lora_fuse.regression.run_record import RunRecord
from lora_fuse.regression.verdicts import Golden

AGAIN = Rerun("regress", force=True)


@dataclass(frozen=True, slots=True)
class Approval:
    """Person, time (UTC, ISO 8601) and reason of an approval, and the sha256 of the goldens that it replaced."""

    by: str
    at: str
    reason: str
    replaces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GoldenRecord:
    """The record beside an approved picture; `floor` is the noise floor of its run and `clip`, see `Candidate`."""

    schema: int
    sha256: str
    floor: dict[str, float]
    approval: Approval
    provenance: Provenance
    clip: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Approved(Golden):
    """A golden with its record, and the path of that."""

    record: GoldenRecord
    path: Path


class Goldens:
    """The goldens of one recipe; `folder` has a folder for each key, and need not exist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @staticmethod
    def of(recipe: Recipe, base: Lock) -> Goldens:
        """Find a recipe's goldens.

        Raises:
            BadGolden: they were approved for another base than `base`, the one that is locked.
        """
        goldens = Goldens(paths.GOLDEN / recipe.name)
        goldens.refuse_other_base(str(base.repo_id or base.path), base.files)
        return goldens

    def records(self, key: environment.Key | str, case: str | None = None) -> Iterator[tuple[Path, GoldenRecord]]:
        """Every golden of a key, or of one of its cases: the picture's path and its record, checked.

        Raises:
            BadGolden: the list or a golden is missing, cannot be read, or they are not of each other.
        """
        folder = self._folder / str(key)
        yield from _all_checked(folder, approved_list.read_list(folder), case)

    def sums(self) -> dict[str, str]:
        """The sha256 of every picture and record of every key, by POSIX path.

        The lists beside them say the same: one that is written anew is no reason to render again.
        """
        folders = sorted(self._folder.glob("*/"))
        return {
            f"{folder.name}/{name}": sha256
            for folder in folders
            for name, sha256 in approved_list.sums_of(folder).items()
        }

    def bind(self, remark: str) -> list[Path]:
        """Write the list of every folder of goldens that has none, as they stand; returns the lists.

        Raises:
            BadGolden: see `records`; that folder has no list.
        """
        written = []
        for folder in sorted(path for path in self._folder.glob("*") if approved_list.goldens_in(path)):
            path = folder / approved_list.LIST
            if not path.exists():
                sums = approved_list.sums_of(folder)
                list(_all_checked(folder, sums, None))
                approved_list.write_list(folder, sums, remark)
                written.append(path)
        return written

    def refuse_other_base(self, base: str, files: Mapping[str, FileRecord]) -> None:
        """Refuse goldens that were approved for another base than this recipe has, whatever machine they are of.

        `base` is a repository or folder without its commit: a base may get a new version. The same files somewhere else
        are the same base.

        Raises:
            BadGolden: there is one.
        """
        for path in sorted(self._folder.glob("*/*.json")):
            made = _read_record(path).provenance
            then = made.base.partition("@")[0]
            if then != base and made.base_sha256 != digest(files):
                raise BadGolden(
                    f"the golden {path.with_suffix('.png')} was approved for the base {then}, and the recipe's is "
                    f"{base}; give the recipe a name of its own, or remove {self._folder}"
                )

    def for_run(self, key: environment.Key, cases: Iterable[str]) -> dict[str, list[Approved]]:
        """The pictures to compare a run with, by case: those of its key, or where a case has none, of the nearest.

        Raises:
            BadGolden: see `records`.
        """
        return {case: self._of_key(key, key, case) or self._of_nearest(key, case) for case in cases}

    def _of_key(self, key: environment.Key, run: environment.Key, case: str) -> list[Approved]:
        elsewhere = None if key == run else f"{key} ({'; '.join(key.differences(run))})"
        return list(self._approved(str(key), case, elsewhere))

    def _approved(self, key: str, case: str, elsewhere: str | None) -> Iterator[Approved]:
        for path, record in self.records(key, case):
            about = path.with_suffix(".json")
            yield Approved(
                _levels(path),
                name=path.name,
                elsewhere=elsewhere,
                floor=record.floor,
                clip=record.clip,
                record=record,
                path=about,
            )

    def of_case(self, case: str, key: str) -> Iterator[Approved]:
        """Every golden of a case, whatever environment it is of; those of `key`, the run's, come first.

        Raises:
            BadGolden: see `records`.
        """
        for folder in sorted(self._folder.glob("*/"), key=lambda folder: (folder.name != key, folder.name)):
            yield from self._approved(folder.name, case, None if folder.name == key else folder.name)

    def _of_nearest(self, run: environment.Key, case: str) -> list[Approved]:
        others = {
            path.parent.name: _read_record(path).provenance.environment.key
            for path in self._folder.glob("*/*.json")
            if path.stem.partition(".")[0] == case
        }
        nearest = run.nearest(others.values())
        return [] if nearest is None else self._of_key(nearest, run, case)

    def approve(
        self, picture: bytes, candidate: Candidate, run: RunRecord, approval: Approval, *, beside: bool = False
    ) -> Path:
        """Make a candidate, whose PNG file is `picture`, a golden of its key, and return the golden's path.

        What the approval replaces is filled in: the case's other goldens, which are removed unless it goes `beside`.

        Raises:
            BadGolden: the picture is not the candidate's, or see `records`.
        """
        check_picture(picture, candidate)
        case = candidate.provenance.case.name
        key = run.environment.key
        present = [(path, record) for path, record in self.records(key) if path.stem.partition(".")[0] == case]
        for path, record in present:
            if record.sha256 == candidate.sha256 and (beside or len(present) == 1):
                return path  # approved already, for a reason that stands
        taken = {path.stem for path, _ in present} if beside else set()
        numbered = (f"{case}.{number}" if number > 1 else case for number in range(1, len(taken) + 2))
        golden = self._folder / str(key) / f"{next(name for name in numbered if name not in taken)}.png"
        replaced = () if beside else tuple(record.sha256 for _, record in present)
        provenance = Provenance.of(candidate.provenance, run)
        approval = replace(approval, replaces=replaced)
        record = GoldenRecord(SCHEMA, candidate.sha256, candidate.floor, approval, provenance, candidate.clip)
        golden.parent.mkdir(parents=True, exist_ok=True)
        files.replace_bytes(golden, picture)
        files.replace_text(golden.with_suffix(".json"), records.to_json(record))
        for path, _ in [] if beside else present:
            if path != golden:
                path.unlink()
                path.with_suffix(".json").unlink()
        remark = f"approved by {approval.by}, {approval.at}: {approval.reason}"
        approved_list.write_list(golden.parent, approved_list.sums_of(golden.parent), remark)
        return golden


def check_picture(picture: bytes, candidate: Candidate) -> None:
    """Refuse a PNG file that is not the candidate's.

    Raises:
        BadGolden: it is not.
    """
    if hashlib.sha256(picture).hexdigest() != candidate.sha256:
        raise BadGolden(
            f"the picture of {candidate.provenance.case.name} is not the one that was judged; nothing was approved",
            rerun=AGAIN,
        )


def _read_record(path: Path) -> GoldenRecord:
    try:
        return records.read(GoldenRecord, path)
    except (OSError, BadSource) as error:
        what = str(error).removesuffix("; run its stage again")
        raise BadGolden(f"the record {path} cannot be read ({what})", rerun=restoring(path.parent)) from error


def _all_checked(folder: Path, listed: Mapping[str, str], case: str | None) -> Iterator[tuple[Path, GoldenRecord]]:
    for name in sorted({Path(name).stem for name in listed}):
        if case is None or name.partition(".")[0] == case:
            yield _checked(folder / f"{name}.png", folder / f"{name}.json", listed)


def _checked(picture: Path, record: Path, listed: Mapping[str, str]) -> tuple[Path, GoldenRecord]:
    if record.name not in listed:
        raise BadGolden(f"{picture} has no record {record.name}, so nobody approved it; remove it and approve a run")
    if picture.name not in listed:
        raise BadGolden(f"{record} has no picture {picture.name}; remove it and approve a run")
    approved_list.check_sum(record, listed)
    found = _read_record(record)
    approved_list.check_sum(picture, {picture.name: found.sha256})
    approved_list.check_sum(picture, listed)
    key = str(found.provenance.environment.key)
    case = found.provenance.case.name
    if (picture.parent.name, picture.stem.partition(".")[0]) != (key, case):
        raise BadGolden(f"the golden {picture} was approved as {key}/{case}; put it back, or approve a run")
    _check_floor(record, found.floor)
    return picture, found


def _check_floor(record: Path, floor: Mapping[str, float]) -> None:
    """Refuse a noise floor that no run can have measured: its numbers loosen what the picture is held to."""
    for name, value in floor.items():
        metric = metrics.EVERY.get(name)
        if metric is None:
            raise BadGolden(
                f"{record} has a noise floor of {name!r}, and the metrics are {', '.join(metrics.EVERY)}",
                rerun=restoring(record),
            )
        if not metric.can_be(value):
            raise BadGolden(
                f"{record} has a noise floor of {value:g} in {name}, and two pictures can have {metric.best:g} to "
                f"{metric.worst:g}",
                rerun=restoring(record),
            )


def _levels(path: Path) -> picture.Levels:
    try:
        return picture.read_levels(path)
    except OSError as error:
        raise BadGolden(f"the golden {path} is no picture ({error})", rerun=restoring(path)) from error
