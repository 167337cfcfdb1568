"""Placement of a pipeline's parts while it runs: a model larger than the card is offloaded or spread by its libraries.

A placement is a function of one part (a `torch.nn.Module`), but for `model_offload`, which needs them all: it moves one
part at a time to the GPU, in the pipeline's own order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from lora_fuse.errors import OutOfMemory, RenderFailed
from lora_fuse.pictures.render import Pipeline

if TYPE_CHECKING:
    import torch

# Which to try when the memory of a GPU is short, best first.
_NEXT: Mapping[str, str] = MappingProxyType(
    {
        "cuda": "balanced (several GPUs) or model_offload",
        "balanced": "model_offload",
        "model_offload": "group_offload",
        "group_offload": "cpu, or make the pictures smaller",
    }
)


# Those that leave a model's modules as they are, without hooks: LoRAs may come and go in one that is placed.
BARE = ("cuda", "cpu")


def place(pipe: Pipeline, placement: str) -> None:
    """Put a loaded pipeline, its LoRAs attached, where it is to run; parts placed before stay.

    Raises:
        RenderFailed: the placement is unknown.
        OutOfMemory: it does not fit; the message names the placement to try.
    """
    if placement not in PLACEMENTS:
        raise RenderFailed(f"unknown placement {placement!r}: use one of {', '.join(PLACEMENTS)}")
    import torch

    try:
        PLACEMENTS[placement](pipe)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"the pipeline does not fit the GPU's memory, {advice(placement)}") from error


def advice(placement: str) -> str:
    """Name the placement to try when memory is short, as the end of a sentence."""
    return f"with regress.placement {placement}: set it to {_NEXT[placement]}"


def _group_offload(pipe: Pipeline) -> None:
    import torch
    from diffusers.hooks import apply_group_offloading

    settings = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu"), "use_stream": True}
    for part in _parts_to_place(pipe, "_diffusers_hook"):
        apply_group_offloading(part, offload_type="leaf_level", **settings)


def _balanced(pipe: Pipeline) -> None:
    """Every part spread over all GPUs, whole blocks each: accelerate's own way."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    for part in _parts_to_place(pipe, "_hf_hook"):
        whole = getattr(part, "_no_split_modules", None)
        memory = get_balanced_memory(part, no_split_module_classes=whole)
        devices = infer_auto_device_map(part, max_memory=memory, no_split_module_classes=whole)
        dispatch_model(part, devices)


def _parts_to_place(pipe: Pipeline, mark: str) -> list[torch.nn.Module]:
    """The modules of a pipeline that do not bear the mark of having been placed."""
    import torch

    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [part for part in parts if not hasattr(part, mark)]


PLACEMENTS: Mapping[str, Callable[[Pipeline], None]] = MappingProxyType(
    {
        "cuda": lambda pipe: pipe.to("cuda"),
        "model_offload": lambda pipe: pipe.enable_model_cpu_offload(),
        "group_offload": _group_offload,
        "balanced": _balanced,
        "cpu": lambda pipe: pipe.to("cpu"),
    }
)
