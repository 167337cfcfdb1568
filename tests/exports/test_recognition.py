"""ComfyUI's reader as data: right files have no problem, and each wrong one is told."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from benchmarks.make_checkpoint import qwen_image_edit_config, tensor_shapes
from lora_fuse.checkpoint.dtypes import DTYPES
from lora_fuse.checkpoint.header import Header
from lora_fuse.errors import BadCheckpoint
from lora_fuse.exports import ExportOptions, export
from lora_fuse.exports.engine_keys import CODES, FAMILIES
from lora_fuse.exports.export_contents import as_merged
from lora_fuse.exports.recognition import problems
from tests.support.matrices import qwen
from tests.support.wrong_exports import WRONG, wrong_export

CONFIG = {**qwen_image_edit_config(1), "zero_cond_t": True}
FLAG = "__index_timestep_zero__"
MODULE = "transformer_blocks.0.attn.to_q"
OTHER = "transformer_blocks.0.img_mlp.net.2"
ROTATED = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}

Tensors = dict[str, tuple[str, tuple[int, ...]]]
Marks = dict[str, object]


def plain() -> Tensors:
    """A file of real shapes, as `single_file` writes it."""
    family = FAMILIES["QwenImageTransformer2DModel"]
    return {FLAG: ("F32", (0,)), **{name: ("BF16", shape) for name, shape in family.shapes(CONFIG).items()}}


def quantised(settings: Mapping[str, Any]) -> tuple[Tensors, Marks]:
    """The same with two weights quantised as a format of `CODES` says."""
    tensors = plain()
    codes = CODES[settings["format"]]
    for module in (MODULE, OTHER):
        shape = tensors[f"{module}.weight"][1]
        tensors[f"{module}.weight"] = (codes.dtype, codes.weight(shape))
        tensors |= {f"{module}.{end}": (dtype, shapes(shape)[0]) for end, (dtype, shapes) in codes.scales.items()}
    return tensors, dict.fromkeys((MODULE, OTHER), settings)


def write(path: Path, tensors: Tensors, marks: Marks | None = None) -> Path:
    """A file of which the disk holds only the header and the marks."""
    texts = {f"{module}.comfy_quant": json.dumps(mark).encode() for module, mark in (marks or {}).items()}
    tensors = tensors | {name: ("U8", (len(text),)) for name, text in texts.items()}
    entries: dict[str, dict[str, Any]] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * DTYPES[dtype].bits // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = Header.pack(entries, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + at)
        for name, text in texts.items():
            file.seek(len(header) + entries[name]["data_offsets"][0])
            file.write(text)
    return path


def test_the_names_are_those_of_diffusers() -> None:
    """Of a model with other sizes too."""
    for config in (CONFIG, {**CONFIG, "num_layers": 2, "attention_head_dim": 24, "num_attention_heads": 5}):
        assert FAMILIES["QwenImageTransformer2DModel"].shapes(config) == tensor_shapes(config)


def test_a_right_file_has_no_problem(tmp_path: Path) -> None:
    bare = plain()
    prefixed = {f"model.diffusion_model.{name}": entry for name, entry in bare.items()}
    assert problems(write(tmp_path / "bare", bare), CONFIG) == []
    assert problems(write(tmp_path / "prefixed", prefixed), CONFIG) == []
    for settings in [{"format": name} for name in CODES] + [ROTATED]:
        assert problems(write(tmp_path / "quantised", *quantised(settings)), CONFIG) == [], settings


WRONG_NAMES: dict[str, dict[str, tuple[str, tuple[int, ...]] | None]] = {
    f"{MODULE}.weight is missing": {f"{MODULE}.weight": None},
    f"{MODULE}.lora_A.weight is unexpected": {f"{MODULE}.lora_A.weight": ("BF16", (4, 3072))},
    "has shape [3072, 3071], not [3072, 3072]": {f"{MODULE}.weight": ("BF16", (3072, 3071))},
    f"{FLAG} is missing": {FLAG: None},
    f"{FLAG} has shape [1], not [0]": {FLAG: ("F32", (1,))},
    f"{MODULE}.weight is F8_E4M3 without a mark": {f"{MODULE}.weight": ("F8_E4M3", (3072, 3072))},
    "txt_norm.weight is missing, by which": {"txt_norm.weight": None},
}


@pytest.mark.parametrize("words", WRONG_NAMES)
def test_a_wrong_name_or_shape_is_told(tmp_path: Path, words: str) -> None:
    changed = {**plain(), **WRONG_NAMES[words]}
    tensors = {name: entry for name, entry in changed.items() if entry is not None}
    (found,) = problems(write(tmp_path / "x", tensors), CONFIG)
    assert words in found


def test_a_flag_without_its_setting_is_told(tmp_path: Path) -> None:
    assert problems(write(tmp_path / "x", plain()), {**CONFIG, "zero_cond_t": False}) == [
        f"{FLAG} is there, and zero_cond_t is not true"
    ]


FP8 = {"format": "float8_e4m3fn"}
WRONG_CODES: dict[str, tuple[dict[str, Any], dict[str, Any], object]] = {
    "weight is I8 and marked float8_e4m3fn": (FP8, {"weight": ("I8", (3072, 3072))}, FP8),
    "weight_scale is missing": (FP8, {"weight_scale": None}, FP8),
    "weight_scale is F32 [3072, 1], and float8_e4m3fn has F32 []": (FP8, {"weight_scale": ("F32", (3072, 1))}, FP8),
    "weight_scale is F32 [], and int8_tensorwise has F32 [3072, 1]": (ROTATED, {"weight_scale": ("F32", ())}, ROTATED),
    "weight_scale is BF16 [3072, 1]": (ROTATED, {"weight_scale": ("BF16", (3072, 1))}, ROTATED),
    "has shape [3072, 3072], and nvfp4 has [3072, 1536]": (
        {"format": "nvfp4"},
        {"weight": ("U8", (3072, 3072))},
        {"format": "nvfp4"},
    ),
    "weight_scale is F8_E8M0 [96, 3072], and mxfp8 has F8_E8M0 [3072, 96]": (
        {"format": "mxfp8"},
        {"weight_scale": ("F8_E8M0", (96, 3072))},
        {"format": "mxfp8"},
    ),
    "names the format 'int4'": (ROTATED, {"weight_scale": None}, {"format": "int4"}),
    "names the format 'None'": (ROTATED, {"weight_scale": None}, [1]),
    "groups of 128, which is no power of 4": (ROTATED, {}, {**ROTATED, "convrot_groupsize": 128}),
    "groups of 4096, which do not divide 3072 columns": (ROTATED, {}, {**ROTATED, "convrot_groupsize": 4096}),
    "has a group of 256, and float8_e4m3fn": (FP8, {}, {**FP8, "convrot": True, "convrot_groupsize": 256}),
}


@pytest.mark.parametrize("words", WRONG_CODES)
def test_wrong_codes_scales_and_marks_are_told(tmp_path: Path, words: str) -> None:
    settings, changes, mark = WRONG_CODES[words]
    tensors, marks = quantised(settings)
    changed = tensors | {f"{MODULE}.{end}": entry for end, entry in changes.items()}
    tensors = {name: entry for name, entry in changed.items() if entry is not None}
    found = problems(write(tmp_path / "x", tensors, {**marks, MODULE: mark}), CONFIG)
    assert any(words in one for one in found), found
    assert all(MODULE in one for one in found)


def test_scales_of_rows_are_read_by_diffusers(tmp_path: Path) -> None:
    codes: Tensors = {f"{MODULE}.weight": ("F8_E4M3", (3072, 3072)), f"{MODULE}.weight_scale": ("F32", (3072,))}
    assert problems(write(tmp_path / "right", {**plain(), **codes}), CONFIG) == []
    one_scale: Tensors = {**codes, f"{MODULE}.weight_scale": ("F32", ())}
    (found,) = problems(write(tmp_path / "wrong", {**plain(), **one_scale}), CONFIG)
    assert "weight_scale is F32 [], and diffusers reads F32 [3072]" in found


SMALL = {**CONFIG, "num_attention_heads": 1, "attention_head_dim": 32, "joint_attention_dim": 64}


def in_gguf(path: Path, name: str = "", shape: tuple[int, ...] | None = None, architecture: str = "qwen_image") -> Path:
    """A GGUF file of a small model, by gguf-py, in which the tensor `name` has another shape, or is not there."""
    shapes = {FLAG: (0,), **FAMILIES["QwenImageTransformer2DModel"].shapes(SMALL)}
    shapes |= {name: shape} if shape else {}
    writer = gguf.GGUFWriter(path, architecture)
    for one, of_it in shapes.items():
        if shape or one != name:
            writer.add_tensor(one, np.zeros(of_it, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_has_an_architecture_bare_names_and_an_empty_flag(tmp_path: Path) -> None:
    assert problems(in_gguf(tmp_path / "right.gguf"), SMALL) == []
    wrong = {
        "general.architecture is 'flux', not 'qwen_image'": in_gguf(tmp_path / "1.gguf", architecture="flux"),
        f"{FLAG} has shape [1], not [0]": in_gguf(tmp_path / "2.gguf", FLAG, (1,)),
        f"{FLAG} is missing": in_gguf(tmp_path / "3.gguf", FLAG),
        "img_in.bias is missing": in_gguf(tmp_path / "4.gguf", "img_in.bias"),
        "img_in.bias has shape [31], not [32]": in_gguf(tmp_path / "5.gguf", "img_in.bias", (31,)),
        "model.img_in.bias is unexpected": in_gguf(tmp_path / "6.gguf", "model.img_in.bias", (32,)),
    }
    assert any(FLAG in one for one in problems(tmp_path / "right.gguf", SMALL, "0.3.64"))
    for words, path in wrong.items():
        (found,) = problems(path, SMALL)
        assert words in found


SPOILT = {"int8 under scaled_fp8": "scaled_fp8", "missing flag": FLAG}


@pytest.mark.parametrize("name", SPOILT)
def test_wrong_exports_of_which_names_and_marks_tell_are_told(tmp_path: Path, name: str) -> None:
    """Of the others values tell, and those are not looked at; both are smaller than a model, which is told too."""
    checkpoint = qwen(tmp_path / "t", zero_cond_t=True)
    merged = as_merged(checkpoint)
    options = ExportOptions(matrix=merged)
    (place,) = export(
        checkpoint,
        tmp_path / "right",
        [WRONG[name].format],
        name="x",
        metadata={},
        progress=lambda _: None,
        options=options,
    )
    right = problems(tmp_path / "right" / place, CONFIG)
    wrong = problems(wrong_export(name, checkpoint, tmp_path / "wrong", base=merged, exact=merged), CONFIG)
    assert not any(SPOILT[name] in one for one in right)
    assert any(SPOILT[name] in one for one in wrong)


def test_integers_under_the_mark_of_float8_are_told(tmp_path: Path) -> None:
    """A converter writes them so, and ComfyUI takes them for float8 without a word."""
    tensors = {**plain(), "scaled_fp8": ("F8_E4M3", (0,))}
    for name, (_, shape) in plain().items():
        if len(shape) == 2:
            tensors[name] = ("F8_E4M3", shape)
            tensors[f"{name.removesuffix('weight')}scale_weight"] = ("F32", ())
    assert problems(write(tmp_path / "right", tensors), CONFIG) == []
    tensors[f"{MODULE}.weight"] = ("I8", (3072, 3072))
    (found,) = problems(write(tmp_path / "wrong", tensors), CONFIG)
    assert f"{MODULE}.weight is I8 in a file marked scaled_fp8" in found


def test_a_matrix_that_was_kept_is_told_under_the_old_mark(tmp_path: Path) -> None:
    (found,) = [
        one
        for one in problems(write(tmp_path / "x", {**plain(), "scaled_fp8": ("F8_E4M3", (0,))}), CONFIG)
        if one.startswith("img_in.scale")
    ]
    assert "missing in a file marked scaled_fp8" in found


def test_the_version_of_2025_knows_no_marks_and_no_flag(tmp_path: Path) -> None:
    found = problems(write(tmp_path / "x", *quantised(FP8)), CONFIG, "0.3.64")
    assert f"{MODULE}.comfy_quant is not known to ComfyUI 0.3.64, which reads the codes as values" in found
    assert any(FLAG in one and "draws a model with zero_cond_t as one without" in one for one in found)
    without = {name: entry for name, entry in plain().items() if name != FLAG}
    assert problems(write(tmp_path / "y", without), {**CONFIG, "zero_cond_t": False}, "0.3.64") == []


def test_a_model_of_which_nothing_is_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"FluxTransformer2DModel.*known are those of Qwen"):
        problems(tmp_path / "none", {"_class_name": "FluxTransformer2DModel"})
