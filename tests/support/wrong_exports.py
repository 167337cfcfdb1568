"""Exporters that are wrong on purpose: each file is what somebody's tool writes, and must not pass the gate.

`wrong_export` writes a right one first, and spoils it. What a reader makes of it is another question: engines load all
of them without a word, but for the keys that are missing.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_fuse.checkpoint import Checkpoint
from lora_fuse.errors import Unquantisable
from lora_fuse.exports import ExportOptions, export
from lora_fuse.quantisation import FORMATS, Fp8Options

Float32s = npt.NDArray[np.float32]
Matrix = Callable[[str], Float32s]
Tensors = dict[str, torch.Tensor]
FLAG = "__index_timestep_zero__"


@dataclass(frozen=True, slots=True)
class Layers:
    """The weights of base and merge in float32, by name; and of the merge all that are matrices."""

    base: Matrix
    exact: Matrix
    matrices: tuple[str, ...]

    def quantised(self, tensors: Tensors) -> list[str]:
        """The modules that an export has quantised."""
        return sorted(name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale"))


@dataclass(frozen=True, slots=True)
class WrongExport:
    """The format that a file pretends to be in, and what is done to a right one."""

    format: str
    spoil: Callable[[Tensors, Layers], None]
    why: str


def _put(tensors: Tensors, module: str, stored: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Replace a module's codes and scales."""
    for suffix, array in stored.items():
        name = f"{module}.{suffix}"
        bits = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
        like = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e8m0fnu": torch.float8_e8m0fnu}
        dtype = like.get(array.dtype.name, getattr(torch, array.dtype.name, torch.uint8))
        tensors[name] = bits.view(dtype).reshape(array.shape)


def _encode(name: str, matrix: Float32s) -> dict[str, npt.NDArray[np.generic]]:
    return dict(FORMATS[name].encode(np.ascontiguousarray(matrix, np.float32), Fp8Options()))


def _unscaled(tensors: Tensors, layers: Layers) -> None:
    for module in layers.quantised(tensors):
        exact = torch.from_numpy(layers.exact(f"{module}.weight"))
        tensors[f"{module}.weight"] = exact.to(torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = torch.tensor(1.0)


def _lora_on_codes(tensors: Tensors, layers: Layers) -> None:
    """Codes are taken for weights: the LoRA is added to them as it is, far below half a step."""
    for module in layers.quantised(tensors):
        base = layers.base(f"{module}.weight")
        stored = _encode("int8_convrot", base)
        delta = layers.exact(f"{module}.weight") - base
        stored["weight"] = np.clip(np.rint(stored["weight"].astype(np.float32) + delta), -127, 127).astype(np.int8)
        _put(tensors, module, stored)


def _fused_after(tensors: Tensors, layers: Layers) -> None:
    """The base is quantised, and what it is then gets the LoRA and is quantised again."""
    for module in layers.quantised(tensors):
        base = layers.base(f"{module}.weight")
        codec = FORMATS["fp8_scaled"]
        rounded = codec.decode(_encode("fp8_scaled", base), (base.shape[0], base.shape[1]))
        _put(tensors, module, _encode("fp8_scaled", rounded + (layers.exact(f"{module}.weight") - base)))


def _int8_as_fp8(tensors: Tensors, layers: Layers) -> None:
    """ComfyUI's old marker says that all codes are fp8, and readers turn these numbers into fp8."""
    for module in layers.quantised(tensors):
        exact = torch.from_numpy(layers.exact(f"{module}.weight"))
        scale = exact.abs().max() / 127
        del tensors[f"{module}.comfy_quant"]
        del tensors[f"{module}.weight_scale"]
        tensors[f"{module}.weight"] = (exact / scale).round().to(torch.int8)
        tensors[f"{module}.scale_weight"] = scale.reshape(())
    tensors["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)


def _without_flag(tensors: Tensors, _layers: Layers) -> None:
    del tensors[FLAG]


def _rounded_scales(tensors: Tensors, layers: Layers) -> None:
    for module in layers.quantised(tensors):
        scale = tensors[f"{module}.weight_scale"]
        tensors[f"{module}.weight_scale"] = scale.to(torch.bfloat16).float()


def _doubled_scale(tensors: Tensors, layers: Layers) -> None:
    tensors[f"{layers.quantised(tensors)[0]}.weight_scale"] *= 2


def _swapped_nibbles(tensors: Tensors, layers: Layers) -> None:
    for module in layers.quantised(tensors):
        codes = tensors[f"{module}.weight"]
        tensors[f"{module}.weight"] = (codes << 4) | (codes >> 4)


def _keep_list_ignored(tensors: Tensors, layers: Layers) -> None:
    for name in layers.matrices:
        with suppress(Unquantisable):  # pocket has rows of zeros
            _put(tensors, name.removesuffix(".weight"), _encode("fp8_scaled", layers.exact(name)))


def _wrong_group(tensors: Tensors, layers: Layers) -> None:
    """The rotation back is in groups of another size; where none divides the columns, there is none."""
    for module in layers.quantised(tensors):
        settings = json.loads(bytes(tensors[f"{module}.comfy_quant"].tolist()))
        columns = tensors[f"{module}.weight"].shape[1]
        others = [size for size in (256, 64, 16, 4) if columns % size == 0 and size != settings["convrot_groupsize"]]
        settings |= {"convrot_groupsize": others[0]} if others else {"convrot": False}
        tensors[f"{module}.comfy_quant"] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


WRONG: Mapping[str, WrongExport] = {
    "unscaled fp8": WrongExport("fp8_scaled", _unscaled, "small weights fall below fp8's smallest"),
    "LoRA added to codes": WrongExport("int8_convrot", _lora_on_codes, "the LoRA is gone"),
    "quantised first, fused after": WrongExport("fp8_scaled", _fused_after, "rounded twice, the LoRA partly gone"),
    "int8 under scaled_fp8": WrongExport("int8_convrot", _int8_as_fp8, "read as fp8: as bad as fp8, and keeps nothing"),
    "missing flag": WrongExport("int8_convrot", _without_flag, "edits are drawn in the older way"),
    "scale rounded to bf16": WrongExport("int8_convrot", _rounded_scales, "rows are up to .4 % too strong or weak"),
    "one scale doubled": WrongExport("int8_convrot", _doubled_scale, "one layer is twice as strong"),
    "nibbles swapped": WrongExport("nvfp4", _swapped_nibbles, "neighbours have changed places"),
    "keep-list ignored": WrongExport("fp8_scaled", _keep_list_ignored, "entry, time and output layers in fp8"),
    "group size wrong": WrongExport("int8_convrot", _wrong_group, "rotated back into something else"),
}


def wrong_export(name: str, checkpoint: Checkpoint, out: Path, *, base: Matrix, exact: Matrix) -> Path:
    """Write a wrong export of a merged checkpoint below `out`, and return its path.

    `base` and `exact` are the weights of base and merge by name, in float32. "missing flag" is of a model that has it.
    """
    control = WRONG[name]
    options = ExportOptions(matrix=exact)
    made = export(
        checkpoint, out, [control.format], name="wrong", metadata={}, progress=lambda _: None, options=options
    )
    ((place, _),) = made.items()
    with safe_open(out / place, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(out / place)
    matrices = tuple(name for name, info in checkpoint.tensors().items() if len(info.shape) == 2)
    control.spoil(tensors, Layers(base, exact, matrices))
    save_file(tensors, out / place, metadata)
    return out / place
