"""A validation from the request to the written pages: fetch, fuse, verify, render, judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_fuse import hub
from lora_fuse.errors import BadLora, CheckFailed, FactorMismatch, Rerun, ShapeMismatch, UnmatchedTargets, WrongPrefix
from lora_fuse.fusion import Plan, plan_of
from lora_fuse.lora import open_lora
from lora_fuse.machine import Console, file_state, staging
from lora_fuse.pictures import Case, encode, environment, pairs, render_progress
from lora_fuse.recipe import Artifacts, Lock, Recipe, hf_cache, paths
from lora_fuse.regression import goldens, verdicts
from lora_fuse.studies.validation.file_comparison import FileFacts, compare_files, facts_of
from lora_fuse.studies.validation.outcome import Cause, Judgement, Outcome
from lora_fuse.studies.validation.questions import judge, refused
from lora_fuse.studies.validation.sides import Versions, measure, render_sides
from lora_fuse.studies.validation.validation_report import (
    ValidationReport,
    junit_xml,
    report_facts,
    strip,
    validation_html,
    validation_md,
)
from lora_fuse.studies.validation.versions import (
    Version,
    approved_version,
    candidate,
    lock_loras,
    misfits,
    replaced,
)

VALIDATION = paths.ROOT / "validation"
PAGES = ("validation.md", "validation.html", "validation.json", "junit.xml")
THUMBNAILS = "thumbnails"
SEVERAL = ("versions", "versions.md", "versions.json")  # a folder for each of several, and the tables of them all
ANSWER = tuple(VALIDATION / name for name in (*PAGES, THUMBNAILS, *SEVERAL))  # all that validations leave


@dataclass(frozen=True, slots=True)
class Request:
    """A request on the command line, and the command that repeats it; `overrides` as of any stage."""

    lora: str | None
    name: str | None
    scale: float | None
    keep: bool
    overrides: tuple[str, ...]
    command: str


@dataclass(frozen=True, slots=True)
class Validation:
    """The judgement of a LoRA: the recipe as it is, and as a candidate with the new LoRA."""

    request: Request
    recipe: Recipe
    candidate: Recipe
    name: str | None  # of the LoRA that is judged; None for all of the recipe
    merge: paths.Merge
    command: Callable[[Rerun], str]  # of a step, as it is typed
    folder: Path = VALIDATION  # of its pages and of its build

    @staticmethod
    def of(
        request: Request,
        recipe: Recipe,
        merge: paths.Merge,
        command: Callable[[Rerun], str],
        folder: Path = VALIDATION,
    ) -> Validation:
        """Put the two together, before anything is fetched.

        Raises:
            BadConfig: the LoRA, its name or the scale cannot be used.
        """
        new = candidate(recipe, request.lora, request.name, request.scale)
        names = sorted(recipe.loras)
        alone = names[0] if len(names) == 1 else None
        name = alone if request.lora is None else replaced(recipe, request.lora, request.name)
        return Validation(request, recipe, new, name, merge, command, folder)

    @property
    def recipes(self) -> tuple[Recipe, Recipe]:
        """The recipe as it is, and with the new LoRA."""
        return self.recipe, self.candidate

    @property
    def build(self) -> Artifacts:
        """The merge that is judged."""
        return Artifacts(self.folder / "build")

    @property
    def intent(self) -> str:
        """The work to come, in a sentence."""
        lora = self.request.lora or "what the recipe names"
        sides = f"{len(self.recipe.regress.cases)} cases from {6 if self.teacher else 5} sides each"
        scale = self.candidate.fuse.scale
        return f"{lora} in recipe {self.recipe.name} at scale {scale:g}, built in {self.build.root}; {sides}"

    @property
    def teacher(self) -> bool:
        """True if the base alone is rendered too: for a LoRA that saves steps."""
        saves = self.recipe.sampling.steps < self.recipe.base.sampling.steps
        return self.recipe.validation.teacher and saves

    def run(self, console: Console) -> tuple[ValidationReport, list[str], dict[str, Any]]:
        """Judge, and write the pages; returns the report, and what `write` does."""
        with staging.exclusive(self.folder):
            self.check()
            console.will("validate", self.intent)
            regress = self.recipe.regress
            environment.make_deterministic(regress.threads)
            try:
                here = environment.environment(regress.placement, regress.dtype, compiled=regress.compile)
                report = self.judge(here, console)
            finally:
                if not self.request.keep:
                    staging.remove(self.build.root)
            return report, *self.write(report)

    def check(self) -> None:
        """Refuse what cannot end well, and remove the pages of the last validation, which are not this one's."""
        pairs.check_cases(Case.of(self.recipe), pairs.Setup.of(self.recipe))
        for path in ANSWER:
            staging.remove(self.folder / path.name)

    def judge(self, here: environment.Environment, console: Console) -> ValidationReport:
        """Fetch, fuse, verify, render and decide."""
        before, _ = paths.HERE.earlier_locks()  # the commit of the current build, where that has one
        seen = file_state.SeenFiles(paths.SEEN)
        base = hub.lock_base(self.recipe.base, previous=before, transfer=self.recipe.download, note=seen.note)
        seen.write()
        approved = goldens.Goldens.of(self.recipe, base).for_run(here.key, list(self.recipe.regress.cases))
        new = lock_loras(self.candidate, fresh=self.name if self.request.lora else None)
        current = self._current(approved)
        name = self.name or next(iter(sorted(new.locks)))
        report = partial(self._report, base, new, current, name, str(here.key))
        try:
            plan = self._build(base, new, console)
        except BadLora as error:
            fits_not = isinstance(error, UnmatchedTargets | ShapeMismatch)
            of_the_file = isinstance(error, WrongPrefix | FactorMismatch)
            cause = Cause.BASE if fits_not and not of_the_file else Cause.UNUSABLE
            return report(refused(cause, str(error)))
        versions = self._versions(plan, new, current)
        cases = Case.of(self.recipe)
        setup = pairs.Setup.of(self.recipe, baseline=self.teacher)
        beside = [setup.sampling] * (1 if current is None else 2)  # without the LoRA, and with the current one
        task = render_progress.Task(f"validate {self.recipe.name} {here.key}", len(cases), (*setup.sides, *beside))
        console.will("validate", f"{task}, on {here.key}{task.estimate}")
        locks = [base, *new.locks.values(), *(current.locks.values() if current else ())]
        read = paths.held(locks, [image for case in cases for image in case.images])
        with read, render_progress.watching(task) as watch:
            sides = render_sides(self.build.merged, versions, cases, setup, watch)
        measured = measure(sides, approved, verdicts.Rules.of(self.recipe))
        files = None
        if current is not None and name in current.locks and self.name is not None:
            used, given = (next(lora for lora in one.inputs if lora.name == name) for one in (current, new))
            files = compare_files(used, given, hf_cache.locate(base), self.candidate.fuse.selection.leave_out)
        warnings = misfits(base, new, current, name)
        wanted = new.scales[name] / current.scales[name] if current and current.scales.get(name) else 1.0
        judgement = judge([case.evidence for case in measured], files, warnings, self.recipe, wanted)
        return replace(report(judgement), files=files, cases=tuple(measured))

    def _versions(self, plan: Plan, new: Version, current: Version | None) -> Versions:
        """The plans of all sides: of the new version, of the LoRAs beside it alone, of the current version."""
        beside = [lora for lora in new.inputs if self.name not in (None, lora.name)]
        selection = self.candidate.fuse.selection
        return Versions(
            plan,
            plan.with_loras(beside, selection) if beside else None,
            plan.with_loras(current.inputs, selection) if current else None,
        )

    def _current(self, approved: Mapping[str, list[goldens.Approved]]) -> Version | None:
        """The LoRAs in use: the recipe's, or where these are judged themselves, the approved ones."""
        if self.request.lora is not None or self.request.scale is not None:
            return lock_loras(self.recipe)
        return approved_version(self.recipe, approved)

    def _build(self, base: Lock, new: Version, console: Console) -> Plan:
        """Fuse and verify beside the current build; a wrong merge is a fault of the tool or the machine."""
        plan = plan_of(base, new.locks, self.candidate)
        self.merge(self.candidate, self.build, base, new.locks)
        verified = paths.read_object(self.build.verify, "verify")
        if not verified["passed"]:
            raise CheckFailed(f"the merged weights are wrong: {verified['problems'][0]}; see {self.build.verify}")
        console.will("validate", f"fused and verified: {verified['targets']} weights")
        return plan

    def _report(
        self, base: Lock, new: Version, current: Version | None, name: str, where: str, judgement: Judgement
    ) -> ValidationReport:
        before = current if current is not None and name in current.locks else None
        return ValidationReport(
            recipe=self.recipe.name,
            base=base.label,
            lora=name if self.name else None,
            scale=(new.scales[name], None if before is None else before.scales[name]),
            judgement=judgement,
            new=_facts(new, name),
            current=None if before is None else _facts(before, name),
            files=None,
            environment=where,
            next_step=self._next(judgement, new, name),
            command=self.request.command,
        )

    def _next(self, judgement: Judgement, new: Version, name: str) -> str:
        match judgement.outcome:
            case Outcome.SAME:
                return "nothing to do: either version gives these pictures"
            case Outcome.BROKEN:
                return "keep the current version; the page shows what is wrong"
        build = self.command(Rerun("build"))
        approve = self.command(Rerun("approve"))
        if self.request.lora is None and self.request.scale is None:
            return f"{build}, then {approve}"
        lock = new.locks[name]
        place = f"repo_id: {lock.repo_id}, revision: {lock.revision}" if lock.repo_id else f"path: {lock.path}"
        scale = "" if self.request.scale is None else f" and fuse.scale: {self.request.scale:g}"
        return (
            f"look at the page; if it is good, put {place}, filename: {lock.lora_name} into the recipe's loras.{name}"
            f"{scale}, then: {self.command(Rerun('config'))}; {build}; {approve}"
        )

    def write(self, report: ValidationReport) -> tuple[list[str], dict[str, Any]]:
        """Write the pages; return the last lines for the terminal, and the facts for ``--json``."""
        thumbnails = {case.sides.name: f"{THUMBNAILS}/{case.sides.name}.png" for case in report.cases}
        facts = report_facts(report)
        texts = (
            validation_md(report, thumbnails),
            validation_html(report),
            json.dumps(facts, indent=2) + "\n",
            junit_xml(report),
        )
        with staging.whole(self.folder, stays=[self.build.root.name]) as folder:
            (folder / THUMBNAILS).mkdir()
            for case in report.cases:
                (folder / thumbnails[case.sides.name]).write_bytes(encode.png(strip(case)))
            for page, text in zip(PAGES, texts, strict=True):
                (folder / page).write_text(text, encoding="utf-8")
        lines = [f"{report.verdict}: {report.judgement.reason}"]
        lines += [] if report.files is None else [f"to the current file: {report.files.kin}"]
        lines += [f"see {self.folder / 'validation.html'}"]
        return [*lines, f"next: {report.next_step}"], facts


def _facts(version: Version, name: str) -> FileFacts:
    try:
        return facts_of(open_lora(version.path(name)), version.label(name))
    except BadLora as error:
        sha256 = next(iter(version.locks[name].files.values())).sha256
        return FileFacts(version.label(name), sha256, (f"cannot be read: {error}",))
