"""Bases that are no plain weights are refused as what they are: quantised, wrapped by PEFT, or no base at all."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from safetensors.torch import save_model

from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.checkpoint.stored import quantised_modules
from lora_fuse.errors import BadCheckpoint, UnmatchedTargets
from lora_fuse.fusion.plan import make_plan
from lora_fuse.lora.inputs import LoraInput
from tests.support import tiny
from tests.support.tiny import Array

MODULE = "transformer_blocks.0.attn.to_q"
NAME = f"{MODULE}.weight"
SCALE = np.ones(1, dtype=np.float32)
BYTES = np.arange(8, dtype=np.uint8)
FP8 = ml_dtypes.float8_e4m3fn
FNUZ = ml_dtypes.float8_e4m3fnuz


def codes(shape: tuple[int, ...]) -> Array:
    return np.ones(shape, dtype=np.int8)


SHAPE = tiny.LINEARS["attn.to_q"]
# What takes the place of the weight, by format, and the words that the refusal has to have.
QUANTISED: dict[str, tuple[dict[str, Array], str]] = {
    "bitsandbytes nf4": (
        {
            NAME: BYTES.reshape(-1, 1),
            f"{NAME}.absmax": SCALE,
            f"{NAME}.quant_map": SCALE,
            f"{NAME}.quant_state.bitsandbytes__nf4": BYTES,
        },
        "bitsandbytes",
    ),
    "bitsandbytes int8": ({NAME: codes(SHAPE), f"{MODULE}.SCB": SCALE}, "bitsandbytes"),
    "ComfyUI mixed": (
        {NAME: np.ones(SHAPE, FP8), f"{MODULE}.weight_scale": SCALE, f"{MODULE}.comfy_quant": BYTES},
        "ComfyUI",
    ),
    "int8 by row": ({NAME: codes(SHAPE), f"{MODULE}.weight_scale": SCALE}, "scaled fp8, fp4 or int8"),
    "blocks of fp8": ({NAME: np.ones(SHAPE, FP8), f"{MODULE}.weight_scale_inv": SCALE}, "scaled fp8"),
    "float16 with a scale": ({NAME: np.ones(SHAPE, np.float16), f"{MODULE}.scale_weight": SCALE}, "ComfyUI"),
    "bfloat16 with a scale": ({NAME: np.ones(SHAPE, tiny.BF16), f"{MODULE}.weight_scale_inv": SCALE}, "scaled fp8"),
    "a scale of nobody": ({NAME: np.ones(SHAPE, tiny.BF16), f"{MODULE}.my_scale": SCALE}, "a scale of unknown meaning"),
    "quanto": ({f"{NAME}._data": codes(SHAPE), f"{NAME}._scale": SCALE}, "quanto or torchao"),
    "GPTQ": ({f"{MODULE}.qweight": codes((4, 4)), f"{MODULE}.scales": SCALE, f"{MODULE}.qzeros": BYTES}, "GPTQ"),
    "nunchaku": ({f"{MODULE}.qweight": codes((4, 4)), f"{MODULE}.wscales": SCALE}, "nunchaku"),
    "fp8 of another kind": ({NAME: np.ones(SHAPE, FNUZ)}, "F8_E4M3FNUZ, as quantised weights are"),
}


def write_base(folder: Path, tensors: dict[str, Array], metadata: dict[str, str] | None = None) -> Path:
    """A base of one linear, and of a plain one that no LoRA is for."""
    path = folder / "base.safetensors"
    save_file({**tensors, "head.weight": np.ones((4, 4), tiny.BF16)}, path, metadata=metadata)
    return path


def plan(base: Path, lora: Path) -> None:
    make_plan(open_checkpoint(base), [LoraInput("lora", lora, 1.0)])


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA for that linear alone."""
    tensors = {key: part for key, part in tiny.lora_tensors(alpha=None).items() if key.startswith(MODULE)}
    return tiny.write_lora(tmp_path / "lora.safetensors", tensors)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_base_is_called_so(tmp_path: Path, lora: Path, kind: str) -> None:
    tensors, said = QUANTISED[kind]
    with pytest.raises(BadCheckpoint, match="quantised") as caught:
        plan(write_base(tmp_path, tensors), lora)
    assert said in str(caught.value)
    assert "made for another base" not in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    [
        {"quantization_config": '{"method": "svdquant"}'},
        {"_quantization_metadata": json.dumps({"layers": {MODULE: {"format": "float8_e4m3fn"}}})},
    ],
)
def test_a_header_that_says_quantised_is_believed(tmp_path: Path, lora: Path, metadata: dict[str, str]) -> None:
    base = write_base(tmp_path, {NAME: np.ones(SHAPE, tiny.BF16)}, metadata)
    with pytest.raises(BadCheckpoint, match=f"quantised.*{next(iter(metadata))}"):
        plan(base, lora)


def test_what_is_quantised_beside_the_targets_does_not_matter(tmp_path: Path, lora: Path) -> None:
    """A text encoder in fp8 in the same file, say; and a LoRA that fits nowhere is not blamed on it."""
    other = {"text.q.weight": np.ones((4, 4), FP8), "text.q.scale_weight": SCALE}
    plan(write_base(tmp_path, {NAME: np.ones(SHAPE, tiny.BF16), **other}), lora)
    with pytest.raises(UnmatchedTargets):
        plan(write_base(tmp_path, {"a.weight": np.ones((4, 4), tiny.BF16), **other}), lora)


MODELS = {
    "FLUX": lambda: FluxTransformer2DModel(num_layers=1, num_single_layers=1),
    "Qwen-Image": lambda: QwenImageTransformer2DModel(num_layers=1),
    "SDXL": lambda: UNet2DConditionModel(cross_attention_dim=64),
    "Wan": lambda: WanTransformer3DModel(num_layers=1),
}


@pytest.mark.parametrize("kind", MODELS)
def test_no_plain_model_has_a_mark_beside_a_weight(kind: str) -> None:
    with torch.device("meta"):
        names = list(MODELS[kind]().state_dict())
    marked = quantised_modules(names, {})
    assert not [one for one in marked.values() if one.certain or f"{one.module}.weight" in names]


def test_a_base_that_was_saved_with_a_lora_attached_says_so_until_it_is_taken_off(tmp_path: Path, lora: Path) -> None:
    linear = torch.nn.Linear(SHAPE[1], SHAPE[0])
    block = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"to_q": linear})})
    model = torch.nn.ModuleDict({"transformer_blocks": torch.nn.ModuleList([block])})
    wrapped = get_peft_model(model, LoraConfig(target_modules=["to_q"]))
    path = tmp_path / "base.safetensors"
    save_model(wrapped.base_model.model, str(path))
    with pytest.raises(BadCheckpoint, match=r"saved with a LoRA attached: .*base_layer.*unload_lora_weights\(\)"):
        plan(path, lora)
    save_model(wrapped.unload(), str(path))
    plan(path, lora)


def test_a_lora_in_the_place_of_the_base_is_called_one(lora: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"is a LoRA, as .* the base comes first"):
        plan(lora, lora)
