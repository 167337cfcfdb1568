"""Step-distilled LoRAs, known by the names of their files: the settings that they were distilled with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_fuse.errors import BadConfig
from lora_fuse.models.made_for import is_of_a_family

# FlowMatchEulerDiscreteScheduler as every Lightning LoRA needs it: base_shift = max_shift = ln 3, so that 4 steps
# visit the sigmas 1, .9, .75, .5 at any resolution. From github.com/ModelTC/Qwen-Image-Lightning,
# generate_with_diffusers.py, which takes it and true_cfg_scale 1 for every LoRA.
LIGHTNING: Mapping[str, object] = {
    "base_image_seq_len": 256,
    "base_shift": math.log(3),
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": math.log(3),
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
CHANGED = ("base_shift", "max_shift", "shift_terminal")  # of a base's own settings
_NAME = re.compile(r"[-_ ]lightning[-_ ](?P<steps>\d+)steps?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Distillation:
    """The settings that a LoRA was distilled for: any others give blurry or noisy pictures."""

    filename: str
    steps: int
    true_cfg_scale: float
    scheduler: Mapping[str, object]

    @property
    def usage(self) -> str:
        """The settings of a call, as a sentence's end."""
        return f"{self.steps} steps at true_cfg_scale {self.true_cfg_scale:g}"

    def warning(self, own: Mapping[str, object] | None) -> str | None:
        """A sentence for who keeps a scheduler of other settings, `own`; None where they are those that it needs.

        Of a base that is no pipeline, and so has no scheduler, `own` is None.
        """
        here = own or {}
        other = {key: value for key, value in self.scheduler.items() if key not in here or here[key] != value}
        if not other:
            return None
        settings = ", ".join(
            f"{key} {_short(value)}" + (f" where the base's has {_short(here[key])}" if key in here else "")
            for key, value in other.items()
            if key in here or key in CHANGED
        )
        made = f"{self.filename} was distilled for {self.usage} with its own FlowMatchEulerDiscreteScheduler"
        way_out = "take it with --scheduler auto" if own is not None else "set it in the pipeline that loads OUT"
        return f"{made} ({settings}): with another, pictures come out blurry or noisy; {way_out}"


def distillation(filename: str) -> Distillation | None:
    """The settings that a LoRA's file, by its name, was distilled for; None where they are not known."""
    name = filename.rpartition("/")[2]
    match = _NAME.search(name)
    if match is None or not is_of_a_family(name):
        return None
    return Distillation(name, int(match["steps"]), 1.0, LIGHTNING)


def needed_scheduler(filenames: Iterable[str]) -> Distillation:
    """The distillation whose scheduler the result of a merge needs.

    Raises:
        BadConfig: no LoRA is known to need one, or two need different ones.
    """
    names = list(filenames)
    known = [found for name in names if (found := distillation(name)) is not None]
    if not known:
        raise BadConfig(
            f"scheduler auto: it is not known what {', '.join(names)} needs; give its settings as JSON, or leave the "
            "option out to keep the base's"
        )
    for other in known[1:]:
        if (other.scheduler, other.steps) != (known[0].scheduler, known[0].steps):
            raise BadConfig(
                f"scheduler auto: {known[0].filename} was distilled for {known[0].usage}, {other.filename} for "
                f"{other.usage}; give the settings as JSON"
            )
    return known[0]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
