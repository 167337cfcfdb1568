"""comfy-kitchen, by which ComfyUI reads quantised weights, gives each weight of an export the values that we do."""

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lora_fuse.exports import problems, read_export
from tests.engines.conftest import CONFIG, Exported

pytestmark = pytest.mark.engines

# By comfy/quant_ops.py and the loading of quantised modules in comfy/ops.py, 0.33.0.
LAYOUTS = {
    "float8_e4m3fn": "TensorCoreFP8Layout",
    "int8_tensorwise": "TensorWiseINT8Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
}
MARKED = ("int8_convrot", "fp8_scaled", "mxfp8", "nvfp4")
CLOSE = 1e-6  # relative L2 of a weight; int8's rotation sums 256 products


@pytest.mark.parametrize("name", MARKED)
def test_every_marked_weight_is_read_alike(exported: Exported, name: str) -> None:
    file = exported.file(name)
    assert problems(file, CONFIG) == []
    shapes = {one: tuple(weight.shape) for one, weight in exported.model().named_parameters()}
    ours = {tensor: torch.from_numpy(values) for tensor, values in read_export(file, shapes)}
    with safe_open(file, "pt") as stored:
        modules = [key.removesuffix(".comfy_quant") for key in stored.keys() if key.endswith(".comfy_quant")]  # noqa: SIM118 - no mapping
        for module in modules:
            theirs = _read(stored, module, tuple(ours[f"{module}.weight"].shape))
            error = float((theirs - ours[f"{module}.weight"]).norm() / theirs.norm())
            assert error <= CLOSE, module
    assert modules


def _read(stored: Any, module: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 values of a module's weight, its tensors taken as ComfyUI takes them."""
    from comfy_kitchen import tensor

    names = set(stored.keys())
    settings = json.loads(stored.get_tensor(f"{module}.comfy_quant").numpy().tobytes())
    scale = stored.get_tensor(f"{module}.weight_scale")
    scales: dict[str, Any] = {"scale": scale}
    if f"{module}.weight_scale_2" in names:
        scales = {"scale": stored.get_tensor(f"{module}.weight_scale_2"), "block_scale": scale}
    if settings.get("convrot"):
        scales |= {"convrot": True, "convrot_groupsize": settings["convrot_groupsize"]}
    layout = getattr(tensor, LAYOUTS[settings["format"]])
    params = layout.Params(**scales, orig_dtype=torch.float32, orig_shape=shape)
    values: torch.Tensor = layout.dequantize(stored.get_tensor(f"{module}.weight"), params)
    return values[: shape[0], : shape[1]]
