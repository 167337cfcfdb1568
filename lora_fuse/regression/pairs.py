"""Renders each case twice in one process: from the merged checkpoint, and from the base with the LoRAs unfused.

If asked, a third time from the base alone at its own settings, to show what the LoRA saves. Merged and unfused
transformer are never in memory together; text encoder, VAE, tokenizer and processor are loaded once.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_fuse.errors import RenderFailed
from lora_fuse.plan import Plan
from lora_fuse.regression.metrics import Levels, to_levels
from lora_fuse.regression.render import Case, Pipeline, Rendered, Sampling, load_pipeline, render, shared_components
from lora_fuse.regression.unfused import attach
from lora_fuse.regression.verdicts import CaseResult, Limits, Picture, Subject, examine


@dataclass(frozen=True, slots=True)
class Setup:
    """What the sides share: pipeline class, sampling, scheduler settings (empty: the folder's own), device, dtype.

    `baseline` is how the base alone is run; None leaves that side out.
    """

    pipeline: str
    sampling: Sampling
    scheduler: Mapping[str, object]
    device: str
    dtype: str
    baseline: Sampling | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """One case, rendered from the merged checkpoint, from base + LoRA and, if asked, from the base alone.

    `unfused_by` says who put the LoRA beside the base, see `lora_fuse.regression.unfused`.
    """

    case: Case
    merged: Rendered
    unfused: Rendered
    unfused_by: str
    baseline: Rendered | None = None


def render_pairs(merged: Path, plan: Plan, cases: Sequence[Case], setup: Setup) -> list[Pair]:
    """Render every case from both sides.

    The merged side is loaded as a user would load it, with the scheduler that lies in the repository; the unfused side
    is the plan's base with the recipe's scheduler, so a wrong scheduler in the repository shows.

    Raises:
        RenderFailed: a side cannot be loaded or run.
    """
    pipe = load_pipeline(merged, setup.pipeline, device=setup.device, dtype=setup.dtype)
    ours = [render(pipe, case, setup.sampling) for case in cases]
    shared = shared_components(pipe)
    _drop_transformer(pipe)
    base = plan.checkpoint.root
    pipe = load_pipeline(
        base, setup.pipeline, device=setup.device, dtype=setup.dtype, scheduler=setup.scheduler or None, shared=shared
    )
    by, detach = attach(pipe, plan)
    theirs = [render(pipe, case, setup.sampling) for case in cases]
    detach()
    alone = _render_baseline(pipe, base, cases, setup)
    sides = zip(cases, ours, theirs, alone, strict=True)
    return [Pair(case, first, second, by, third) for case, first, second, third in sides]


def _render_baseline(pipe: Pipeline, base: Path, cases: Sequence[Case], setup: Setup) -> Sequence[Rendered | None]:
    """The base as its authors run it: no LoRA, its own scheduler, steps and CFG."""
    if setup.baseline is None:
        return [None] * len(cases)
    parts = {**shared_components(pipe), "transformer": pipe.transformer}
    pipe = load_pipeline(base, setup.pipeline, device=setup.device, dtype=setup.dtype, shared=parts)
    return [render(pipe, case, setup.baseline) for case in cases]


def _drop_transformer(pipe: Pipeline) -> None:
    """Give the memory back before the other transformer is loaded."""
    pipe.register_modules(transformer=None)
    gc.collect()


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A pair, the golden that it was compared with if there is one, and what that came to."""

    pair: Pair
    golden: Levels | None
    result: CaseResult

    @property
    def name(self) -> str:
        """The case's name."""
        return self.pair.case.name


def judge_pairs(pairs: Sequence[Pair], goldens: Path, limits: Mapping[str, Limits]) -> list[JudgedPair]:
    """Compare every pair with each other and with ``goldens/CASE.png``.

    Args:
        pairs: what was rendered.
        goldens: the folder of this recipe's approved pictures for this environment; it may be missing.
        limits: of ``unfused`` and ``golden``.

    Raises:
        RenderFailed: a golden is there and cannot be read.
    """
    judged = []
    for pair in pairs:
        case, golden = pair.case, _read_golden(goldens / f"{pair.case.name}.png")
        size = (case.width, case.height) if case.width and case.height else None
        result = examine(
            Subject(case.name, case.prompt, case.seed, size),
            Picture(to_levels(pair.merged.image), pair.merged.nonfinite),
            Picture(to_levels(pair.unfused.image), pair.unfused.nonfinite),
            golden,
            unfused_limits=limits["unfused"],
            golden_limits=limits["golden"],
        )
        judged.append(JudgedPair(pair, golden, result))
    return judged


def _read_golden(path: Path) -> Levels | None:
    if not path.exists():
        return None
    try:
        with Image.open(path) as image:
            return to_levels(image)
    except OSError as error:
        raise RenderFailed(f"the golden {path} cannot be read ({error}); restore it: git checkout {path}") from error


def save_pictures(judged: Sequence[JudgedPair], folder: Path) -> None:
    """Write ``CASE.merged.png``, ``CASE.unfused.png`` and so on, lossless; an approval copies the first.

    What an earlier run left in `folder` goes, but only now that there is something to put in its place.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for case in judged:
        sides = {"merged": case.pair.merged, "unfused": case.pair.unfused, "baseline": case.pair.baseline}
        for side, rendered in sides.items():
            if rendered is not None:
                rendered.image.save(folder / f"{case.name}.{side}.png")
