"""The key styles that LoRA files have."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import make_plan
from lora_fuse.lora.inputs import LoraInput
from lora_fuse.verification.rederivation import Expectation, verify_merge
from tests.support import tiny
from tests.support.algorithms import Tensors

# The key styles that FORMATS and PREFIXES make, as people meet them: down, up, and the alpha's module.
STYLES = {
    "lightning": ("{}.lora_down.weight", "{}.lora_up.weight"),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "diffsynth": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "diffsynth, transformer": ("transformer.{}.lora_A.default.weight", "transformer.{}.lora_B.default.weight"),
    "named adapter": ("transformer.{}.lora_A.adapter_0.weight", "transformer.{}.lora_B.adapter_0.weight"),
    "ai-toolkit": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "comfyui": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
    "model.diffusion_model": ("model.diffusion_model.{}.lora_A.weight", "model.diffusion_model.{}.lora_B.weight"),
    "transformer, down": ("transformer.{}.lora_down.weight", "transformer.{}.lora_up.weight"),
    "kohya": ("lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight"),
    "onetrainer": ("lora_transformer_{_}.lora_down.weight", "lora_transformer_{_}.lora_up.weight"),
    "lycoris": ("lycoris_{_}.lora_down.weight", "lycoris_{_}.lora_up.weight"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "peft, transformer": (
        "base_model.model.transformer.{}.lora_A.weight",
        "base_model.model.transformer.{}.lora_B.weight",
    ),
    "old diffusers": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight"),
    "linear layer": ("transformer.{}.lora_linear_layer.down.weight", "transformer.{}.lora_linear_layer.up.weight"),
    "without .weight": ("{}.lora_A", "{}.lora_B"),
}


def restyled(style: str, alpha: float | None) -> Tensors:
    """The tiny LoRA of `tiny.lora_tensors` under other keys."""
    made: Tensors = {}
    for key, tensor in tiny.lora_tensors(alpha=alpha).items():
        module, _, end = key.partition(".lora_") if ".lora_" in key else key.rpartition(".")
        down, up = STYLES[style]
        template = {"down.weight": down, "up.weight": up}.get(end, down.split(".lora")[0] + ".alpha")
        made[template.replace("{_}", module.replace(".", "_")).replace("{}", module)] = tensor
    return made


def merged(folder: Path, tensors: Tensors, scale: float = 1.0, base: Tensors | None = None, **how: str) -> Tensors:
    """Fuse a file into the tiny base, verify every row, and give the weights."""
    root = tiny.write_component(folder / "base", base or tiny.weights())
    lora = LoraInput("l", tiny.write_lora(folder / "l.safetensors", tensors, how or None), scale)
    out = folder / "out"
    write_merged(
        make_plan(open_checkpoint(root), [lora]), out, device="cpu", generated={}, known={}, progress=lambda _: None
    )
    found = verify_merge(out, root, [lora], component="", rows=None, expected=Expectation())
    assert found.problems == []
    wrong = verify_merge(
        out, root, [LoraInput("l", lora.path, scale + 0.5)], component="", rows=None, expected=Expectation()
    )
    assert not wrong.passed
    made: Tensors = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, framework="np") as handle:
            made |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return made


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in one)


Weights = dict[str, torch.Tensor]


def fused(base: Path, lora: Path, scale: float, out: Path) -> Weights:
    plan = make_plan(open_checkpoint(base), [LoraInput("l", lora, scale)])
    write_merged(plan, out, device="cpu", generated={}, known={}, progress=lambda _: None)
    return {key: tensor for file in out.glob("*.safetensors") for key, tensor in load_file(file).items()}
