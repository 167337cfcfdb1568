"""The arguments of a pipeline's call, by the row of its class; what does not fit the row is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from lora_fuse.errors import RenderFailed
from lora_fuse.machine import text
from lora_fuse.models import pipeline_call, pipelines
from lora_fuse.pictures.cases import Case, Sampling
from lora_fuse.pictures.picture import Picture, read_levels


def call_of(pipeline: str) -> pipeline_call.PipelineCall:
    """The row of a pipeline class.

    Raises:
        RenderFailed: there is none; the message has the nearest.
    """
    if pipeline not in pipelines():
        near = text.nearest(pipeline, pipelines(), 3)
        raise RenderFailed(f"unknown pipeline class {pipeline!r}: did you mean {' or '.join(near)}?")
    return pipelines()[pipeline]


def arguments(pipe: Any, case: Case, sampling: Sampling) -> dict[str, Any]:
    """The arguments of a call that makes one case, its input pictures read.

    Raises:
        RenderFailed: a picture cannot be read, or case or settings do not suit the class.
    """
    import torch

    call = call_of(type(pipe).__name__)
    check_case(call, case)
    check_sampling(call, sampling)
    pictures = [Image.fromarray(open_picture(path, case).levels) for path in case.images]
    given: dict[str, Any] = {
        "prompt": case.prompt,
        "negative_prompt": sampling.negative_prompt,
        call.guidance.argument: sampling.true_cfg_scale,
        "num_inference_steps": sampling.steps,
        "sigmas": list(sampling.call_sigmas) or None,
        "height": case.height,
        "width": case.width,
        "num_frames": case.frames,
        call.picture_argument: (pictures[0] if len(pictures) == 1 else pictures) or None,
        "generator": torch.Generator("cpu").manual_seed(case.seed),
        "output_type": "np",  # "pil" would paint NaN as black and say nothing
    }
    return {name: value for name, value in given.items() if value is not None}


def check_case(call: pipeline_call.PipelineCall, case: Case) -> None:
    """Refuse a case with another number of input pictures than the class takes, or frames of what makes no clip.

    Raises:
        RenderFailed: it is one.
    """
    allowed = call.pictures
    if len(case.images) not in allowed:
        wanted = str(allowed[0]) if len(allowed) == 1 else f"{allowed[0]} to {allowed[-1]}"
        raise RenderFailed(f"case {case.name} has {len(case.images)} input pictures and {call.name} takes {wanted}")
    if case.frames is not None and not call.makes_clip:
        raise RenderFailed(f"case {case.name} asks for {case.frames} frames and {call.name} makes pictures; set null")
    if case.frames is None and call.makes_clip:
        raise RenderFailed(f"case {case.name} has no frames and {call.name} makes a clip; set their number, as 81")


def check_sampling(call: pipeline_call.PipelineCall, sampling: Sampling) -> None:
    """Refuse settings that the call has no argument for: they would do nothing.

    Raises:
        RenderFailed: there is one.
    """
    if sampling.negative_prompt is not None and call.guidance.negative is None:
        raise RenderFailed(
            f"the negative prompt is {sampling.negative_prompt!r} and {call.name} takes none: set sampling."
            "negative_prompt to null"
        )
    if sampling.call_sigmas and not call.takes_sigmas:
        raise RenderFailed(
            f"sampling.call_sigmas has {len(sampling.call_sigmas)} and the call of {call.name} takes none: leave them "
            "out, and give the scheduler its settings"
        )


def open_picture(path: Path, case: Case) -> Picture:
    """An input picture, see `lora_fuse.pictures.picture.read_levels`.

    Raises:
        RenderFailed: it is missing or no picture.
    """
    try:
        return Picture(read_levels(path))
    except OSError as error:
        said = text.one_line(error)
        raise RenderFailed(f"case {case.name}: input picture {path} cannot be read: {said}") from error
