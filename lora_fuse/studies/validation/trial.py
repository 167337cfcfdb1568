"""A validation: what was asked, how it is built and judged, what is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lora_fuse.errors import BadLora, CheckFailed, Rerun, ShapeMismatch, UnmatchedTargets
from lora_fuse.fusion import Plan, make_plan, plan_of
from lora_fuse.lora import open_lora
from lora_fuse.machine import Console, files, staging
from lora_fuse.models import COMPONENT
from lora_fuse.pictures import Case, encode, environment, pairs, render_progress
from lora_fuse.recipe import Artifacts, Lock, Recipe, hf_cache, paths
from lora_fuse.regression import goldens, verdicts
from lora_fuse.studies.validation.evidence import Cause, Judgement, Outcome, bounds_of
from lora_fuse.studies.validation.files import FileFacts, compare_files, facts_of
from lora_fuse.studies.validation.judgement import judge, refused
from lora_fuse.studies.validation.junit import junit_xml
from lora_fuse.studies.validation.report import Validation, strip, summary, validation_html, validation_md
from lora_fuse.studies.validation.report import facts as validation_facts
from lora_fuse.studies.validation.sides import Versions, measure, render_sides, task_of
from lora_fuse.studies.validation.versions import (
    Version,
    approved_version,
    candidate,
    lock_base,
    lock_loras,
    misfits,
    replaced,
)

VALIDATION = paths.ROOT / "validation"
BUILD = Artifacts(VALIDATION / "build")
PAGES = ("validation.md", "validation.html", "validation.json", "junit.xml")
THUMBNAILS = "thumbnails"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for on the command line, and the command that asks for it; `overrides` as of any stage."""

    lora: str | None
    name: str | None
    scale: float | None
    keep: bool
    overrides: tuple[str, ...]
    command: str


