"""LoRAs taken out of a merged checkpoint: what the fuse does, the other way round, by its own stream and staging."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.errors import BadCheckpoint
from lora_fuse.fusion import Fused, FuseJob, Plan, plan_base
from lora_fuse.lora import LoraInput, Selection
from lora_fuse.machine import files, progress
from lora_fuse.recipe import hf_cache


def unmerge(  # noqa: PLR0913 - by keyword, each is a choice of its own
    checkpoint: Path,
    loras: Sequence[LoraInput],
    out: Path,
    *,
    rounding: Literal["once", "twice", "thrice"] = "once",
    selection: Selection | None = None,
    base_like: Path | None = None,
    untouched: files.Untouched = "auto",
    replace: bool = False,
    show_progress: bool = False,
) -> Fused:
    """Write the base that a merge was made of, as far as its rounding left it, and its manifest beside it.

    Every element is one that gives the merge's when the LoRAs are fused again; of several the one nearest to the middle
    of them, and `Manifest.unmerged` has how many those are and how far off one may be.

    Args:
        checkpoint: the merge: a pipeline folder, a component folder or one file.
        loras: all that were merged, with their scales.
        out: the folder or file to make, of the same kind.
        rounding: ``once``, as here and in ComfyUI; ``twice``, the delta too, as PEFT and diffusers do in 16 bits on a
            CPU; or ``thrice``, its product of two factors too, as they do on a GPU.
        selection: the modules that were fused.
        base_like: a checkpoint that `out` has to be like: in names, shapes and dtypes of the weights.
        untouched: how other weights are taken over, see `files.take_over`.
        replace: replace whatever else is at `out`.
        show_progress: show bytes and rate on stderr.

    Raises:
        BadLora: the checkpoint has not these LoRAs at these scales, or one cannot be taken out.
        BadCheckpoint: it is not as `base_like`, or says itself that something else was merged.
        Refused: see `fuse`; `out` is as it was.
    """
    label = hf_cache.cached_at(checkpoint.absolute())
    plan = plan_base(checkpoint, loras, selection, label=label, undo=rounding)
    if base_like is not None:
        _compare(plan, base_like)
    with nullcontext() if show_progress else progress.silence():
        return FuseJob(plan, out, untouched=untouched, replace=replace).run()


def _compare(plan: Plan, like: Path) -> None:
    """Refuse a checkpoint whose weights are not named, shaped and stored as those of another.

    Raises:
        BadCheckpoint: so it is.
    """
    for part in plan.parts:
        theirs = open_checkpoint(like, part.component or None).parameters()
        ours = part.checkpoint.parameters()
        if other := sorted(theirs.keys() ^ ours.keys()):
            where = like if other[0] in theirs else part.checkpoint.root
            raise BadCheckpoint(
                f"{part.checkpoint.root} and {like} have not the same weights: {len(other)} are in one alone, first "
                f"{other[0]!r} in {where}; give the base that it was made of, in its own names, or no --base-like"
            )
        for name, tensor in ours.items():
            mine, wanted = ((one.dtype, *one.shape) for one in (tensor, theirs[name]))
            if mine != wanted:
                raise BadCheckpoint(
                    f"{part.checkpoint.root}: {name!r} is {_text(mine)}, and in {like} {_text(wanted)}: what is taken "
                    "out has the merge's dtype; give a base of the same, or no --base-like"
                )


def _text(parts: Sequence[object]) -> str:
    return f"{parts[0]} {'x'.join(map(str, parts[1:])) or 'number'}"
