"""LoRAs of every family as people hold them: names, roles and cases of their own, on tiny bases in memory."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from tests.support.key_styles import Tensors
from tests.support.original_names import FAMILY_OF, RANK, family_of, original, random_lora, spelt, weights
from tests.tiny_models import texts

# Tiny models by the families and kinds that have their names: Wan 2.2 has those of 2.1's text to video, and so on.
TITLES = {
    "qwen_image": "Qwen-Image",
    "qwen_image_21": "Qwen-Image-2.1",
    "wan_22": "Wan 2.2, 2.1 T2V",
    "wan_21_i2v": "Wan 2.1 I2V",
    "flux_1": "FLUX.1",
    "flux_2": "FLUX.2",
    "z_image": "Z-Image",
    "krea_2": "Krea 2",
    "ltx_2": "LTX-2",
    "sdxl": "SDXL",
}
PREFIX = "model.diffusion_model."


@dataclass(frozen=True, slots=True)
class Case:
    """A base and a LoRA, both as tensors, and the keys of the LoRA that are left out on purpose.

    The base is a component, or one file, or where it has `encoders` a pipeline of a UNet and these.
    """

    base: Tensors
    lora: Tensors
    leave_out: tuple[str, ...] = ()
    as_file: bool = False
    encoders: Mapping[str, Tensors] = field(default_factory=dict)


@cache
def weights_of(name: str) -> Tensors:
    """The parameters of a tiny model, one block of each kind."""
    left = r"^(?!down_blocks\.1|conv_in|time_emb)" if name == "sdxl" else r"(blocks|layers|refiner)\.1\."
    return {key: values for key, values in weights(name).items() if not re.search(left, key)}


@cache
def originals_of(name: str) -> Tensors | None:
    """The same in the names of its original checkpoint; None where these are diffusers' own."""
    return original(family_of(name), weights_of(name)) if name in FAMILY_OF else None


def peft(factors: Tensors) -> Tensors:
    """The same factors in PEFT's words, which has no alpha in the file."""
    named = {"lora_down": "lora_A", "lora_up": "lora_B"}
    return {
        f"{module}.{named[role]}.weight": values
        for key, values in factors.items()
        for module, _, role in (key.removesuffix(".weight").rpartition("."),)
        if role in named
    }


def _plain(tensors: Tensors) -> Tensors:
    return random_lora(tensors)[0]


# Spellings of whole LoRAs on diffusers' base: of diffusers' names, then of the original ones.
OWN: Mapping[str, Callable[[Tensors], Tensors]] = {
    "`NAME.lora_down`": _plain,
    "`transformer.NAME.lora_A`": lambda own: spelt(peft(_plain(own)), "transformer."),
    "`diffusion_model.NAME`": lambda own: spelt(_plain(own), "diffusion_model."),
    "`lora_unet_NAME`": lambda own: spelt(_plain(own), "lora_unet_", flat=True),
    "`lycoris_NAME`": lambda own: spelt(_plain(own), "lycoris_", flat=True),
    "`transformer.base_model.model.NAME`": lambda own: spelt(peft(_plain(own)), "transformer.base_model.model."),
}
THEIRS: Mapping[str, Callable[[Tensors], Tensors]] = {
    "`diffusion_model.ORIGINAL`": lambda theirs: spelt(peft(_plain(theirs)), "diffusion_model."),
    "`lora_unet_ORIGINAL`": lambda theirs: spelt(_plain(theirs), "lora_unet_", flat=True),
}
ON_A_FILE = ("`NAME` on the original file", "`ORIGINAL` on the original file")


def spellings(name: str) -> dict[str, Case | None]:
    """A case by spelling; None where a family has no such names."""
    own = weights_of(name)
    theirs = originals_of(name)
    made: dict[str, Case | None] = {spelling: Case(own, write(own)) for spelling, write in OWN.items()}
    made |= {spelling: theirs and Case(own, write(theirs)) for spelling, write in THEIRS.items()}  # type: ignore[misc]
    one_file = theirs and {f"{PREFIX}{key}": values for key, values in theirs.items()}
    for column, tensors in zip(ON_A_FILE, (own, theirs), strict=True):
        made[column] = Case(one_file, spelt(_plain(tensors), ""), as_file=True) if one_file and tensors else None
    return made


def _random(*shape: int) -> Any:
    return np.random.default_rng(11).standard_normal(shape).astype(np.float32) / 4


def _one(module: str, shape: tuple[int, ...], **parts: tuple[int, ...]) -> Tensors:
    return {f"{module}.{part.replace('__', '.')}": _random(*size) for part, size in parts.items()}


