"""The files of a base, sorted: the weights to fuse, what is taken over, and what is left behind, each with the reason.

`sort_files` is the one decision: plan, fuse, verify, download and publish go by it. But for `sort_folder` all is pure:
names and parsed JSON in, names out. The roles of files are in `file_roles`, the choice among weights in `weight_sets`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_fuse.checkpoint.file_roles import Role, role_of
from lora_fuse.checkpoint.weight_sets import FileListing, WeightSet, choose_weights
from lora_fuse.errors import BadCheckpoint, BadLora, BadSource
from lora_fuse.machine import files

MODEL_INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
# the files of a PEFT folder, as PEFT names them
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

HIDDEN = "hidden: housekeeping of git, the Hub's client or a file manager"
UNNAMED = f"in a folder that {MODEL_INDEX} does not name"
WHOLE = "weights beside the components, which are not fused"
OTHER_WEIGHTS = "other weights of the component to fuse, which would stay unfused"
VARIANT = "other weights of a component, of which those that load without `variant` are taken"
SHOWN = 5  # files of one reason that are named
CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
FOR_PREFERRED = "other weights of a component, of which the variant is taken that the fused component has"


@dataclass(frozen=True, slots=True)
class SortedFiles:
    """Files by POSIX path: `shards` are the weights to fuse, `others` is taken over, `left` stays behind, and why.

    `variant` is what has to be asked for when they are loaded, as in diffusers; `missing` are components that
    `model_index.json` names, without a file.
    """

    shards: tuple[str, ...]
    index: str | None  # of the shards; one of `others`
    others: tuple[str, ...]
    left: Mapping[str, str]
    variant: str | None = None
    missing: tuple[str, ...] = ()


def sort_folder(root: Path, component: str, names: Iterable[str] | None = None) -> SortedFiles:
    """Sort the files of a folder on this machine, or those of them that are `names`; see `sort_files`.

    Raises:
        BadCheckpoint: as there; also if a file that is needed to decide cannot be read.
    """

    def read(name: str) -> object:
        return files.read_json(root / name, dict, BadCheckpoint, "fetch the base again")

    listed = list_files(root) if names is None else names
    return sort_files(listed, component, label=str(root), read=read, fail=BadCheckpoint)


def list_files(root: Path) -> list[str]:
    """The POSIX paths of all files below a folder, through links to folders too; a link to a folder above is one name.

    A dangling link is listed, and anything else that is no folder.
    """
    return sorted(path.relative_to(root).as_posix() for path in _walk(root, frozenset()))


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    info = folder.stat()
    inside = above | {(info.st_dev, info.st_ino)}
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if not entry.is_dir() or (entry.is_symlink() and (entry.stat().st_dev, entry.stat().st_ino) in inside):
                yield path
            else:
                yield from _walk(path, inside)


def is_pickle(path: str) -> bool:
    """True for the name of a pickle, which can run code when it is loaded."""
    return role_of(path).role is Role.PICKLE


def is_weights(path: str) -> bool:
    """True for the name of a safetensors file."""
    return role_of(path).role is Role.WEIGHTS


def left_behind(left: Mapping[str, str]) -> list[str]:
    """A line for each reason why files are left behind, with the first files by name."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in left.items():
        by_reason[reason].append(name)
    return [
        f"left behind: {', '.join(names[:SHOWN])}{f' and {more} more' if (more := len(names) - SHOWN) > 0 else ''} "
        f"({reason})"
        for reason, names in by_reason.items()
    ]


def named_components(model_index: object) -> dict[str, tuple[str, str]]:
    """Library and class of the components that a `model_index.json` names: its pairs that are not null."""
    items = model_index.items() if isinstance(model_index, dict) else ()
    pairs = {name: value for name, value in items if not name.startswith("_") and isinstance(value, list)}
    return {name: (value[0], value[1]) for name, value in sorted(pairs.items()) if len(value) == 2 and value[0]}


def sort_files(
    names: Iterable[str],
    component: str,
    *,
    label: str,
    read: Callable[[str], object],
    fail: Callable[[str], Exception],
) -> SortedFiles:
    """Sort the files of a pipeline, of which `component` is to be fused, or those of a component (``""``) itself.

    Taken over is what a library loads: of every component that `model_index.json` names configuration, vocabulary,
    templates, the weights that are loaded without asking for a variant, code that the base itself asks for; and
    licences. Where the component to fuse has its weights only as a variant, that variant is taken of the others too.

    Args:
        names: the POSIX paths of all files.
        component: the one to fuse.
        label: the name of the place in messages.
        read: gives the content of a JSON file by its path; None where it is not known yet.
        fail: makes the error of a refusal.

    Raises:
        fail: the component has no safetensors weights, or several sets of which none is plainly the one; a
            component that is needed has weights only as pickles; an index cannot be followed.
    """
    listing = FileListing(label, frozenset(names), read, fail)
    named = named_components(read(MODEL_INDEX)) if component else {}
    reasons: dict[str, str | None] = {}  # None: taken
    folders: dict[str, list[str]] = defaultdict(list)
    for name in sorted(listing.names):
        parts = PurePosixPath(name).parts
        if any(part.startswith(".") for part in parts):
            reasons[name] = HIDDEN
        elif named and len(parts) > 1 and parts[0] not in {*named, component}:
            reasons[name] = UNNAMED
        else:
            folders[name.rpartition("/")[0]].append(name)
    for folder in (component, *named):
        _refuse_only_pickles(listing, folder, folders[folder], named.get(folder))
    fused = choose_weights(listing, component, _weights(folders[component]), None)
    if fused is None:
        raise fail(_no_weights(listing, component, folders))
    for folder, inside in folders.items():
        reasons |= _sort_one(_Folder(folder, inside, component, named.get(folder)), listing, fused)
    tops = {folder.partition("/")[0] for folder, inside in folders.items() if inside}
    others = (name for name, reason in reasons.items() if reason is None and name not in fused.files)
    left = {name: reason for name, reason in sorted(reasons.items()) if reason is not None}
    missing = tuple(sorted(named.keys() - tops))
    return SortedFiles(fused.files, fused.index, tuple(sorted(others)), left, fused.variant, missing)


