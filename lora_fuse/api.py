"""Fuse and verify from Python: the functions behind the command line, re-exported by `lora_fuse`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from lora_fuse.checkpoint import dtypes
from lora_fuse.errors import BadConfig
from lora_fuse.fusion import Fused, FuseJob, Plan, cautions, plan_base
from lora_fuse.lora import LoraInput, Selection
from lora_fuse.machine import files, progress, text
from lora_fuse.models import needed_scheduler
from lora_fuse.recipe import hf_cache
from lora_fuse.verification import Expectation, Verification, verify_merge

if TYPE_CHECKING:
    from lora_fuse.hub import streamed_base

Scheduler: TypeAlias = Mapping[str, object] | Literal["auto"] | None


def plan(
    base: Path | streamed_base.StreamedBase,
    loras: Sequence[LoraInput],
    *,
    selection: Selection | None = None,
    component: str | None = None,
    requantise: bool = False,
    dtype: str | None = None,
) -> Plan:
    """Open a base and LoRAs and match them; nothing is written, and only headers and alphas are read.

    Args:
        base: a pipeline folder, a component folder or one safetensors file; or what `streamed_base.open_streamed` of
            `lora_fuse.hub` opens, whose weights are fetched while they are fused: the plan is good as long as it is
            open.
        loras: files or PEFT folders, each with its scale; they are summed.
        selection: the modules to fuse; None for all that the LoRAs have.
        component: the pipeline's component to fuse into, of LoRAs that name none themselves; without one their keys
            say it, each for itself, and those that name none are for the main component (transformer, or else unet).
        requantise: quantise the targets of a quantised base again, as they were, and write nothing else anew.
        dtype: ``bfloat16``, ``float16`` or ``float32``: that of all floats of the result; None for the base's own.

    Raises:
        Refused: the base, a LoRA, a scale or a pattern cannot be used; see `lora_fuse.errors` for the kinds.
    """
    given = _named(loras, component)
    if isinstance(base, Path):
        label = hf_cache.cached_at(base.absolute())
        return plan_base(base, given, selection, label=label, dtype=dtype, requantise=requantise)
    made = plan_base(
        base.root,
        given,
        selection,
        names=base.lock.files,
        label=base.lock.label,
        dtype=dtype,
        requantise=requantise,
        streamed=base.files,
    )
    return replace(made, lock=base.lock)


def fuse(  # noqa: PLR0913 - by keyword, each is a choice of its own
    plan: Plan,
    out: Path,
    *,
    device: str = "auto",
    untouched: files.Untouched = "auto",
    scheduler: Scheduler = None,
    replace: bool = False,
    force_quantised: bool = False,
    side_channel: bool = False,
    show_progress: bool = False,
) -> Fused:
    """Write the merged checkpoint to `out` and its manifest beside it; the bytes do not depend on the device.

    What merges and is a mistake nevertheless, as a known LoRA of another base, is a `UserWarning`.

    Args:
        plan: what `plan` returned.
        out: the folder or file to make; an earlier merge there is replaced when the new one is whole. A link stays,
            and what it leads to is replaced.
        device: ``auto``, ``cpu`` or ``cuda``.
        untouched: how weights that do not change are taken over from the base, see `files.take_over`.
        scheduler: settings of the result's scheduler; ``auto`` are those that a known step-distilled LoRA needs, None
            keeps the base's.
        replace: replace whatever else is at `out`, but for the base and the LoRAs.
        force_quantised: write what was quantised again however little of the change is left (`requantised` of the
            manifest has the figure).
        side_channel: add nothing to the base: `out` is a folder with the base's files as they are and the LoRAs
            beside them, in ``loras``, with diffusers' names and the strength that was asked for.
        show_progress: show bytes and rate on stderr.

    Raises:
        Refused: there is no such device, no space, something else at `out`, or no LoRA whose scheduler is known;
            `out` is as it was.
    """
    with nullcontext() if show_progress else progress.silence():
        settings = _settings(scheduler, plan.inputs)
        for caution in cautions(plan, settings):
            warnings.warn(text.line(caution), stacklevel=2)
        job = FuseJob(
            plan,
            out,
            device=device,
            untouched=untouched,
            scheduler=settings,
            replace=replace,
            force_quantised=force_quantised,
            beside=side_channel,
        )
        return job.run()


def verify(  # noqa: PLR0913 - by keyword, each is a choice of its own
    merged: Path,
    base: Path | streamed_base.StreamedBase,
    loras: Sequence[LoraInput],
    *,
    rows: int | Literal["all"] = 16,
    selection: Selection | None = None,
    component: str | None = None,
    dtype: str | None = None,
    pipeline: str | None = None,
    scheduler: Scheduler = None,
    beside: frozenset[str] = frozenset(),
    seed: int | None = None,
    show_progress: bool = False,
) -> Verification:
    """Derive a merge a second time, by other code, and compare; `Verification.passed` is the answer.

    Args:
        merged: the result of `fuse`.
        base: what it was merged from, as for `plan`; of one on the Hub, rows and tensors are fetched as they are
            compared.
        loras: what was fused, with the scales that were applied.
        rows: rows of each target to derive again and to measure, and as many more that are drawn at random; everything
            else is compared with the base, whole.
        selection: the modules that were fused.
        component: the pipeline's component that was fused, as for `plan`.
        dtype: that of all floats of the result, as for `plan`.
        pipeline: the class that its `model_index.json` should name; None for the base's.
        scheduler: the settings that its scheduler should have, as for `fuse`.
        beside: POSIX paths in `merged` that are no part of the merge, as a published repository has them.
        seed: draws the same rows as an earlier verification (`Verification.drawn`); None for a new one.
        show_progress: show bytes and rate on stderr.

    Raises:
        Refused: one side cannot be read.
    """
    if rows != "all" and rows < 1:
        raise BadConfig(f"rows is {rows!r}; give a number of rows, or all")
    if seed is not None and seed < 0:
        raise BadConfig(f"the seed is {seed}; give a number that is not negative, as an earlier verification named it")
    if dtype not in (None, *dtypes.OUTPUTS):
        raise BadConfig(f"the dtype is {dtype!r}; it is one of {', '.join(dtypes.OUTPUTS)}, or None")
    with nullcontext() if show_progress else progress.silence():
        return verify_merge(
            merged,
            base if isinstance(base, Path) else base.root,
            _named(loras, component),
            rows=None if rows == "all" else rows,
            expected=Expectation(pipeline, _settings(scheduler, loras), beside, dtype=dtype),
            selection=selection,
            seed=seed,
            streamed=None if isinstance(base, Path) else base.files,
        )


def _named(loras: Sequence[LoraInput], component: str | None) -> list[LoraInput]:
    return [lora if lora.component is not None else replace(lora, component=component) for lora in loras]


def _settings(scheduler: Scheduler, loras: Sequence[LoraInput]) -> Mapping[str, object]:
    if scheduler == "auto":
        return needed_scheduler(lora.path.name for lora in loras).scheduler
    return scheduler or {}
