"""The files of a diffusers pipeline repository that are worth having. Pure: names and parsed JSON in, names out.

Invariant: a name that is not on the list is never taken, so a repository cannot slip in a pickle or a script.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath

from lora_fuse.errors import BadLora, BadSource

MODEL_INDEX = "model_index.json"
# the files of a PEFT folder, as PEFT names them
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SAFETENSORS = frozenset({".safetensors", ".sft"})
TEXT_SUFFIXES = frozenset({".json", ".txt", ".jinja", ".model"})
PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
# A second dot before the suffix marks a variant (`model.fp16.safetensors`), which is not taken.
_PLAIN_WEIGHTS = re.compile(r"[^./]+\.safetensors")
_PLAIN_INDEX = re.compile(r"[^./]+\.safetensors\.index\.json")


def is_pickle(path: str) -> bool:
    """True for the name of a pickle, which can run code when it is loaded."""
    return PurePosixPath(path).suffix.lower() in PICKLE_SUFFIXES


def components(model_index: object, label: str) -> list[str]:
    """The component folders that a `model_index.json` names: its `[library, class]` pairs that are not null.

    Raises:
        BadSource: it is not a mapping, or it names no component.
    """
    items = model_index.items() if isinstance(model_index, dict) else ()
    pairs = {name: value for name, value in items if not name.startswith("_") and isinstance(value, list)}
    named = sorted(name for name, value in pairs.items() if value[:1] not in ([], [None]))
    if not named:
        raise BadSource(f"{MODEL_INDEX} of {label} names no component; name a diffusers pipeline")
    return named


def folder_files(component: str, names: Iterable[str]) -> list[str]:
    """The paths that lie directly in a component's folder."""
    return sorted(name for name in names if PurePosixPath(name).parent == PurePosixPath(component))


def text_files(component: str, names: Iterable[str], label: str) -> list[str]:
    """The texts of a component: configs, vocabularies, templates and the index of its safetensors shards.

    Raises:
        BadSource: the component has no file at all.
    """
    here = folder_files(component, names)
    if not here:
        raise BadSource(f"{label} has no folder {component}/, which its {MODEL_INDEX} names; get a complete copy")
    texts = [name for name in here if PurePosixPath(name).suffix in TEXT_SUFFIXES]
    return [name for name in texts if ".index." not in name or is_index(name)]


def is_index(path: str) -> bool:
    """True for the index of safetensors shards that are not a variant's or a pickle's."""
    return _PLAIN_INDEX.fullmatch(PurePosixPath(path).name) is not None


def indexed_weights(index: str, content: object, names: Iterable[str], label: str) -> list[str]:
    """The shards that an index names.

    Raises:
        BadSource: it is no index, or a shard is missing, elsewhere, or not a safetensors file.
    """
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadSource(f"{index} of {label} is no shard index: it has no weight_map; get a good copy")
    held = set(names)
    shards = []
    for filename in sorted(set(map(str, weight_map.values()))):
        shard = (PurePosixPath(index).parent / filename).as_posix()
        if not _PLAIN_WEIGHTS.fullmatch(filename):
            what = "a pickle" if is_pickle(filename) else "not a safetensors file beside it"
            raise BadSource(f"{index} of {label} names {filename!r}, which is {what}; it cannot be taken")
        if shard not in held:
            raise BadSource(f"{label} has no {shard}, which its {index} names; get a complete copy")
        shards.append(shard)
    return shards


def plain_weights(component: str, names: Iterable[str]) -> list[str]:
    """The safetensors files of a component that are no variants; whether its index names them is not asked."""
    return [name for name in folder_files(component, names) if _PLAIN_WEIGHTS.fullmatch(PurePosixPath(name).name)]


def single_weights(component: str, names: Iterable[str], label: str) -> list[str]:
    """The weights of a component without an index: one safetensors file; none for a tokenizer or scheduler.

    Raises:
        BadSource: it has several, or only pickles or variants.
    """
    here = folder_files(component, names)
    plain = plain_weights(component, names)
    if len(plain) > 1:
        raise BadSource(
            f"{component}/ of {label} has {len(plain)} safetensors files and no index ({plain[0]}, …); "
            "keep one, or add the index"
        )
    others = [name for name in here if is_pickle(name) or name.endswith(".safetensors")]
    if not plain and others:
        what = "weights only as pickles" if all(map(is_pickle, others)) else "weights only as a variant"
        raise BadSource(f"{component}/ of {label} has {what} ({others[0]}); name a revision with plain safetensors")
    return plain


def config_beside(name: str, names: Collection[str]) -> str | None:
    """The PEFT configuration that speaks of a LoRA's file: the one beside it, if that is not another file's.

    `name` is a POSIX path, `names` what there is; of them, only those beside it are looked at.
    """
    path = PurePosixPath(name)
    config = (path.parent / ADAPTER_CONFIG).as_posix()
    is_weights = path.name == ADAPTER_WEIGHTS or (path.parent / ADAPTER_WEIGHTS).as_posix() not in names
    return config if config in names and is_weights else None


def lora_files(name: str, names: Iterable[str], label: str) -> list[str]:
    """The files of a LoRA: itself with the configuration beside it, or the two of the PEFT folder that it is.

    `name` is its POSIX path below its repository or folder, which has the files `names`; ``.`` for the top.

    Raises:
        BadLora: it is no safetensors file, and no PEFT folder with one.
        BadSource: there is nothing of that name.
    """
    path = PurePosixPath(name)
    known = set(names)
    if name in known and path.suffix in SAFETENSORS:
        return sorted({name, *(config for config in [config_beside(name, known)] if config)})
    below = sorted(other for other in known if path in PurePosixPath(other).parents)
    if name not in known and not below:
        raise BadSource(f"{label} has no {name}; check the name and the revision")
    wanted = [(path / part).as_posix() for part in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    if known.issuperset(wanted):
        return wanted
    if name in known:
        raise BadLora(f"{name!r} of {label} is not safetensors; name a .safetensors file or a PEFT folder")
    lacking = next(other for other in wanted if other not in known)
    pickles = [other for other in below if is_pickle(other)]
    only = f"its weights are a pickle ({pickles[0]}), convert them" if pickles else "name the .safetensors file itself"
    raise BadLora(f"{name!r} of {label} is no PEFT folder: there is no {lacking}; {only}")