@dataclass(frozen=True, slots=True)
class _Folder:
    """One folder, the files in it, the component to fuse, and library and class of the folder in `model_index.json`."""

    path: str
    names: Sequence[str]
    component: str
    pair: tuple[str, str] | None

    @property
    def is_fused(self) -> bool:
        """True for the component to fuse and for what is below it."""
        return not self.component or f"{self.path}/".startswith(f"{self.component}/")


def _sort_one(folder: _Folder, listing: FileListing, fused: WeightSet) -> dict[str, str | None]:
    """For each file of a folder the reason why it stays behind; None for those that are taken."""
    weights = _weights(folder.names)
    chosen, reason = _choice(folder, weights, listing, fused)
    taken = {Role.TEXT}
    if _asks_for_code(folder, listing):
        taken.add(Role.CODE)
    if folder.pair is not None and not weights:
        taken.add(Role.FOREIGN)  # for who loads them, as diffusers does with ONNX; there are no others
    reasons: dict[str, str | None] = {}
    for name in folder.names:
        row = role_of(name)
        if name in weights:
            is_chosen = chosen is not None and name in (*chosen.files, chosen.index)
            reasons[name] = None if is_chosen else reason
        else:
            reasons[name] = None if row.role in taken else row.reason
    return reasons


def _choice(
    folder: _Folder, weights: Sequence[str], listing: FileListing, fused: WeightSet
) -> tuple[WeightSet | None, str]:
    """The weights of a folder that are taken, and why the others are not."""
    if folder.is_fused:
        return (fused if folder.path == folder.component else None), OTHER_WEIGHTS
    if not folder.path:
        return None, WHOLE
    reason = VARIANT if fused.variant is None else FOR_PREFERRED
    return choose_weights(listing, folder.path, weights, fused.variant), reason


def _weights(names: Iterable[str]) -> list[str]:
    return [name for name in names if role_of(name).role in (Role.WEIGHTS, Role.INDEX)]


def _asks_for_code(folder: _Folder, listing: FileListing) -> bool:
    """True where a class of the base is defined in the Python files of this folder.

    So say a `module.py` of the module that `model_index.json` names for the component, or for the pipeline itself
    (diffusers, `_get_custom_components_and_folders`), and `auto_map` in a configuration (transformers).
    """
    code = {PurePosixPath(name).stem for name in folder.names if role_of(name).role is Role.CODE}
    if not code:
        return False
    if folder.component and not folder.path:
        index = listing.read(MODEL_INDEX)
        pipeline = index.get("_class_name") if isinstance(index, dict) else None
        return isinstance(pipeline, list) and pipeline[:1] != [] and pipeline[0] in code
    if folder.pair is not None and folder.pair[0] in code:
        return True
    configs = (listing.read(name) for name in folder.names if PurePosixPath(name).name in CONFIGS)
    return any(isinstance(config, dict) and config.get("auto_map") for config in configs)


def _refuse_only_pickles(listing: FileListing, folder: str, names: Sequence[str], pair: tuple[str, str] | None) -> None:
    """Refuse a component that a library would load from a pickle: without it the result would not load."""
    pickles = [name for name in names if is_pickle(name)]
    is_model = any(PurePosixPath(name).name == "config.json" for name in names)
    if pickles and is_model and not _weights(names):
        loader = f"{pair[0]}.{pair[1]}" if pair else "its class"
        raise listing.fail(
            f"{listing.place(folder)} has weights only as pickles ({pickles[0]}), which can run code and are never "
            f"taken; write them as safetensors: {loader}.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )


def _no_weights(listing: FileListing, component: str, folders: Mapping[str, Sequence[str]]) -> str:
    """A sentence on a component to fuse that has no safetensors."""
    if not component:
        return f"{listing.label} has no safetensors weights; give a folder or a file that has some"
    there = [folder for folder, names in folders.items() if folder and "/" not in folder and _weights(names)]
    lacks = f"no safetensors weights in {component}/" if folders[component] else f"no component {component}"
    if not there:
        return f"{listing.label} has {lacks}, nor in any other component; get a complete copy"
    return (
        f"{listing.label} has {lacks}; it has weights in {', '.join(there)}: name the one that the LoRA is for, "
        f"--component {there[0]}"
    )


def config_beside(name: str, names: Collection[str]) -> str | None:
    """The PEFT configuration that speaks of a LoRA's file: the one beside it, if that is not another file's.

    `name` is a POSIX path, `names` what there is; of them, only those beside it are looked at.
    """
    path = PurePosixPath(name)
    config = (path.parent / ADAPTER_CONFIG).as_posix()
    is_its = path.name == ADAPTER_WEIGHTS or (path.parent / ADAPTER_WEIGHTS).as_posix() not in names
    return config if config in names and is_its else None


def lora_files(name: str, names: Iterable[str], label: str) -> list[str]:
    """The files of a LoRA: itself with the configuration beside it, or the two of the PEFT folder that it is.

    `name` is its POSIX path below its repository or folder, which has the files `names`; ``.`` for the top.

    Raises:
        BadLora: it is no safetensors file, and no PEFT folder with one.
        BadSource: there is nothing of that name.
    """
    path = PurePosixPath(name)
    known = set(names)
    if name in known and is_weights(name):
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