def roles(name: str) -> dict[str, Case | None]:
    """A case by role, in original names where a family has some, on a module that is cut where one is."""
    own = weights_of(name)
    theirs = originals_of(name) or own
    module, (rows, columns) = _matrix(theirs, own)
    norm = next((key for key in theirs if "norm" in key and theirs[key].ndim == 1), None)
    kernel = next((key for key, values in theirs.items() if values.ndim > 3 and values.shape[-1] > 1), None)
    biases = [key for key in (f"{module}.bias", *theirs) if key in theirs and key.endswith(".bias")]
    modulation = next((key for key in theirs if key.endswith(".modulation")), None)
    tables = {
        "LoRA": _one(module, (), lora_down__weight=(RANK, columns), lora_up__weight=(rows, RANK)),
        "LoHa": _one(
            module, (), hada_w1_a=(rows, 2), hada_w1_b=(2, columns), hada_w2_a=(rows, 2), hada_w2_b=(2, columns)
        ),
        "LoKr": _one(module, (), lokr_w1=(2, 2), lokr_w2=(rows // 2, columns // 2)),
        "DoRA by rows": _dora(module, rows, columns, (rows, 1)),
        "DoRA by columns": _dora(module, rows, columns, (1, columns)),
        "`.diff`": _one(module, (), diff=(rows, columns)),
        "`.diff_b`": {f"{bias.removesuffix('.bias')}.diff_b": _random(*theirs[bias].shape) for bias in biases[:1]},
        "norm `.diff`": norm and {norm.rpartition(".")[0] + ".diff": _random(*theirs[norm].shape)},
        "`.w_norm`": norm and {norm.rpartition(".")[0] + ".w_norm": _random(*theirs[norm].shape)},
        "`.diff_m`": modulation and {modulation.replace(".modulation", ".diff_m"): _random(*theirs[modulation].shape)},
        "`.set_weight`": _one(module, (), set_weight=(rows, columns)),
        "Tucker": kernel and _tucker(kernel.removesuffix(".weight"), theirs[kernel].shape),
        "OFT": _one(module, (), oft_blocks=(2, 4, 4)),
        "BOFT": _one(module, (), oft_blocks=(2, 2, 4, 4)),
    }
    return {role: Case(own, lora) if lora else None for role, lora in tables.items()}


def _matrix(theirs: Tensors, own: Tensors) -> tuple[str, tuple[int, int]]:
    """A matrix that the two spellings cut differently, or any of a block."""
    blocks = [key for key in theirs if key.endswith(".weight") and theirs[key].ndim == 2 and ".0." in key]
    cut = [key for key in blocks if not any(values.shape == theirs[key].shape for values in own.values())]
    key = (cut or blocks)[0]
    rows, columns = theirs[key].shape
    return key.removesuffix(".weight"), (rows, columns)


def _dora(module: str, rows: int, columns: int, magnitudes: tuple[int, int]) -> Tensors:
    made = _one(module, (), lora_down__weight=(RANK, columns), lora_up__weight=(rows, RANK))
    return made | {f"{module}.dora_scale": np.abs(_random(*magnitudes)) + 1}


def _tucker(module: str, shape: tuple[int, ...]) -> Tensors:
    ones = (1,) * (len(shape) - 2)
    return _one(
        module,
        (),
        lora_down__weight=(2, shape[1], *ones),
        lora_mid__weight=(2, 2, *shape[2:]),
        lora_up__weight=(shape[0], 2, *ones),
    )


def cases() -> Iterator[tuple[str, str, Case]]:
    """Files that people met, by family and words."""
    flux, flux_2, zimage, sdxl = (weights_of(name) for name in ("flux_1", "flux_2", "z_image", "sdxl"))
    flux_theirs = originals_of("flux_1") or {}
    i2v = originals_of("wan_21_i2v") or {}
    yield "flux_1", "XLabs: `double_blocks.0.processor.qkv_lora1`", Case(flux, _processor(flux_theirs))
    wide = np.zeros((16, 128), np.float32)
    yield "flux_1", "BFL's control LoRA: `img_in` of 128 channels", Case(flux, _plain({"img_in.weight": wide}))
    yield "flux_2", "a LoRA of FLUX.1", Case(flux_2, _plain(flux))
    qwen = weights_of("qwen_image_21")
    yield "qwen_image_21", "a LoRA of Qwen-Image of 20B", Case(qwen, _plain(weights_of("qwen_image")))
    wan = weights_of("wan_22_i2v")
    yield "wan_22", "I2V: a LoRA of Wan 2.1 I2V, with `k_img`, `v_img`, `img_emb`", Case(wan, _plain(i2v))
    left = ("*.k_img.*", "*.v_img.*", "img_emb.*")
    yield "wan_22", "I2V: the same, these left out", Case(wan, _plain(i2v), left)
    yield "z_image", "`qkv` and `to_q`, `to_k`, `to_v` in one file", Case(zimage, _both(zimage))
    bundle = _plain(zimage) | {"bundle_emb.mine.clip_l": _random(2, 8)}
    yield "z_image", "with a bundled embedding, `bundle_emb`", Case(zimage, bundle)
    yield "z_image", "the same, it left out", Case(zimage, bundle, ("bundle_emb.*",))
    encoders = {"text_encoder": _encoder(projection=False), "text_encoder_2": _encoder(projection=True)}
    kohya = spelt(_plain(sdxl), "lora_unet_", flat=True)
    for number, tensors in enumerate(encoders.values(), 1):
        kohya |= spelt(_plain(tensors), f"lora_te{number}_", flat=True)
    yield "sdxl", "`lora_unet_`, `lora_te1_` and `lora_te2_` on a pipeline", Case(sdxl, kohya, encoders=encoders)
    yield "sdxl", "the same on the UNet alone", Case(sdxl, kohya)
    yield "sdxl", "the same, those of text encoders left out", Case(sdxl, kohya, ("lora_te*",))


def _processor(theirs: Tensors) -> Tensors:
    rows, columns = theirs["double_blocks.0.img_attn.qkv.weight"].shape
    at = "double_blocks.0.processor.qkv_lora1"
    return {f"{at}.down.weight": _random(2, columns), f"{at}.up.weight": _random(rows, 2)}


def _both(own: Tensors) -> Tensors:
    names = [f"layers.0.attention.to_{part}.weight" for part in "qkv"]
    split = _plain({name: own[name] for name in names})
    return split | _plain({"layers.0.attention.qkv.weight": np.concatenate([own[name] for name in names])})


def _encoder(*, projection: bool) -> Tensors:
    state = texts.clip(projection=projection).state_dict()
    tower = "" if projection else texts.TOWER
    return {f"{tower}{key}": value.detach().numpy() for key, value in state.items() if ".q_proj.weight" in key}
