"""What a validation came to, for a pull request, for a browser, for a program: the verdict first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lora_fuse.pictures import encode, metrics, pages, picture, render
from lora_fuse.regression import verdicts
from lora_fuse.studies.validation.evidence import Judgement, Outcome
from lora_fuse.studies.validation.files import FileComparison, FileFacts
from lora_fuse.studies.validation.sides import Measured

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
class Validation:
    """A judged version, and what it was judged by.

    Attributes:
        recipe: its name.
        base: what a person would call the base.
        lora: the recipe's name for the LoRA, None if the whole recipe is judged.
        scale: the scale that was applied, the current one's beside it.
        judgement: what is said.
        new: the file.
        current: the file in use, None if there is none.
        files: how the two lie to each other.
        cases: what was rendered and measured; empty if the file could not be fused.
        environment: where, in words.
        next_step: what to do now, one line.
        command: that makes this page again.
    """

    recipe: str
    base: str
    lora: str | None
    scale: tuple[float, float | None]
    judgement: Judgement
    new: FileFacts
    current: FileFacts | None
    files: FileComparison | None
    environment: str
    next_step: str
    command: str
    cases: tuple[Measured, ...] = field(default_factory=tuple)

    @property
    def verdict(self) -> str:
        """The outcome in words, with its cause."""
        words, cause = WORDS[self.judgement.outcome], self.judgement.cause
        return words if cause is None else f"{words}: {cause}"

    @property
    def exit_code(self) -> int:
        """0 the same, 4 a person has to look, 1 broken."""
        return EXIT_CODES[self.judgement.outcome]


@dataclass(frozen=True, slots=True)
class Row:
    """A case in the table: texts by column."""

    name: str
    cells: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Shown:
    """A case's pictures as a page shows them."""

    name: str
    prompt: str
    seed: int
    size: tuple[int, int]
    inputs: tuple[encode.Encoded, ...]
    current: encode.Encoded | None
    new: encode.Encoded
    unfused: encode.Encoded
    plain: encode.Encoded
    teacher: encode.Encoded | None
    heat: encode.Encoded | None
    cells: Mapping[str, str]


def rows(validation: Validation) -> list[Row]:
    """The table of the cases: to the current version, to the floor, to the golden, and what the LoRA does."""
    return [Row(one.sides.name, _cells(one)) for one in validation.cases]


def _cells(one: Measured) -> dict[str, str]:
    beside, evidence = to_current(one), one.evidence
    cells = {
        f"{metrics.METRICS[name].title} to current": "-"
        if beside is None
        else metrics.METRICS[name].text(beside.values[name])
        for name in SHOWN
    }
    golden = one.result.vs_golden
    acts = evidence.effect
    cells |= {
        "merged to unfused, over the floor": _number(one.result.over_floor, ".2f", " x"),
        "moved by the LoRA, over the floor": _times(evidence.moved, evidence.floor),
        "alignment": "-" if acts is None else f"{acts.alignment:.2f}",
        "strength": "-" if acts is None else f"{acts.strength:.2f}",
        "gain": _number(evidence.gain, ".2f"),
        "current gain": _number(evidence.current_gain, ".2f"),
        "PSNR to golden": "-" if golden is None else metrics.METRICS["psnr_db"].text(golden.values["psnr_db"]),
        "noise": f"{evidence.noise:.2f}",
        "comb": f"{evidence.comb_db:.1f} dB",
    }
    return cells


def to_current(one: Measured) -> verdicts.Comparison | None:
    """The new picture beside the current one; None without one, or of another size."""
    if one.sides.current is None:
        return None
    new = one.sides.pair.merged
    return verdicts.compare(new, one.sides.current) if new.size == one.sides.current.size else None


def _number(value: float | None, digits: str, unit: str = "") -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:{digits}}{unit}"


def _times(value: float, floor: float) -> str:
    return f"{value / floor:,.0f} x" if value >= 10 * floor else f"{value / floor:.2f} x"


def validation_md(validation: Validation, thumbnails: Mapping[str, str]) -> str:
    """The page for a pull request, in GitHub's Markdown.

    Args:
        validation: what to show.
        thumbnails: by case, the path of its strip of pictures from where the page lies.
    """
    table = rows(validation)
    return pages.render_page(
        "lora_fuse.studies.validation",
        "validation.md.j2",
        v=validation,
        rows=table,
        columns=list(table[0].cells) if table else [],
        thumbnails=thumbnails,
        cell=_cell,
    )


def _cell(text: object) -> str:
    """What stands in a cell of a Markdown table: no bar and no line end may break it, no markup is meant."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def validation_html(validation: Validation) -> str:
    """The page for a browser: current, new and unfused side by side, a slider, what changed."""
    return pages.render_page(
        "lora_fuse.studies.validation",
        "validation.html.j2",
        v=validation,
        rows=rows(validation),
        cases=[_shown(one) for one in validation.cases],
    )


def _shown(one: Measured) -> Shown:
    sides, case = one.sides, one.sides.pair.case
    new = sides.pair.merged
    current = sides.current
    return Shown(
        case.name,
        case.prompt,
        case.seed,
        new.size,
        tuple(encode.encoded(render.open_picture(path, case)) for path in case.images),
        None if current is None else encode.encoded(current),
        encode.encoded(new),
        encode.encoded(sides.pair.unfused),
        encode.encoded(sides.plain),
        None if sides.teacher is None else encode.encoded(sides.teacher),
        None if current is None or current.size != new.size else encode.encoded(_heat(new, current)),
        _cells(one),
    )


def strip(one: Measured) -> picture.Levels:
    """Input, current, new and their difference side by side, small: a thumbnail for a page that takes no data."""
    case, sides = one.sides.pair.case, one.sides
    new, current = sides.pair.merged, sides.current
    shown = [render.open_picture(path, case) for path in case.images[:1]]
    shown += [new] if current is None else [current, new]
    if current is not None and current.size == new.size:
        shown.append(_heat(new, current))
    small = [encode.thumbnail(each.levels, THUMBNAIL) for each in shown]
    height = max(len(levels) for levels in small)
    # White below the lower ones, and 4 columns of white after all but the last.
    padded = [np.pad(levels, ((0, height - len(levels)), (0, GAP), (0, 0)), constant_values=255) for levels in small]
    return np.concatenate(padded, axis=1)[:, :-GAP]


def _heat(new: picture.Picture, current: picture.Picture) -> picture.Picture:
    return picture.Picture(metrics.heat_map(new.levels, current.levels))


def facts(validation: Validation) -> dict[str, Any]:
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
        "findings": [asdict(finding) for finding in judgement.findings],
        "cases": {one.sides.name: _finite(asdict(one.evidence)) for one in validation.cases},
    }


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has neither infinity nor NaN."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def summary(validation: Validation, pages: Sequence[str]) -> list[str]:
    """What the terminal says at the end, three lines."""
    return [
        f"{validation.verdict}: {validation.judgement.reason}",
        f"see {', '.join(pages)}",
        f"next: {validation.next_step}",
    ]
