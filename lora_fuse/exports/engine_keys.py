"""The readers of exports as data: the names, shapes, marks and flags by which a file is read.

ComfyUI is in no package index, and it draws wrong pictures from a file that it misreads without a word. By its source,
0.3.64 (October 2025) and 0.33.0 (August 2026): `unet_prefix_from_state_dict` and `detect_unet_config` in
comfy/model_detection.py, `load_diffusion_model_state_dict` in comfy/sd.py, `scaled_fp8_ops` (0.3.64) and the loading of
quantised modules (0.33.0) in comfy/ops.py. A module's weight is quantised where a tensor `comfy_quant`, JSON as bytes,
stands beside it; codes are cast to the dtype that the JSON's format has, whatever dtype the file gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Settings = Mapping[str, Any]

NEWEST = "0.33.0"
MARK = "comfy_quant"  # beside a weight, since 0.8.0
SCALE = "weight_scale"
OLD_MARK = "scaled_fp8"  # of a whole file: every linear layer is float8_e4m3fn with `scale_weight`
OLD_SCALE = "scale_weight"
MOST_OF_MARK = 4096  # bytes of JSON that are read
PREFIXES = ("model.diffusion_model.", "model.model.", "net.")  # one that more than PREFIXED names begin with is cut off
PREFIXED = 5
FLOATS = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Codes:
    """Tensors of a quantised weight ``(N, K)`` by the format that its mark names.

    `weight` gives the shape of its codes, `scales` by the end of a name the dtype and the shapes that each may have.
    """

    dtype: str
    weight: Callable[[Shape], Shape]
    scales: Mapping[str, tuple[str, Callable[[Shape], tuple[Shape, ...]]]]
    optional: tuple[str, ...] = ("input_scale",)


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _tiles(block: int) -> Callable[[Shape], tuple[Shape, ...]]:
    """Shape of scales in cuBLAS' tiles of 128 by 4, one for each `block` columns."""
    return lambda shape: ((_rounded(shape[0], 128), _rounded(-(-shape[1] // block), 4)),)


def _scalar(_shape: Shape) -> tuple[Shape, ...]:
    return ((),)


_FP8 = {SCALE: ("F32", _scalar)}
CODES: Mapping[str, Codes] = {
    "float8_e4m3fn": Codes("F8_E4M3", lambda shape: shape, _FP8),
    "float8_e5m2": Codes("F8_E5M2", lambda shape: shape, _FP8),
    # One scale for each row is stable-diffusion.cpp's condition (model_loader.cpp at 97d29908); ComfyUI reads one too.
    "int8_tensorwise": Codes("I8", lambda shape: shape, {SCALE: ("F32", lambda shape: ((shape[0], 1),))}),
    "mxfp8": Codes(
        "F8_E4M3",
        lambda shape: (_rounded(shape[0], 32), _rounded(shape[1], 32)),
        {SCALE: ("F8_E8M0", _tiles(32))},
    ),
    "nvfp4": Codes(
        "U8",
        lambda shape: (_rounded(shape[0], 16), _rounded(shape[1], 16) // 2),
        {SCALE: ("F8_E4M3", _tiles(16)), "weight_scale_2": ("F32", _scalar)},
        ("input_scale", "pre_quant_scale"),
    ),
}


@dataclass(frozen=True, slots=True)
class ComfyVersion:
    """One version: the formats that its marks may name, and the flags that it knows."""

    formats: tuple[str, ...]
    flags: tuple[str, ...]


VERSIONS: Mapping[str, ComfyVersion] = {
    "0.3.64": ComfyVersion((), ()),
    NEWEST: ComfyVersion(tuple(CODES), ("__index_timestep_zero__",)),
}


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A transformer class as engines build it.

    A file is told by `told_by`, a GGUF by its `architecture`; `flags` are empty tensors that stand for a setting of
    `config.json` that is true. ComfyUI and stable-diffusion.cpp build one size, that of the published models.
    """

    told_by: str
    architecture: str
    shapes: Callable[[Settings], dict[str, Shape]]
    flags: Mapping[str, str] = field(default_factory=dict)


def _qwen_image(config: Settings) -> dict[str, Shape]:
    """Names and shapes of comfy/ldm/qwen_image/model.py; they are diffusers'."""
    head = config["attention_head_dim"]
    inner = head * config["num_attention_heads"]
    linears: dict[str, Shape] = {
        "img_in": (inner, config["in_channels"]),
        "txt_in": (inner, config["joint_attention_dim"]),
        "time_text_embed.timestep_embedder.linear_1": (inner, 256),
        "time_text_embed.timestep_embedder.linear_2": (inner, inner),
        "norm_out.linear": (2 * inner, inner),
        "proj_out": (config["patch_size"] ** 2 * config["out_channels"], inner),
    }
    vectors = {"txt_norm.weight": (config["joint_attention_dim"],)}
    for number in range(config["num_layers"]):
        block = f"transformer_blocks.{number}"
        for side in ("img", "txt"):
            linears[f"{block}.{side}_mod.1"] = (6 * inner, inner)
            linears[f"{block}.{side}_mlp.net.0.proj"] = (4 * inner, inner)
            linears[f"{block}.{side}_mlp.net.2"] = (inner, 4 * inner)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
            linears[f"{block}.attn.{name}"] = (inner, inner)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            vectors[f"{block}.attn.{name}.weight"] = (head,)
    shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in linears.items()} | vectors


FAMILIES: Mapping[str, BuiltModel] = {
    "QwenImageTransformer2DModel": BuiltModel(
        "txt_norm.weight",
        "qwen_image",
        _qwen_image,
        {"zero_cond_t": "__index_timestep_zero__"},
    ),
}
