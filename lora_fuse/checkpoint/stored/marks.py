"""Marks of quantised weights: tensors beside a weight that say how to read it, and what a header says. Pure.

A sum is right only in the numbers that a model computes with. Where a scale lies beside a weight these are others than
the file's, whatever the weight's dtype is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_fuse.machine import files


@dataclass(frozen=True, slots=True)
class QuantisationMark:
    """Names of tensors, after their module's, that come with a format.

    One that is not `certain` is a scale of unknown meaning: it counts only beside a weight that is to change.
    """

    names: re.Pattern[str]
    what: str
    certain: bool = True


@dataclass(frozen=True, slots=True)
class Quantised:
    """A module whose weight is quantised, the format, and the tensor or header entry that says so."""

    module: str
    what: str
    evidence: str
    certain: bool = True


# By source: bitsandbytes functional.py, QuantState.as_dict; nn/modules.py, Linear8bitLt; ComfyUI comfy/ops.py (scaled
# fp8) and comfy/quant_ops.py; nunchaku models/linear.py, SVDQW4A4Linear; AutoGPTQ and AutoAWQ, their QuantLinear;
# compressed-tensors and ModelOpt, as vLLM reads them; transformers integrations/finegrained_fp8.py, eetq.py, higgs.py;
# optimum-quanto QTensor.save_to_state_dict; torchao prototype/safetensors; HQQ core/quantize.py; SDNQ layers.
MARKS = (
    QuantisationMark(
        re.compile(r"weight\.((nested_)?(absmax|quant_map)|quant_state\.bitsandbytes__\w+)|SCB|weight_format"),
        "bitsandbytes",
    ),
    QuantisationMark(
        re.compile(r"wscales|wzeros|wcscales|wtscale|smooth_factor(_orig)?|proj_down|proj_up"), "nunchaku, SVDQuant"
    ),
    QuantisationMark(re.compile(r"scale_weight|scale_input|comfy_quant"), "ComfyUI, scaled or mixed"),
    QuantisationMark(re.compile(r"qweight|qzeros|g_idx|scales|qbiases|dqweight"), "GPTQ, AWQ or their kin"),
    QuantisationMark(
        re.compile(
            r"weight_(packed|shape|scale|scale_2|scale_inv|scales|zero_point|global_scale)|input_(global_)?scale"
        ),
        "scaled fp8, fp4 or int8",
    ),
    QuantisationMark(
        re.compile(r"weight[._](_?data|_?scale|_?shift|_?zeropoint|qdata)|_weight_(qdata|scale|zero_point)\w*"),
        "quanto or torchao",
    ),
    QuantisationMark(re.compile(r"W_q|svd_(up|down)"), "HQQ or SDNQ"),
    QuantisationMark(
        re.compile(r"(?!\w*scale_shift_table)\w*(scale|quant|zero_?point|absmax)\w*"),
        "a scale of unknown meaning",
        certain=False,
    ),
)
# The entry of a header that lists layers: ComfyUI's, comfy/utils.py.
BY_LAYER = "_quantization_metadata"


def quantised_modules(names: Iterable[str], metadata: Mapping[str, str]) -> dict[str, Quantised]:
    """The modules that are quantised, by name, from the names of all tensors and the metadata of the headers."""
    found: dict[str, tuple[int, Quantised]] = {}
    modules = set()
    for name in names:
        modules.add(name.rpartition(".")[0])
        if name.endswith((".weight", ".bias")):
            continue  # nearly all; they are no marks
        for rank, mark in enumerate(MARKS):
            module = _module_of(name, mark)
            if module is not None and rank <= found.get(module, (rank,))[0]:
                found[module] = rank, Quantised(module, mark.what, name, mark.certain)
    layers = _layers(metadata.get(BY_LAYER, "{}"))
    listed = [module for module in modules if not layers.isdisjoint(_tails(module))]
    return {module: one for module, (_, one) in found.items()} | {
        module: Quantised(module, "ComfyUI, mixed", f"{BY_LAYER} in the header") for module in listed
    }


def _module_of(name: str, mark: QuantisationMark) -> str | None:
    """The module that a tensor marks; None if it has another name. A mark's name has up to three parts."""
    parts = name.split(".")
    counts = (count for count in range(1, min(3, len(parts) - 1) + 1) if mark.names.fullmatch(".".join(parts[-count:])))
    return next((".".join(parts[:-count]) for count in counts), None)


def _tails(module: str) -> list[str]:
    """A name, and what is left of it behind each dot."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _layers(text: str) -> set[str]:
    try:
        layers = files.parse_json(text).get("layers", {})
    except (ValueError, AttributeError):
        return set()
    return set(map(str, layers)) if isinstance(layers, dict) else set()
