"""The report of a validation for a pull request, for a browser, for a program: the verdict first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lora_fuse.machine import text
from lora_fuse.pictures import encode, metrics, pages, pairs, picture
from lora_fuse.regression import verdicts
from lora_fuse.studies.validation.file_comparison import ALIKE, ONE_TRAINING, FileComparison, FileFacts
from lora_fuse.studies.validation.outcome import Judgement, Outcome
from lora_fuse.studies.validation.sides import MeasuredCase

THUMBNAIL = 256  # pixels of the longer side
GAP = 4  # pixels between two thumbnails
SHOWN = ("psnr_db", "flip", "ssim", "latents_l2")
EXIT_CODES = {Outcome.SAME: 0, Outcome.CHANGED: 4, Outcome.BROKEN: 1}
WORDS = {
    Outcome.SAME: "same pictures as the current version",
    Outcome.CHANGED: "changed as expected, needs a reviewer",
    Outcome.BROKEN: "broken",
}


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """A judged version, and the evidence."""

    recipe: str  # its name
    base: str  # the base's name for a person
    lora: str | None  # the recipe's name for the LoRA, None if the whole recipe is judged
    scale: tuple[float, float | None]  # the scale that was applied, the current one's beside it
    judgement: Judgement  # outcome, reason and answers
    new: FileFacts  # the file
    current: FileFacts | None  # the file in use, None if there is none
    files: FileComparison | None  # the comparison of the two
    environment: str  # the machine's key
    next_step: str  # the next thing to do, one line
    command: str  # the command that makes this page again
    cases: tuple[MeasuredCase, ...] = ()  # pictures and measurements; empty if the file could not be fused

    @property
    def verdict(self) -> str:
        """The outcome in words, with its cause."""
        words = WORDS[self.judgement.outcome]
        return words if self.judgement.cause is None else f"{words}: {self.judgement.cause}"

    @property
    def exit_code(self) -> int:
        """0 the same, 4 a person has to look, 1 broken."""
        return EXIT_CODES[self.judgement.outcome]


def _cells(case: MeasuredCase) -> dict[str, str]:
    """The texts of a case by column: distances to the current version, the floor and the golden, and the effect."""
    evidence = case.evidence
    acts = evidence.effect
    new = case.sides.pair.merged
    current = case.sides.current
    beside = verdicts.compare(new, current) if current is not None and current.size == new.size else None
    return {
        **{f"{metrics.METRICS[name].title} to current": _metric(beside, name) for name in SHOWN},
        "merged to unfused, over the floor": _number(case.result.over_floor, ".2f", " x"),
        "moved by the LoRA, over the floor": _times(evidence.moved, evidence.floor),
        "alignment": "-" if acts is None else f"{acts.alignment:.2f}",
        "strength": "-" if acts is None else f"{acts.strength:.2f}",
        "gain": _number(evidence.gain, ".2f"),
        "current gain": _number(evidence.current_gain, ".2f"),
        "PSNR to golden": _metric(case.result.vs_golden, "psnr_db"),
        "noise": f"{evidence.noise:.2f}",
        "comb": f"{evidence.comb_db:.1f} dB",
    }


def _metric(compared: verdicts.Comparison | None, name: str) -> str:
    return "-" if compared is None else metrics.METRICS[name].text(compared.values[name])


def _number(value: float | None, digits: str, unit: str = "") -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:{digits}}{unit}"


def _times(value: float, floor: float) -> str:
    return f"{value / floor:,.0f} x" if value >= 10 * floor else f"{value / floor:.2f} x"


def validation_md(validation: ValidationReport, thumbnails: Mapping[str, str]) -> str:
    """The page for a pull request, in GitHub's Markdown; `thumbnails` are paths of strips of pictures, by case."""
    table = {case.sides.name: _cells(case) for case in validation.cases}
    return pages.render_page(
        "lora_fuse.studies.validation",
        "validation.md.j2",
        v=validation,
        table=table,
        columns=next(iter(table.values()), {}),
        thumbnails=thumbnails,
    )


def validation_html(validation: ValidationReport) -> str:
    """The page for a browser: current, new and unfused side by side, a slider, what changed."""
    return pages.render_page(
        "lora_fuse.studies.validation",
        "validation.html.j2",
        v=validation,
        cases=[_shown(case) for case in validation.cases],
        limits=(ALIKE, ONE_TRAINING),
    )


