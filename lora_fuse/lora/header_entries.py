"""The metadata of a LoRA file's header: entries that state its strength or kind, and entries that mean nothing. Pure.

Trainers write what they like there. An entry goes by this list: it is read, it is known to mean nothing for a merge, or
neither. Of the last kind, one whose name speaks of strength or kind is refused, and the others are remarks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lora_fuse.errors import BadLora
from lora_fuse.lora.adapter_config import config_scale, is_peft_config, parse_adapter_config
from lora_fuse.lora.peft_fields import FIELDS
from lora_fuse.lora.scaling import StatedScale
from lora_fuse.machine import files

# One alpha, or one rank, for all modules. `alpha` and `rank`: lightx2v (sgl-project/sglang#36082, diffusers#14408);
# `network_alpha`, `network_dim`: kohya's options; `lora_alpha`, `r`: PEFT's fields (SimpleTuner, ComfyUI#15830).
ALPHAS = ("alpha", "lora_alpha", "network_alpha")
RANKS = ("rank", "r", "lora_rank", "network_dim", "lora_dim")
# The kind of adapter. The tensors' names say more, so that only what they cannot say is refused.
KINDS = ("adapter_type", "network_type", "lora_type", "peft_type", "algo", "algorithm")
KNOWN_KINDS = ("lora", "locon", "loha", "lokr", "dora", "lycoris", "full")
# Settings of kohya's trainers, networks.lora and LyCORIS (sd-scripts/train_network.py, train_util.py). The alpha and
# the rank are the defaults of the run: its network_args may give other modules others.
KOHYA_ALPHA = "ss_network_alpha"
KOHYA_RANK = "ss_network_dim"
KOHYA_ARGS = "ss_network_args"
# Arguments that give modules other ranks, alphas or algorithms: sd-scripts, networks/lora.py; LyCORIS, kohya.py.
KOHYA_OTHERS = re.compile(r"algo|preset|rs_lora|\w*(dim|dims|alpha|alphas)")
KOHYA_UNSAID = ("None", "Dynamic", "")  # sd-scripts/networks/resize_lora.py writes Dynamic
DIFFUSERS = "lora_adapter_metadata"  # diffusers/loaders/lora_base.py, LORA_ADAPTER_METADATA_KEY
MEANINGLESS = (
    "format",  # safetensors' own
    "modelspec.*",  # Stability-AI/ModelSpec
    "ss_*",  # sd-scripts: data, optimizer and schedule of the run
    "sshs_*",  # sd-scripts: hashes
    *("software", "training_info", "name", "version"),  # ostris/ai-toolkit
    "ot_*",  # OneTrainer: its own settings; it writes .alpha tensors
    *("prompt", "workflow"),  # ComfyUI
    "lora_fuse.extracted",  # `differences`: of what it was extracted, and what is left
)
# Words in a name that speak of strength or kind.
WORDS = re.compile(
    r"\b(alphas?|ranks?|dims?|scale[sd]?|scaling|strength|multipliers?|factors?|gain|gate|init|merged?|normali[sz]ed?"
    r"|rslora|dora|pissa|olora|loftq|corda|lokr|loha|oft|boft)\b"
)


@dataclass(frozen=True, slots=True)
class HeaderEntries:
    """The statements of a header's metadata, and the names of entries of which nothing is known."""

    stated: tuple[StatedScale, ...] = ()
    remarks: tuple[str, ...] = ()


def read_entries(metadata: Mapping[str, str], keys: Collection[str], where: str) -> HeaderEntries:
    """Read every entry; `keys` are the names of the file's tensors.

    Raises:
        BadLora: an entry speaks of strength or kind and is not understood, or cannot be merged.
    """
    stated: list[StatedScale] = []
    remarks: list[str] = []
    flat: dict[str, dict[str, str]] = {}  # fields of PEFT that are entries of their own, by component
    for key, value in metadata.items():
        place = f"{where}: header {key}"
        component, _, field = key.rpartition(".")
        content = _json(value)
        if any(fnmatchcase(key, pattern) for pattern in MEANINGLESS):
            continue
        if key == DIFFUSERS or is_peft_config(content):
            stated += parse_adapter_config(value, place, f"header {key}")
        elif field in {*ALPHAS, *RANKS, *KINDS, *FIELDS}:
            flat.setdefault(component, {})[field] = value
        elif word := _telling_word(key, content):
            raise BadLora(
                f"{place} is {value[:60]!r}, and {word!r} speaks of strength or kind in a way that is not known here; "
                "write what it means into .alpha tensors and take the entry out"
            )
        else:
            remarks.append(key)
    stated += [_flat_scale(fields, component, where) for component, fields in flat.items()]
    stated += _kohya(metadata, keys, where)
    return HeaderEntries(tuple(stated), tuple(sorted(remarks)))