@dataclass(frozen=True, slots=True)
class Trial:
    """A recipe, and what it is with the new LoRA."""

    request: Request
    params: Recipe
    candidate: Recipe
    name: str | None  # of the LoRA that is judged; None for all of the recipe
    merge: paths.Merge
    command: Callable[[Rerun], str]  # of a step, as it is typed

    @staticmethod
    def of(request: Request, params: Recipe, merge: paths.Merge, command: Callable[[Rerun], str]) -> Trial:
        """Put the two together, before anything is fetched.

        Raises:
            BadConfig: the LoRA, its name or the scale cannot be used.
        """
        new = candidate(params, request.lora, request.name, request.scale)
        names = sorted(params.loras)
        alone = names[0] if len(names) == 1 else None
        name = alone if request.lora is None else replaced(params, request.lora, request.name)
        return Trial(request, params, new, name, merge, command)

    @property
    def intent(self) -> str:
        """What is about to be done, in a sentence."""
        cases, what = len(self.params.regress.cases), self.request.lora or "what the recipe names"
        return (
            f"{what} in recipe {self.params.name} at scale {self.candidate.fuse.scale:g}, built in {BUILD.root}; "
            f"{cases} cases from {6 if self.teacher else 5} sides each"
        )

    @property
    def teacher(self) -> bool:
        """Whether the base alone is rendered too: if the LoRA saves steps."""
        saves = self.params.sampling.steps < self.params.base.sampling.steps
        return self.params.validation.teacher and saves

    def check(self) -> None:
        """Refuse what cannot end well, and remove the pages of the last validation, which are not this one's."""
        pairs.check_cases(Case.of(self.params), pairs.Setup.of(self.params))
        for name in PAGES:
            (VALIDATION / name).unlink(missing_ok=True)
        staging.remove(VALIDATION / THUMBNAILS)

    def judge(self, here: environment.Environment, console: Console) -> Validation:
        """Fetch, fuse, verify, render and decide."""
        base = lock_base(self.params)
        approved = goldens.Goldens.of(self.params, base).for_run(here.key, list(self.params.regress.cases))
        new = lock_loras(self.candidate, fresh=self.name if self.request.lora else None)
        current = self._current(approved)
        name = self.name or next(iter(sorted(new.locks)))
        said = partial(self._validation, base, new, current, name, str(here.key))
        try:
            plan = self._build(base, new, console)
        except (UnmatchedTargets, ShapeMismatch) as error:
            return said(refused(Cause.BASE, str(error)))
        except BadLora as error:
            return said(refused(Cause.UNUSABLE, str(error)))
        checkpoint = plan.checkpoint
        others = Version({key: lock for key, lock in new.locks.items() if key != self.name and self.name}, new.scales)
        selection = self.candidate.fuse.selection
        versions = Versions(
            plan,
            make_plan(checkpoint, others.inputs, selection) if others.locks else None,
            None if current is None else make_plan(checkpoint, current.inputs, selection),
        )
        cases = Case.of(self.params)
        setup = pairs.Setup.of(self.params, baseline=self.teacher)
        task = task_of(f"validate {self.params.name} {here.key}", len(cases), setup, current=current is not None)
        console.will("validate", f"{task}, on {here.key}{task.estimate}")
        with render_progress.watching(task) as watch:
            sides = render_sides(BUILD.merged, versions, cases, setup, watch)
        measured = measure(sides, goldens.pictures_of(approved), verdicts.Rules.of(self.params))
        files = None
        if current is not None and name in current.locks and self.name is not None:
            files = compare_files(current.path(name), new.path(name), hf_cache.locate(base), COMPONENT)
        warnings = misfits(base, new, current, name)
        wanted = new.scales[name] / current.scales[name] if current and current.scales.get(name) else 1.0
        evidence = [one.evidence for one in measured]
        judgement = judge(evidence, files, warnings, bounds_of(self.params), wanted)
        return replace(said(judgement), files=files, cases=tuple(measured))

    def _current(self, approved: Mapping[str, list[goldens.Approved]]) -> Version | None:
        """What is in use: the recipe's LoRAs, or where these are judged themselves, what was approved."""
        if self.request.lora is not None or self.request.scale is not None:
            return lock_loras(self.params)
        return approved_version(self.params, approved)

    def _build(self, base: Lock, new: Version, console: Console) -> Plan:
        """Fuse and verify beside the current build.

        Raises:
            BadLora: the file cannot be used, or does not fit.
            CheckFailed: the merge is wrong, which is a fault of the tool or the machine.
        """
        plan = plan_of(base, new.locks, self.candidate)
        self.merge(self.candidate, BUILD, base, new.locks)
        found = paths.read_object(BUILD.verify, "verify")
        if not found["passed"]:
            raise CheckFailed(f"the merged weights are wrong: {found['problems'][0]}; see {BUILD.verify}")
        console.will("validate", f"fused and verified: {found['targets']} weights")
        return plan

    def _validation(
        self, base: Lock, new: Version, current: Version | None, name: str, where: str, judgement: Judgement
    ) -> Validation:
        before = None
        if current is not None and name in current.locks:
            before = _facts(current, name)
        return Validation(
            recipe=self.params.name,
            base=base.label,
            lora=name if self.name else None,
            scale=(new.scales[name], None if before is None or current is None else current.scales[name]),
            judgement=judgement,
            new=_facts(new, name),
            current=before,
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
        build, approve = self.command(Rerun("build")), self.command(Rerun("approve"))
        if self.request.lora is None and self.request.scale is None:
            return f"{build}, then {approve}"
        lock = new.locks[name]
        place = f"repo_id: {lock.repo_id}, revision: {lock.revision}" if lock.repo_id else f"path: {lock.path}"
        return (
            f"look at the page; if it is good, put {place}, filename: {lock.lora_name} into the recipe's loras.{name}"
            f"{self._scale}, "
            f"then: {self.command(Rerun('config'))}; {build}; {approve}"
        )

    @property
    def _scale(self) -> str:
        """The scale that goes into the recipe as well, as a part of a sentence."""
        return "" if self.request.scale is None else f" and fuse.scale: {self.request.scale:g}"

    def write(self, validation: Validation) -> tuple[list[str], dict[str, Any]]:
        """Write the pages; what the terminal says at the end."""
        paths = {}
        for one in validation.cases:
            paths[one.sides.name] = f"{THUMBNAILS}/{one.sides.name}.png"
            (VALIDATION / THUMBNAILS).mkdir(parents=True, exist_ok=True)
            files.replace_bytes(VALIDATION / paths[one.sides.name], encode.png(strip(one)))
        facts = validation_facts(validation)
        texts = (
            validation_md(validation, paths),
            validation_html(validation),
            json.dumps(facts, indent=2) + "\n",
            junit_xml(validation),
        )
        for page, text in zip(PAGES, texts, strict=True):
            files.replace_text(VALIDATION / page, text)
        return summary(validation, [str(VALIDATION / "validation.html")]), facts


def _facts(version: Version, name: str) -> FileFacts:
    try:
        return facts_of(open_lora(version.path(name)), version.label(name))
    except BadLora as error:
        sha256 = next(iter(version.locks[name].files.values())).sha256
        return FileFacts(version.label(name), sha256, 0, (f"cannot be read: {error}",))
