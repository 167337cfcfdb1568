"""The names that trainers give to the tensors of a delta. Pure: a key in, module and role out.

One row of `FORMATS` is one way to write a delta; one row of `PREFIXES` is what a trainer puts before module names.
Nothing else in the library knows a key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Algorithm(StrEnum):
    """The formula of a delta of a weight; see `lora_fuse.lora.deltas`."""

    LORA = "LoRA"
    LOHA = "LoHa"
    LOKR = "LoKr"
    FULL = "full delta"
    SET = "whole parameter"


@dataclass(frozen=True, slots=True)
class KeyFormat:
    """A way to write keys: by a tensor's role, a regular expression for what follows the module's name and a dot.

    `usual_alpha` is the default of trainers that write such keys and an alpha for every module.
    """

    name: str
    algorithm: Algorithm
    endings: Mapping[str, str]
    usual_alpha: float | None = None


KOHYA_ALPHA = 1.0  # of --network_alpha in sd-scripts and musubi-tuner; LyCORIS is trained with them
PEFT_PREFIX = "base_model.model."

FORMATS = (
    KeyFormat(
        "lora_down/lora_up",  # kohya-ss/sd-scripts, lightx2v, LyCORIS (lora_mid: its Tucker convolutions)
        Algorithm.LORA,
        {"down": r"lora_down\.weight", "up": r"lora_up\.weight", "mid": r"lora_mid\.weight"},
        usual_alpha=KOHYA_ALPHA,
    ),
    KeyFormat(
        "lora_A/lora_B",  # huggingface/peft and diffusers; `lora_B.bias` is PEFT's lora_bias
        Algorithm.LORA,
        {"down": r"lora_A\.weight", "up": r"lora_B\.weight", "up bias": r"lora_B\.bias"},
    ),
    KeyFormat(
        "lora_A/lora_B of a named adapter",  # a PEFT model's own state dict, DiffSynth-Studio
        Algorithm.LORA,
        {"down": r"lora_A\.[^.]+\.weight", "up": r"lora_B\.[^.]+\.weight", "up bias": r"lora_B\.[^.]+\.bias"},
    ),
    KeyFormat("lora_A/lora_B without .weight", Algorithm.LORA, {"down": r"lora_A", "up": r"lora_B"}),
    KeyFormat("lora.down/lora.up", Algorithm.LORA, {"down": r"lora\.down\.weight", "up": r"lora\.up\.weight"}),
    KeyFormat(
        "lora_linear_layer",  # diffusers before it used PEFT
        Algorithm.LORA,
        {"down": r"lora_linear_layer\.down\.weight", "up": r"lora_linear_layer\.up\.weight"},
    ),
    KeyFormat(
        "LoHa",  # LyCORIS, modules/loha.py
        Algorithm.LOHA,
        {name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        usual_alpha=KOHYA_ALPHA,
    ),
    KeyFormat(
        "LoKr",  # LyCORIS, modules/lokr.py
        Algorithm.LOKR,
        {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
        usual_alpha=KOHYA_ALPHA,
    ),
    KeyFormat(
        "diff",  # LyCORIS, modules/full.py; ComfyUI; diff_m, of a block's modulation, in lightx2v's LoRAs for Wan
        Algorithm.FULL,
        {"diff": r"diff", "diff bias": r"diff_b", "diff modulation": r"diff_m"},
    ),
    KeyFormat("w_norm", Algorithm.FULL, {"diff": r"w_norm", "diff bias": r"b_norm"}),  # LyCORIS, modules/norms.py
    KeyFormat("set_weight", Algorithm.SET, {"set": r"set_weight"}),  # ComfyUI: in the base's place
)

# Tensors that go with a delta of any format.
SHARED = {
    "alpha": r"alpha",
    "dora_scale": r"dora_scale",  # DoRA as LyCORIS and kohya write it
    "magnitude": r"lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?",  # DoRA as PEFT writes it
}

# Before dotted names. The empty one comes first: a name that the base has as it stands means that.
PREFIXES = (
    "",
    "transformer.",  # diffusers
    "unet.",  # diffusers
    "diffusion_model.",  # ComfyUI, ai-toolkit
    "model.diffusion_model.",
    PEFT_PREFIX,
    "base_model.model.transformer.",
    "transformer.base_model.model.",  # SimpleTuner
    "transformer_2.",
    *(f"{encoder}." for encoder in ("text_encoder", "text_encoder_2", "text_encoder_3")),  # diffusers
)
# Before names whose dots have become underscores.
FLAT_PREFIXES = (
    "lora_unet_",  # kohya, musubi-tuner
    "lora_transformer_",  # OneTrainer
    "lycoris_",  # LyCORIS
    *("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_"),  # kohya, OneTrainer
)
CLIP_PREFIX = "text_model"
# Before the names of a component that is not the main one, and its folder; the first that a name begins with counts.
COMPONENTS = {
    "transformer_2.": "transformer_2",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoder": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te": "text_encoder",
    "conditioner.": "text_encoder",
    "text_model.": "text_encoder",
    "vae.": "vae",
    "lora_vae": "vae",
}

# Parts of keys of no format here, and what they are; the first that is in a key counts.
UNREAD = {
    r"oft_|boft_": "OFT or BOFT, which turns weights instead of adding to them",  # LyCORIS, PEFT, kohya
    r"\.(?:a|b|bm)[12](?:\.weight)?$": "GLoRA",  # LyCORIS, modules/glora.py
    r"\.on_input$|ia3_l": "(IA)3, which multiplies",  # LyCORIS, modules/ia3.py; PEFT
    r"lora_embedding_": "a LoRA of an embedding",  # PEFT
    r"lora_E|ranknum": "AdaLoRA",  # PEFT
    r"lora_diag": "KaSA",  # PEFT
    r"vera_": "VeRA",  # PEFT
    r"\.reshape_weight$": "a base's weight in another shape",  # ComfyUI, of FLUX.1's control LoRAs
    r"\bbundle_emb\b|^emb_params$": "an embedding beside the LoRA",  # OneTrainer, A1111
    r"_lora\d?\.(?:down|up)\.": "an attention processor's, of diffusers before it used PEFT or of XLabs",
    r"\.base_layer\.": "a model that PEFT has wrapped, not an adapter: save the adapter alone",
    r"\.(?:weight|bias|scale)$": "whole parameters",
}

_ROLES = tuple(
    (re.compile(rf"(?P<module>.+?)\.{ending}"), format_, role)
    for format_ in FORMATS
    for role, ending in format_.endings.items()
) + tuple((re.compile(rf"(?P<module>.+?)\.{ending}"), None, role) for role, ending in SHARED.items())


# Beginnings of the last part of a name, as some write them, and as models have them.
REWRITTEN = ((re.compile(r"\.to\.(?=[qkv]$)"), ".to_"),)  # LoRAs for Z-Image, huggingface/diffusers#13203


def read_key(key: str) -> tuple[str, KeyFormat | None, str] | None:
    """Module, format (None for what goes with any) and role of a key; None if it is of no known format."""
    for pattern, format_, role in _ROLES:
        if match := pattern.fullmatch(key):
            module = match["module"]
            for written, meant in REWRITTEN:
                module = written.sub(meant, module)
            return module, format_, role
    return None


def unread_kind(key: str) -> str | None:
    """The kind of a key of no known format, as far as `UNREAD` tells."""
    return next((kind for part, kind in UNREAD.items() if re.search(part, key)), None)


def component_of(key: str) -> str | None:
    """The component that a key is for, by its folder, as far as its beginning tells; None for the main one."""
    return next((name for start, name in COMPONENTS.items() if key.startswith(start)), None)


def spellings(module: str, prefixes: Iterable[str]) -> list[str]:
    """The names that a module of a file may have in the base: without its prefix.

    CLIP's text encoders have `CLIP_PREFIX` before their names, or since transformers 5 not.
    """
    names = [module.removeprefix(prefix) for prefix in prefixes if module.startswith(prefix)]
    if (component_of(module) or "").startswith("text_encoder"):
        names += [_other_clip_name(name) for name in names]
    return names


def _other_clip_name(name: str) -> str:
    dot = "." if "." in name else "_"
    prefix = f"{CLIP_PREFIX}{dot}"
    return name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
