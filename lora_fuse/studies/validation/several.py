"""Several versions of a LoRA, judged one by one here or on the nodes of a fleet: a report for each, a table of all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_fuse.errors import LoraFuseError
from lora_fuse.fleet import Demands, Fleet, Job, archive
from lora_fuse.machine import Console, files, text
from lora_fuse.recipe import Recipe, paths
from lora_fuse.studies.validation.validation import VALIDATION, Validation

VERSIONS = VALIDATION / "versions"
REFUSED = "refused"
WORST = (1, 2, 4, 0)  # exit codes: broken, refused, to be looked at, the same


@dataclass(frozen=True, slots=True)
class JudgedVersion:
    """One version of several: its name on the command line, its exit code and verdict, and what a report says of it.

    `page` is None where it was refused; `facts` are those of `validation.json`.
    """

    lora: str
    code: int
    verdict: str
    reason: str
    page: Path | None
    facts: dict[str, Any]


def folder_of(lora: str) -> Path:
    """The folder of the report of a version: readable, and with eight digits of a hash of all of its name."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", lora.removesuffix(".safetensors")).strip("-")
    return VERSIONS / f"{readable[-60:]}-{hashlib.sha256(os.fsencode(lora)).hexdigest()[:8]}"


def judge_here(validation: Validation) -> JudgedVersion:
    """Judge one version in this process, its pages in its folder; a refusal is its result."""
    lora = str(validation.request.lora)
    try:
        report, _, facts = validation.run(Console(quiet=True))
    except LoraFuseError as error:
        return _refused(lora, error)
    page = validation.folder / "validation.html"
    return JudgedVersion(lora, report.exit_code, report.verdict, report.judgement.reason, page, facts)


def _refused(lora: str, error: LoraFuseError) -> JudgedVersion:
    return JudgedVersion(lora, 2, REFUSED, str(error), None, {"lora": lora, "outcome": REFUSED, "reason": str(error)})


def judge_there(validation: Validation) -> tuple[JudgedVersion, bytes | None]:
    """Judge one version on a node, in the folder of a job; returns its pages too."""
    judged = judge_here(validation)
    if judged.page is None:
        return judged, None
    return judged, archive.pack(validation.folder, lambda name: not name.startswith("build/"))


def judge_on(fleet: Fleet, validations: Sequence[Validation]) -> Iterator[JudgedVersion]:
    """Judge versions on nodes, and yield each as it ends, its pages unpacked.

    Raises:
        BadConfig, BadSource: see `Demands.of`.
    """
    base, loras = paths.HERE.earlier_locks()
    demands = Demands(loras.values() if base is None else [base, *loras.values()])
    jobs = [_job(validation, demands) for validation in validations]
    for done in fleet.run(judge_there, jobs):
        lora = str(done.job.argument.request.lora)
        if done.error is not None:
            yield _refused(lora, done.error)
            continue
        judged, pages = done.result
        if pages is not None:
            archive.unpack(pages, folder_of(lora))
        yield judged


def _job(validation: Validation, demands: Demands) -> Job:
    """The job of a version: all but the version itself at the commits that branches mean now."""
    recipe, needs = demands.of(validation.recipe)
    tree = validation.candidate.model_dump()
    tree["base"] = recipe.base.model_dump()
    tree["loras"] |= {name: lora.model_dump() for name, lora in recipe.loras.items() if name != validation.name}
    pinned = replace(validation, recipe=recipe, candidate=Recipe.parse(tree, "the candidate at its commits"))
    return Job(str(validation.request.lora), pinned, needs, recipe.base.repo_id)


def write_table(judged: Sequence[JudgedVersion], command: Callable[[], str]) -> int:
    """Write `versions.md` and `versions.json`; the exit code of all is that of the worst."""
    rows: list[list[object]] = [["version", "verdict", "reason", "page"]]
    for one in judged:
        page = "" if one.page is None else one.page.relative_to(VALIDATION).as_posix()
        rows.append([one.lora, one.verdict, one.reason, page])
    table = "\n".join([f"# {len(judged)} versions", "", text.markdown_table(rows), "", text.code(command()), ""])
    facts = [{"version": one.lora, "exit_code": one.code, "verdict": one.verdict, **one.facts} for one in judged]
    files.replace_text(VALIDATION / "versions.md", table)
    files.replace_text(VALIDATION / "versions.json", json.dumps(facts, indent=2) + "\n")
    return next(code for code in WORST if any(one.code == code for one in judged))
