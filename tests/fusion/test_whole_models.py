"""The merge of whole models of diffusers: every linear can be a target, by the formula, and nothing else changes."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel, QwenImageTransformer2DModel
from safetensors.torch import save_file
from torch import nn

from lora_fuse.checkpoint.header import TensorInfo
from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.fusion.torch_rounding import narrow
from lora_fuse.lora.key_parser import parse_lora
from lora_fuse.lora.matcher import match_targets
from tests.support.key_styles import STYLES, fused

Weights = dict[str, torch.Tensor]

RANK, ALPHA, SCALE = 3, 2.0, 0.7
SMALL: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "QwenImage": lambda: QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, **SMALL
    ),
    "QwenImage21": lambda: QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=2, context_in_dim=16, **SMALL
    ),
}
# Outside of the blocks and in them; a shared modulation, or one for each block and stream.
TARGETS = {
    "QwenImage": (
        "img_in", "txt_in", "proj_out", "norm_out.linear", "time_text_embed.timestep_embedder.linear_1",
        "transformer_blocks.0.img_mod.1", "transformer_blocks.1.txt_mod.1", "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_add_out", "transformer_blocks.1.attn.to_out.0",
        "transformer_blocks.0.img_mlp.net.0.proj", "transformer_blocks.1.txt_mlp.net.2",
    ),
    "QwenImage21": (
        "img_in", "txt_in.in_layer", "txt_in.out_layer", "proj_out", "norm_out.linear", "modulation.1",
        "time_text_embed.timestep_embedder.linear_2", "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_out.0", "transformer_blocks.0.img_mlp.proj", "transformer_blocks.1.img_mlp.out",
        "transformer_blocks.1.img_mlp.gate_layer",
    ),
}  # fmt: skip
# By key style; where there is none, it is the rank.
ALPHAS: dict[str, float | None] = {"diffusers": None, "kohya": ALPHA, "lightning": ALPHA}


def model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small model of that kind with random weights, where diffusers begins with zeros or ones, too."""
    made = MODELS[kind]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.25, generator=generator)
    return made.to(dtype)


def layers(of: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in of.named_modules() if isinstance(part, nn.Linear | nn.modules.conv._ConvNd)}


def factors(kind: str, targets: Iterable[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Down and up by module, in float32."""
    generator = torch.Generator().manual_seed(1)
    parts = layers(model(kind))
    made = {}
    for target in targets:
        weight = parts[target].get_parameter("weight")
        down = torch.randn(RANK, weight[0].numel(), generator=generator) / 4
        made[target] = down, torch.randn(len(weight), RANK, generator=generator) / 4
    return made


def lora(style: str, made: dict[str, tuple[torch.Tensor, torch.Tensor]], alpha: float | None) -> Weights:
    state: Weights = {}
    for module, ends in made.items():
        for template, tensor in zip(STYLES[style], ends, strict=True):
            key = template.replace("{_}", module.replace(".", "_")).replace("{}", module)
            state[key] = tensor
        if alpha is not None:
            state[f"{key.split('.lora_')[0]}.alpha"] = torch.tensor(alpha)
    return state


def stored(folder: Path) -> dict[str, tuple[str, bytes]]:
    held = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        for name, tensor in open_checkpoint(file).tensors().items():
            held[name] = tensor.dtype, data[tensor.start : tensor.end]
    return held


def told(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """What a header would say of tensors of those shapes; they lie nowhere."""
    return {name: TensorInfo(name, "F32", shape, 0, 4 * math.prod(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize("style", ALPHAS)
@pytest.mark.parametrize("kind", MODELS)
def test_targets_change_by_the_formula_and_nothing_else_changes(
    tmp_path: Path, kind: str, style: str, dtype: torch.dtype
) -> None:
    base, out, file = tmp_path / "base", tmp_path / "out", tmp_path / "lora.safetensors"
    whole: Any = model(kind, dtype)
    whole.save_pretrained(base)
    made = factors(kind, TARGETS[kind])
    save_file(lora(style, made, ALPHAS[style]), file)
    ours, before = fused(base, file, SCALE, out), whole.state_dict()
    share = SCALE * (1.0 if ALPHAS[style] is None else ALPHA / RANK)
    for module, (down, up) in made.items():
        name = f"{module}.weight"
        exact = before[name].double() + share * (up.double() @ down.double())
        assert ours[name].dtype == dtype
        torch.testing.assert_close(ours[name], narrow(exact, dtype), rtol=0, atol=0, msg=name)
        assert not torch.equal(ours[name], before[name])
    then, now = stored(base), stored(out)
    assert then.keys() == now.keys() == before.keys()
    assert {name for name in then if then[name] != now[name]} == {f"{module}.weight" for module in made}
    loaded = type(whole).from_pretrained(out, torch_dtype=dtype)
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.parametrize("kind", MODELS)
def test_diffusers_fuses_the_same_into_every_layer(tmp_path: Path, kind: str) -> None:
    theirs: Any = model(kind)
    theirs.save_pretrained(tmp_path / "base")
    made = factors(kind, layers(theirs))
    assert made.keys() > set(TARGETS[kind])
    state = lora("diffusers", made, None)
    save_file(state, tmp_path / "lora.safetensors")
    ours = fused(tmp_path / "base", tmp_path / "lora.safetensors", SCALE, tmp_path / "out")
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    theirs.load_lora_adapter(state, prefix="transformer")
    theirs.fuse_lora(lora_scale=SCALE)
    theirs.unload_lora()
    after = theirs.state_dict()
    assert after.keys() == ours.keys()
    assert {name for name in ours if not torch.equal(ours[name], before[name])} == {f"{name}.weight" for name in made}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, after[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("style", ["kohya", "onetrainer", "lycoris"])
@pytest.mark.parametrize("full", [QwenImageTransformer2DModel, QwenImage21Transformer2DModel], ids=["1", "21"])
def test_no_two_layers_of_a_full_model_share_a_flattened_name(full: Callable[[], nn.Module], style: str) -> None:
    with torch.device("meta"):
        whole = full()
    parts = layers(whole)
    shapes = {f"{name}.weight": part.get_parameter("weight").shape for name, part in parts.items()}
    keys: dict[str, tuple[int, ...]] = {}
    for name in parts:
        down, up = (template.format(_=name.replace(".", "_")) for template in STYLES[style])
        rows, *others = shapes[f"{name}.weight"]
        keys |= {down: (RANK, *others), up: (rows, RANK), f"{down.partition('.')[0]}.alpha": ()}
    assert len(keys) == 3 * len(parts)
    weights = told({name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()})
    alphas = {key: ALPHA for key in keys if key.endswith(".alpha")}
    matched = match_targets(parse_lora(told(keys), alphas, (), "l"), weights, "l")
    assert matched.keys() == shapes.keys()
    for name, (placed,) in matched.items():
        assert placed.delta.module.endswith(f"_{name.removesuffix('.weight').replace('.', '_')}")
        assert placed.delta.factor == ALPHA / RANK
