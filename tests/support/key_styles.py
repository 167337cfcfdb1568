"""The key styles of LoRA files, and every kind of update with its formula, as plain numpy on small matrices."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import make_plan
from lora_fuse.lora.inputs import LoraInput
from lora_fuse.verification.rederivation import Expectation, verify_merge
from tests.support import tiny

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Formula = Callable[[Tensors, Array, float], Any]  # of what the file holds, the weight, and the scale

RNG = np.random.default_rng(5)
X = "transformer_blocks.0.attn.to_q"  # 24 x 16, with a bias
CONV = "conv_in"  # 6 x 4 x 3 x 3
POINT = "conv_out"  # 8 x 6 x 1 x 1
LINE = "conv_line"  # 6 x 4 x 3
VOLUME = "conv_volume"  # 6 x 4 x 2 x 3 x 3
POSITIVE = ("dora_scale", "lora_magnitude_vector.weight")


def random(*shape: int) -> Array:
    return (RNG.standard_normal(shape) / 4).astype(np.float32)


def convolutions() -> Tensors:
    return tiny.weights() | {
        f"{CONV}.weight": random(6, 4, 3, 3).astype(tiny.BF16),
        f"{CONV}.bias": random(6).astype(tiny.BF16),
        f"{POINT}.weight": random(8, 6, 1, 1).astype(tiny.BF16),
        f"{LINE}.weight": random(6, 4, 3).astype(tiny.BF16),
        f"{VOLUME}.weight": random(6, 4, 2, 3, 3).astype(tiny.BF16),
    }


def product(t: Tensors) -> Any:
    return t["lora_up.weight"] @ t["lora_down.weight"]


def kernel(t: Tensors) -> Any:
    """A convolution of up, which is 1 x 1, after down."""
    return np.einsum("or,rihw->oihw", t["lora_up.weight"][..., 0, 0], t["lora_down.weight"])


def tucker_kernel(t: Tensors) -> Any:
    up, mid, down = (t[f"lora_{part}.weight"] for part in ("up", "mid", "down"))
    return np.einsum("pi,ij...,jr->pr...", up.reshape(len(up), -1), mid, down.reshape(len(down), -1))


def hadamard(t: Tensors, side: int) -> Any:
    return t[f"hada_w{side}_a"] @ t[f"hada_w{side}_b"]


def tucker(core: Array, a: Array, b: Array) -> Any:
    return np.einsum("ij...,jr,ip->pr...", core, b, a)


def tucker_hadamard(t: Tensors, side: int) -> Any:
    return tucker(t[f"hada_t{side}"], t[f"hada_w{side}_a"], t[f"hada_w{side}_b"])


def kronecker_kernel(t: Tensors) -> Any:
    w2 = tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    return np.einsum("ab,cd...->acbd...", t["lokr_w1"], w2).reshape(6, 4, *w2.shape[2:])


def unit(moved: Array, *axes: int) -> Any:
    return moved / np.sqrt((moved**2).sum(axes, keepdims=True))


def peft_dora(t: Tensors, w: Array, s: float) -> Any:
    moved = w + s * 0.5 * t["lora_B.weight"] @ t["lora_A.weight"]
    return t["lora_magnitude_vector.weight"][:, None] * unit(moved, 1)


LINEAR = {"lora_down.weight": (4, 16), "lora_up.weight": (24, 4)}
KERNEL = {"lora_down.weight": (3, 4, 3, 3), "lora_up.weight": (6, 3, 1, 1)}
PEFT = {"lora_A.weight": (4, 16), "lora_B.weight": (24, 4)}
HADAMARD = {"hada_w1_a": (24, 3), "hada_w1_b": (3, 16), "hada_w2_a": (24, 3), "hada_w2_b": (3, 16)}


def cores(*kernel: int) -> dict[str, tuple[int, ...]]:
    sides = {f"hada_w{n}_{side}": (3, rows) for n in (1, 2) for side, rows in (("a", 6), ("b", 4))}
    return sides | {f"hada_t{n}": (3, 3, *kernel) for n in (1, 2)}


# By name: the parameter, the shapes of what the file holds, its alpha, and the formula.
ALGORITHMS: Mapping[str, tuple[str, Mapping[str, tuple[int, ...]], float | None, Formula]] = {
    "LoRA": (f"{X}.weight", {"lora_down.weight": (3, 16), "lora_up.weight": (24, 3)}, 2,
             lambda t, w, s: w + s * 2 / 3 * product(t)),
    "LoRA, convolution": (f"{CONV}.weight", KERNEL, 2, lambda t, w, s: w + s * 2 / 3 * kernel(t)),
    "LoRA, Tucker": (
        f"{CONV}.weight",
        {"lora_down.weight": (3, 4, 1, 1), "lora_mid.weight": (3, 3, 3, 3), "lora_up.weight": (6, 3, 1, 1)}, None,
        lambda t, w, s: w + s * tucker_kernel(t)),
    "LoRA, Tucker of one dimension": (
        f"{LINE}.weight", {"lora_down.weight": (3, 4, 1), "lora_mid.weight": (3, 3, 3), "lora_up.weight": (6, 3, 1)},
        None, lambda t, w, s: w + s * tucker_kernel(t)),
    "LoRA, Tucker of three dimensions": (
        f"{VOLUME}.weight",
        {"lora_down.weight": (3, 4, 1, 1, 1), "lora_mid.weight": (3, 3, 2, 3, 3), "lora_up.weight": (6, 3, 1, 1, 1)},
        1.5, lambda t, w, s: w + s * 0.5 * tucker_kernel(t)),
    "LoHa, Tucker of one dimension": (f"{LINE}.weight", cores(3), None,
                                      lambda t, w, s: w + s * tucker_hadamard(t, 1) * tucker_hadamard(t, 2)),
    "LoHa, Tucker of three dimensions": (f"{VOLUME}.weight", cores(2, 3, 3), None,
                                         lambda t, w, s: w + s * tucker_hadamard(t, 1) * tucker_hadamard(t, 2)),
    "LoKr, Tucker of one dimension": (
        f"{LINE}.weight", {"lokr_w1": (2, 2), "lokr_w2_a": (3, 3), "lokr_w2_b": (3, 2), "lokr_t2": (3, 3, 3)}, None,
        lambda t, w, s: w + s * kronecker_kernel(t)),
    "LoKr, Tucker of three dimensions": (
        f"{VOLUME}.weight", {"lokr_w1": (2, 2), "lokr_w2_a": (3, 3), "lokr_w2_b": (3, 2), "lokr_t2": (3, 3, 2, 3, 3)},
        None, lambda t, w, s: w + s * kronecker_kernel(t)),
    "LoRA, 1x1 as linear": (f"{POINT}.weight", {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2)}, None,
                            lambda t, w, s: w + s * product(t)[..., None, None]),
    "LoHa": (f"{X}.weight", HADAMARD, 1.5, lambda t, w, s: w + s * 0.5 * hadamard(t, 1) * hadamard(t, 2)),
    "LoHa, Tucker": (f"{CONV}.weight", cores(3, 3), None,
                     lambda t, w, s: w + s * tucker_hadamard(t, 1) * tucker_hadamard(t, 2)),
    "LoKr, whole": (f"{X}.weight", {"lokr_w1": (4, 2), "lokr_w2": (6, 8)}, 64,  # alpha does not count here
                    lambda t, w, s: w + s * np.kron(t["lokr_w1"], t["lokr_w2"])),
    "LoKr, one factored": (
        f"{X}.weight", {"lokr_w1": (4, 2), "lokr_w2_a": (6, 3), "lokr_w2_b": (3, 8)}, 2,
        lambda t, w, s: w + s * 2 / 3 * np.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"])),
    "LoKr, both": (
        f"{X}.weight", {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 2), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 8)}, None,
        lambda t, w, s: w + s * np.kron(t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2_a"] @ t["lokr_w2_b"])),
    "LoKr, conv": (
        f"{CONV}.weight", {"lokr_w1": (2, 2), "lokr_w2_a": (3, 3), "lokr_w2_b": (3, 2), "lokr_t2": (3, 3, 3, 3)}, None,
        lambda t, w, s: w + s * kronecker_kernel(t)),
    "diff": (f"{X}.weight", {"diff": (24, 16)}, None, lambda t, w, s: w + s * t["diff"]),
    "diff_b": (f"{X}.bias", {"diff_b": (24,)}, None, lambda t, w, s: w + s * t["diff_b"]),
    "lora_B.bias": (f"{X}.bias", {**PEFT, "lora_B.bias": (24,)}, 2, lambda t, w, s: w + s * 0.5 * t["lora_B.bias"]),
    "DoRA, PEFT": (f"{X}.weight", {**PEFT, "lora_magnitude_vector.weight": (24,)}, 2, peft_dora),
    "DoRA, by row": (f"{X}.weight", {**LINEAR, "dora_scale": (24, 1)}, 2,
                     lambda t, w, s: w + s * (t["dora_scale"] * unit(w + 0.5 * product(t), 1) - w)),
    "DoRA, by column": (f"{X}.weight", {**LINEAR, "dora_scale": (1, 16)}, 2,
                        lambda t, w, s: w + s * (t["dora_scale"] * unit(w + 0.5 * product(t), 0) - w)),
    "DoRA, by column, conv": (f"{CONV}.weight", {**KERNEL, "dora_scale": (1, 4, 1, 1)}, None,
                              lambda t, w, s: w + s * (t["dora_scale"] * unit(w + kernel(t), 0, 2, 3) - w)),
}  # fmt: skip


def update_of(name: str) -> tuple[str, Tensors, Formula]:
    """An algorithm's parameter, what a file may hold for it, and the formula."""
    target, shapes, alpha, formula = ALGORITHMS[name]
    parts = {end: np.abs(random(*shape)) + 1 if end in POSITIVE else random(*shape) for end, shape in shapes.items()}
    return target, parts if alpha is None else {**parts, "alpha": np.array(alpha, np.float32)}, formula


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
    "simpletuner": (
        "transformer.base_model.model.{}.lora.down.weight",
        "transformer.base_model.model.{}.lora.up.weight",
    ),
    "unet": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
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
    assert found.problems == [], found.problems
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
