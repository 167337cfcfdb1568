"""The call of a pipeline class of diffusers, as plain data: its guidance, pictures in, frames out, parts that run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Guidance:
    """The number of a pipeline's call that a recipe gives as `true_cfg_scale`, and what it does.

    Attributes:
        argument: its name in the call.
        off: the largest value at which the model runs once a step; above, a second time without the prompt. Infinite
            where the number is an input of the model itself, a distilled guidance.
        negative: ``needed`` where guidance is off without a negative prompt, ``taken`` where one may be given, None
            where the call takes none.
    """

    argument: str = "true_cfg_scale"
    off: float = 1.0
    negative: Literal["needed", "taken"] | None = "needed"

    @property
    def title(self) -> str:
        """A name for a person."""
        return "true CFG" if self.argument == "true_cfg_scale" else self.argument

    def doubles(self, scale: float, negative_prompt: str | None) -> bool:
        """True where the model runs twice a step."""
        return scale > self.off and (self.negative != "needed" or negative_prompt is not None)


# As diffusers 0.42 decides in each pipeline; from 0 on where the formula is cond + scale * (cond - uncond).
TRUE_CFG = Guidance()
CFG = Guidance("guidance_scale", negative="taken")
CFG_FROM_ZERO = Guidance("guidance_scale", off=0.0, negative="taken")
CFG_ALONE = Guidance("guidance_scale", negative=None)
EMBEDDED = Guidance("guidance_scale", off=math.inf, negative=None)

SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)  # classes that a recipe may name
UP_TO_TEN = range(11)  # input pictures, where the class sets no limit: its memory does


@dataclass(frozen=True, slots=True)
class PipelineCall:
    """A pipeline class and how it is called.

    Attributes:
        name: the class.
        guidance: see `Guidance`.
        pictures: how many input pictures it takes, as `picture_argument`.
        frames_per_second: of the clip that it makes, whose number of frames it takes; None of one that makes pictures.
        takes_sigmas: the call takes the sigmas to start from.
        denoisers: the components that run at every step; one that the folder has not is left out.
        has_templates: prompts go through the chat template that lies beside the tokenizer.
        needs: libraries that the class calls and does not ask for.
        misread: patterns of parameters of which diffusers' loader of LoRAs makes another delta than the file has where
            that has original names, and why; such a LoRA is attached by this library itself.
    """

    name: str
    guidance: Guidance = TRUE_CFG
    pictures: range = range(1)
    picture_argument: str = "image"
    frames_per_second: int | None = None
    takes_sigmas: bool = True
    denoisers: tuple[str, ...] = ("transformer",)
    has_templates: bool = False
    needs: tuple[str, ...] = ()
    misread: Mapping[str, str] = field(default_factory=dict)

    @property
    def makes_clip(self) -> bool:
        """True where frames come out."""
        return self.frames_per_second is not None

    @property
    def edits(self) -> bool:
        """True where it cannot do without an input picture."""
        return 0 not in self.pictures