def _shown(measured: MeasuredCase) -> dict[str, Any]:
    """A case's facts and pictures for the page."""
    sides = measured.sides
    case = sides.pair.case
    new = sides.pair.merged
    current = sides.current
    pictures = {
        "current": current,
        "new": new,
        "unfused": sides.pair.unfused,
        "plain": sides.plain,
        "teacher": sides.teacher,
    }
    heat = _heat(new, current)
    return {
        "name": case.name,
        "prompt": case.prompt,
        "seed": case.seed,
        "size": new.size,
        "inputs": [encode.encoded(pairs.open_picture(path, case)) for path in case.images],
        "cells": _cells(measured),
        **{name: None if shown is None else encode.encoded(shown) for name, shown in pictures.items()},
        "heat": None if heat is None else encode.encoded_map(heat),
    }


def strip(measured: MeasuredCase) -> picture.Levels:
    """Input, current, new and their difference side by side, small: a thumbnail for a page that takes no data."""
    case = measured.sides.pair.case
    new = measured.sides.pair.merged
    current = measured.sides.current
    shown = [pairs.open_picture(path, case) for path in case.images[:1]]
    shown += [new] if current is None else [current, new]
    heat = _heat(new, current)
    every = [each.levels for each in shown] + ([] if heat is None else [heat])
    small = [encode.thumbnail(levels, THUMBNAIL) for levels in every]
    height = max(len(levels) for levels in small)
    # White below the lower ones, and 4 columns of white after all but the last.
    padded = [np.pad(levels, ((0, height - len(levels)), (0, GAP), (0, 0)), constant_values=255) for levels in small]
    return np.concatenate(padded, axis=1)[:, :-GAP]


def _heat(new: picture.Picture, current: picture.Picture | None) -> picture.Levels | None:
    """Their difference; None for pictures that have none."""
    if current is None or current.size != new.size:
        return None
    return metrics.heat_map(new.levels, current.levels, encode.LARGE)


def report_facts(validation: ValidationReport) -> dict[str, Any]:
    """The same for a program: `validation.json`."""
    judgement = validation.judgement
    return {
        "recipe": validation.recipe,
        "outcome": str(judgement.outcome),
        "cause": None if judgement.cause is None else str(judgement.cause),
        "reason": judgement.reason,
        "exit_code": validation.exit_code,
        "next": validation.next_step,
        "lora": validation.new.label,
        "sha256": validation.new.sha256,
        "current": None if validation.current is None else validation.current.label,
        "current_sha256": None if validation.current is None else validation.current.sha256,
        "scale": validation.scale[0],
        "environment": validation.environment,
        "findings": [asdict(answer) for answer in judgement.findings],
        "files": None if validation.files is None else _file_facts(validation.files),
        "cases": {case.sides.name: _finite(asdict(case.evidence)) for case in validation.cases},
    }


def _file_facts(files: FileComparison) -> dict[str, Any]:
    """The comparison of two files: their relation, and by block the cosine and what each is of the weights."""
    return {
        "kinship": None if files.kinship is None else files.kinship.name.lower(),
        "cosine": files.cosine,
        "ratio": files.ratio,
        "both": files.both,
        "only_new": len(files.only_new),
        "only_current": len(files.only_current),
        "blocks": [asdict(block) for block in files.blocks],
    }


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has neither infinity nor NaN."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def junit_xml(validation: ValidationReport) -> str:
    """A test for each question, as every CI shows them: skipped if a person has to look, failed by what is broken."""
    from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

    recipe = text.xml(validation.recipe)
    suite = TestSuite(f"validate {recipe}")
    suite.add_property("lora", text.xml(validation.new.label))
    suite.add_property("sha256", text.xml(validation.new.sha256))
    suite.add_property("verdict", text.xml(validation.verdict))
    for answer in validation.judgement.findings:
        case = TestCase(text.xml(answer.question), f"lora_fuse.validation.{recipe}")
        if not answer.holds:
            failure = Failure(text.xml(answer.sentence or answer.measured), str(answer.cause))
            failure.text = text.xml(f"measured {answer.measured}, limit {answer.limit}")
            case.result = [failure]
        suite.add_testcase(case)
    if validation.judgement.outcome is Outcome.CHANGED:
        look = TestCase("Has a person looked at the new pictures?", f"lora_fuse.validation.{recipe}")
        look.result = [Skipped(text.xml(validation.judgement.reason))]
        suite.add_testcase(look)
    xml = JUnitXml("lora-fuse")
    xml.add_testsuite(suite)
    return str(xml.tostring(), "utf-8")  # type: ignore[no-untyped-call]