def _json(value: str) -> Any:
    try:
        return files.parse_json(value)
    except ValueError:
        return value


def _telling_word(key: str, content: Any) -> str | None:
    """The first word of `WORDS` in a name, or in a name inside the JSON that the entry is."""
    names = [key]
    if isinstance(content, dict):
        names += map(str, content)
    texts = (re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z]+", " ", name).lower() for name in names)
    return next((found[0] for text in texts if (found := WORDS.search(text))), None)


def _flat_scale(fields: Mapping[str, str], component: str, where: str) -> StatedScale:
    """The statement of entries that are each a field, as in ``transformer.lora_alpha``."""
    prefix = f"{component}." if component else ""
    told: dict[str, Any] = {}
    for name, spellings in (("lora_alpha", ALPHAS), ("r", RANKS)):
        values = {key: _number(fields[key], f"{where}: header {prefix}{key}") for key in spellings if key in fields}
        if len(set(values.values())) > 1:
            said = " and ".join(f"{prefix}{key} {value:g}" for key, value in values.items())
            raise BadLora(f"{where}: its header says {said}; take out the one that is wrong")
        if values:
            told[name] = next(iter(values.values()))
    for key in KINDS:
        if key in fields and fields[key].lower() not in KNOWN_KINDS:
            raise BadLora(f"{where}: header {prefix}{key} is {fields[key]!r}; merged here are {', '.join(KNOWN_KINDS)}")
    python = {"True": "true", "False": "false", "None": "null"}  # words that JSON writes otherwise
    rest = {
        key: _json(python.get(value, value)) for key, value in fields.items() if key not in {*ALPHAS, *RANKS, *KINDS}
    }
    label = f"header {', '.join(f'{prefix}{key}' for key in sorted(fields))}"
    return config_scale({**rest, **told}, f"{where}: {label}", label, component, default_alpha=None)


def _number(value: str, where: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not number > 0 or number == float("inf"):
        raise BadLora(f"{where} is {value!r}, not a positive number; write the right one into .alpha tensors")
    return number


def _kohya(metadata: Mapping[str, str], keys: Collection[str], where: str) -> list[StatedScale]:
    """The defaults of a run of kohya's trainers, where they say anything of this file's modules."""
    alpha = metadata.get(KOHYA_ALPHA, "")
    if alpha in KOHYA_UNSAID:
        return []
    label = f"header {KOHYA_ALPHA}"
    number = _number(alpha, f"{where}: {label}")
    rank = metadata.get(KOHYA_RANK, "")
    only = None if rank in KOHYA_UNSAID else int(_number(rank, f"{where}: header {KOHYA_RANK}"))
    args = _json(metadata.get(KOHYA_ARGS, "{}"))
    has_args = isinstance(args, dict) and any(map(KOHYA_OTHERS.fullmatch, args))
    has_alphas = any(key.endswith(".alpha") for key in keys)
    if has_alphas:
        return [] if has_args else [StatedScale(label, alpha=number, only_rank=only)]
    if number == only and not has_args:
        return [StatedScale(label, alpha=number, only_rank=only)]  # a factor of 1, as without an alpha
    converted = not any(".lora_down." in key or ".lora_up." in key for key in keys)
    if converted or has_args or only is None:
        reason = "a converter may have multiplied it in" if converted else f"{KOHYA_ARGS} may give modules others"
        raise BadLora(
            f"{where}: {label} is {alpha!r} at {KOHYA_RANK} {rank or 'unknown'!r}, and there are no .alpha tensors: "
            f"{reason}; write .alpha tensors with the right value, or take the entry out if the factors have it"
        )
    return [StatedScale(label, alpha=number, rank=only)]
