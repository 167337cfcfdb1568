"""Weights of a loaded transformer changed in place: moved by roundings, for the noise floor, or an export's instead.

The noise floor is how far the same pictures move when weights move by as much as one rounding moves them. A right merge
is base + LoRA, rounded once: each of its weights is off by an error that is spread evenly over one unit in the last
place (ulp), so with the variance ulp^2 / 12 (Widrow and Kollar, Quantization Noise, 2008, chapter 5). Here one weight
in twelve is moved by a whole ulp, up or down: the same variance, without the merge. What that does to the unfused
pipeline's latents is what rounding may do; a merge that is wrong in anything else is further off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from lora_fuse.errors import BadCheckpoint, RenderFailed

if TYPE_CHECKING:
    import torch

FloatArray: TypeAlias = npt.NDArray[np.float32]
Decoded: TypeAlias = Callable[[], Iterable[tuple[str, FloatArray]]]  # reads an export: names of diffusers, float32

T = TypeVar("T")

SHARE = 1 / 12  # of the weights, moved by one ulp
EXPONENT = 0x7F800000  # the bits of a float32 that hold it


def loaded_names(model: torch.nn.Module, found: Mapping[str, T]) -> dict[str, T]:
    """Values of a checkpoint's parameters by the names that these have in a loaded model.

    transformers 5 has CLIP's text model without the prefix ``text_model.`` of its checkpoints.
    """
    if hasattr(model, "text_model"):
        return {name if name.startswith(_kept(model)) else f"text_model.{name}": one for name, one in found.items()}
    return {name.removeprefix("text_model."): one for name, one in found.items()}


def _kept(model: torch.nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name, _ in model.named_children())


def jitter(model: torch.nn.Module, names: Iterable[str], dtypes: Iterable[torch.dtype], seed: int = 0) -> None:
    """Move one in twelve of the named parameters' values by one ulp, up or down, in place.

    The names are the checkpoint's; the model may have a LoRA attached. `dtypes` are those that the weights pass
    through, on disk and in memory: the coarsest has the ulp that counts. The choice is drawn on the parameter's device.

    Raises:
        RenderFailed: the model lacks one of them, so the floor would be too low.
    """
    import torch

    wanted = set(loaded_names(model, dict.fromkeys(names)))
    coarsest = max((torch.finfo(dtype) for dtype in dtypes), key=lambda info: info.eps)
    bits = round(-math.log2(coarsest.eps))
    lowest = round(math.log2(coarsest.smallest_normal))
    generators: dict[torch.device, torch.Generator] = {}
    # PEFT puts them one level down
    parameters = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    if missing := sorted(wanted - parameters.keys()):
        raise RenderFailed(
            f"the pipeline's model has no {missing[0]} ({len(missing)} missing), which the merge changes"
        )
    for name in sorted(wanted):
        parameter = parameters[name]
        device = parameter.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
        weight = parameter.detach()
        power = (weight.float().view(torch.int32) & EXPONENT).view(torch.float32)  # the power of two below, 0 of zero
        ulp = power.clamp_(min=2.0**lowest).mul_(2.0**-bits)
        chance = torch.rand(weight.shape, generator=generator, device=device)
        direction = (chance < SHARE / 2).float().sub_((chance >= 1 - SHARE / 2).float())
        weight.copy_(direction.mul_(ulp).add_(weight))


def take_weights(model: torch.nn.Module, weights: Iterable[tuple[str, FloatArray]], export: str) -> None:
    """Copy every weight of an export over the model's, in place, rounded to the dtype that the model runs in.

    Whatever holds the parameters (a device, a compiled block) holds them still. The export has to have all of them: a
    weight that it lacks would be the one that was there before.

    Raises:
        BadCheckpoint: a name is unknown, missing or comes twice, or a shape is another one; some were copied already.
    """
    import torch

    left = {name: parameter.detach() for name, parameter in model.named_parameters()}
    known = set(left)
    for name, values in weights:
        if name not in left:
            said = "comes twice" if name in known else "is no weight of the model"
            raise BadCheckpoint(f"the export {export} has {name!r}, which {said}; export again")
        parameter = left.pop(name)
        if tuple(parameter.shape) != values.shape:
            raise BadCheckpoint(
                f"the export {export} has {name!r} of shape {values.shape}, the model of {tuple(parameter.shape)}; "
                "export again"
            )
        parameter.copy_(
            torch.from_numpy(np.require(values, requirements=["C", "W"]))
        )  # torch warns of what it may not write
    if left:
        raise BadCheckpoint(f"the export {export} lacks {min(left)!r} ({len(left)} missing); export again")
