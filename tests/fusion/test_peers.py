"""The merge against those of PEFT and diffusers, on every kind of file that they can read."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageTransformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from tests.support.key_styles import STYLES, Weights, fused

TARGETS = ("attn.to_q", "attn.to_out.0", "attn.add_q_proj", "img_mlp.net.0.proj", "txt_mlp.net.2")


def transformer() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def lora(style: str, alpha: float | None) -> Weights:
    generator = torch.Generator().manual_seed(1)
    modules = dict(transformer().named_modules())
    down, up = STYLES[style]
    state: Weights = {}
    for target in TARGETS:
        module = f"transformer_blocks.0.{target}"
        rows, columns = modules[module].weight.shape
        ends = {down: (4, columns), up: (rows, 4)}
        for template, shape in ends.items():
            key = template.replace("{_}", module.replace(".", "_")).replace("{}", module)
            state[key] = torch.randn(*shape, generator=generator) / 4
        if alpha is not None:
            state[key.split(".lora_")[0].split(".lora.")[0] + ".alpha"] = torch.tensor(alpha)
    return state


def diffusers_fuses(file: Path, scale: float, dtype: torch.dtype) -> Weights:
    nothing = dict.fromkeys(inspect.signature(QwenImageEditPipeline).parameters)
    pipe = QwenImageEditPipeline(**nothing | {"transformer": transformer().to(dtype)})
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    state: Weights = pipe.transformer.state_dict()
    return state


# What diffusers 0.42 reads without loss; of the others it loads nothing, with a warning, or raises.
READ_BY_DIFFUSERS = [
    ("lightning", 2.0), ("diffusers", None), ("bare", 2.0), ("diffsynth", None), ("diffsynth", 2.0),
    ("ai-toolkit", None), ("ai-toolkit", 2.0), ("comfyui", None), ("comfyui", 2.0), ("kohya", None), ("kohya", 2.0),
    ("old diffusers", None),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize(("style", "alpha"), READ_BY_DIFFUSERS)
def test_diffusers_fuses_the_same(tmp_path: Path, style: str, alpha: float | None, dtype: torch.dtype) -> None:
    transformer().to(dtype).save_pretrained(tmp_path / "base")
    # in bfloat16 at 1.0 and with factors of that dtype: diffusers rounds factors and scaled product, too
    file, scale = tmp_path / "lora.safetensors", 0.8 if dtype == torch.float32 else 1.0
    save_file({key: value.to(dtype) for key, value in lora(style, alpha).items()}, file)
    ours = fused(tmp_path / "base", file, scale, tmp_path / "out")
    theirs, before = diffusers_fuses(file, scale, dtype), transformer().to(dtype).state_dict()
    changed = {name for name, value in ours.items() if not torch.equal(value, before[name])}
    assert changed == {f"transformer_blocks.0.{target}.weight" for target in TARGETS}
    for name, value in ours.items():
        difference = (value.double() - theirs[name].double()).abs()
        if dtype == torch.float32:
            assert float(difference.max()) <= 1e-6, name
        else:  # they round the delta and the sum, we the sum: each is off by at most 2**-8 of what it rounds
            delta = (value.double() - before[name].double()).abs()
            assert bool((difference <= 2.0**-8 * (delta + 2 * value.double().abs())).all()), name


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")  # of a bias, which has one dimension
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"attn.to_q": 7}},
        {"use_dora": True, "use_rslora": True},
    ],
    ids=str,
)
def test_peft_merges_the_same(tmp_path: Path, settings: Mapping[str, Any]) -> None:
    transformer().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS), init_lora_weights=False, **settings)
    model = get_peft_model(transformer(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "lora")
    ours = fused(tmp_path / "base", tmp_path / "lora", 1.0, tmp_path / "out")
    theirs, before = model.merge_and_unload().state_dict(), transformer().state_dict()
    assert any(not torch.equal(ours[name], before[name]) for name in before)
    for name, value in ours.items():
        np.testing.assert_allclose(value.numpy(), theirs[name].numpy(), rtol=0, atol=1e-6, err_msg=name)
