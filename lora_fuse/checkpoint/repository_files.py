"""The files of a base, sorted: the weights to fuse, what is taken over, and what is left behind, each with the reason.

`sort_files` is the one decision: plan, fuse, verify, download and publish go by it. But for `sort_folder` all is pure:
names and parsed JSON in, names out. The roles of files are in `file_roles`, the choice among weights in `weight_sets`,
the verdicts on one folder in `component_folder`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lora_fuse.checkpoint.component_folder import ComponentFolder
from lora_fuse.checkpoint.file_roles import Role, role_of
from lora_fuse.checkpoint.foreign_code import is_setting
from lora_fuse.checkpoint.weight_sets import FileListing, WeightSet
from lora_fuse.errors import BadCheckpoint, BadLora, BadSource
from lora_fuse.machine import files

MODEL_INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
# the files of a PEFT folder, as PEFT names them
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

HIDDEN = "hidden: housekeeping of git, the Hub's client or a file manager"
UNNAMED = f"in a folder that {MODEL_INDEX} does not name"
MAIN = ("transformer", "unet")  # the folder of the component that denoises, in every pipeline of diffusers that has one
LOST = "lost+found"  # at the top of a disk, for root alone
MOST_ENTRIES = 100_000  # files and folders below one, links to folders followed; as many as a Hub may list
SHOWN = 5  # files of one reason that are named


@dataclass(frozen=True, slots=True)
class SortedFiles:
    """Files by POSIX path: `shards` are the weights to fuse, `others` is taken over, `left` stays behind, and why.

    `index` is that of the shards, one of `others`; `more` are the shards of further components to fuse, by its path,
    each with their index. `variants` are components whose weights are there only as a variant, which has to be asked
    for when they are loaded; `missing` are components that `model_index.json` names, without a file.
    """

    shards: tuple[str, ...]
    index: str | None
    others: tuple[str, ...]
    left: Mapping[str, str]
    variants: Mapping[str, str] = field(default_factory=dict)  # the variant by component
    missing: tuple[str, ...] = ()
    more: Mapping[str, tuple[tuple[str, ...], str | None]] = field(default_factory=dict)

    @property
    def all_shards(self) -> tuple[str, ...]:
        """The weights of all components to fuse."""
        return (*self.shards, *(name for shards, _ in self.more.values() for name in shards))

    @property
    def remarks(self) -> list[str]:
        """Sentences on what who loads the result has to know."""
        found = []
        if self.variants:
            which = ", ".join(f"{variant} of {name}" if name else variant for name, variant in self.variants.items())
            found.append(
                f"weights are there only as a variant ({which}); OUT loads as the base does, with that variant"
            )
        if code := [name for name in self.others if role_of(name).role is Role.CODE]:
            found.append(
                f"code of the base is taken over ({', '.join(code)}); it runs for who trusts remote code, only"
            )
        return found


def sort_folder(
    root: Path, component: str, names: Iterable[str] | None = None, more: Sequence[str] = ()
) -> SortedFiles:
    """Sort the files of a folder on this machine, or those of them that are `names`; see `sort_files`.

    Raises:
        BadCheckpoint: as there; also if a file that is needed to decide cannot be read.
    """

    def read(name: str) -> object:
        return files.read_json(locate(root, name), dict, BadCheckpoint, "fetch the base again")

    listed = list_files(root) if names is None else names
    return sort_files(listed, component, label=str(root), read=read, fail=BadCheckpoint, more=more)


def locate(root: Path, name: str) -> Path:
    """The path of a file of a base.

    Raises:
        BadCheckpoint: a link leads out of the base, see `files.inside`.
    """
    try:
        return files.inside(root, name)
    except OSError as error:
        raise BadCheckpoint(f"cannot read {root / name}: {error.strerror}") from error


def list_files(root: Path) -> list[str]:
    """The POSIX paths of all files below a folder, through links to folders too; a link to a folder above is one name.

    A dangling link is listed, and anything else that is no folder.

    Raises:
        BadSource: a folder cannot be read, so that nobody knows what is missing; or there is no end of them, as where
            links to folders lie in each other.
    """
    found = _walk(root, frozenset(), iter(range(MOST_ENTRIES)))
    return sorted(path.relative_to(root).as_posix() for path in found)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise BadSource(
            f"{folder} cannot be listed ({error.strerror}), so what is in it is not known; give yourself the right to "
            "read it, or take it away"
        ) from error


def _walk(folder: Path, above: frozenset[tuple[int, int]], left: Iterator[int]) -> Iterator[Path]:
    info = folder.stat()
    inside = above | {(info.st_dev, info.st_ino)}
    try:
        entries = _entries(folder)
    except BadSource:
        if folder.name != LOST:
            raise
        yield folder
        return
    for entry in entries:
        path = folder / entry.name
        if next(left, None) is None:
            raise BadSource(
                f"{path} is one of more than {MOST_ENTRIES} files and folders; name the folder of the files alone, and "
                "copy folders that are links to each other"
            )
        if not entry.is_dir() or (entry.is_symlink() and (entry.stat().st_dev, entry.stat().st_ino) in inside):
            yield path
        else:
            yield from _walk(path, inside, left)


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
    lines = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        lines.append(f"left behind: {', '.join(map(files.as_text, names[:SHOWN]))}{more} ({reason})")
    return lines


def named_components(model_index: object) -> dict[str, tuple[str, str]]:
    """Library and class of the components that a `model_index.json` names: its pairs that are not null.

    Other lists are settings of the pipeline itself, as numbers of layers are.
    """
    items = model_index.items() if isinstance(model_index, dict) else ()
    pairs = {name: value for name, value in items if not name.startswith("_") and isinstance(value, list)}
    return {
        name: (str(pair[0]), str(pair[1]))
        for name, pair in sorted(pairs.items())
        if len(pair) > 1 and pair[0] and not is_setting(pair)
    }


def component_names(root: Path) -> frozenset[str]:
    """The components of a pipeline's folder that are there; none of another kind of base.

    Raises:
        BadCheckpoint: its index cannot be read.
        BadSource: the folder cannot be listed.
    """
    if not (root / MODEL_INDEX).is_file():
        return frozenset()
    index = files.read_json(locate(root, MODEL_INDEX), dict, BadCheckpoint, "fetch the base again")
    named = {*named_components(index), *MAIN}  # foreign text, so no part of a path before a folder has it as its name
    return frozenset(entry.name for entry in _entries(root) if entry.name in named and entry.is_dir())


def main_component(components: Collection[str]) -> str:
    """The component of a pipeline that denoises, which a LoRA is for that says nothing else."""
    return next((name for name in MAIN if name in components), MAIN[0])


def sort_files(
    names: Iterable[str],
    component: str,
    *,
    label: str,
    read: Callable[[str], object],
    fail: Callable[[str], Exception],
    more: Sequence[str] = (),
) -> SortedFiles:
    """Sort the files of a pipeline, of which `component` is to be fused, or those of a component (``""``) itself.

    Taken over is what a library loads: of every component that `model_index.json` names configuration, vocabulary,
    templates, the weights that are loaded without asking for a variant, code that the base itself asks for; and
    licences. Where the component to fuse has its weights only as a variant, that variant is taken of the others too.

    Args:
        names: the POSIX paths of all files.
        component: the one to fuse, or the first of them.
        label: the name of the place in messages.
        read: gives the content of a JSON file by its path; None where it is not known yet.
        fail: makes the error of a refusal.
        more: further components to fuse.

    Raises:
        fail: a component has no safetensors weights, or several sets of which none is plainly the one; a
            component that is needed would be loaded from a pickle, or has no file that is taken; an index cannot be
            followed.
    """
    listing = FileListing(label, frozenset(names), read, fail)
    index = read(MODEL_INDEX) if component else None
    named = named_components(index)
    asked = {**named, **_own_class(index)}
    wanted = (component, *more)
    inside, reasons = _by_folder(listing.names, wanted, named)  # None: taken
    folders = [ComponentFolder(path, held, wanted, asked.get(path), listing) for path, held in inside.items()]
    fused = _to_fuse(folders[0], folders, None)
    also = {folder.path: _to_fuse(folder, folders, fused) for folder in folders if folder.path in more}
    chosen = {folder.path: folder.choose(fused) for folder in folders}
    for folder in folders:
        if folder.path in named and not folder.is_fused:
            folder.refuse_only_pickles(chosen[folder.path], fused.variant)
    for folder in folders:
        reasons |= folder.verdicts(chosen[folder.path], fused.variant)
    _refuse_emptied(named, reasons, listing)
    weights = {name for one in (fused, *also.values()) for name in one.files}
    others = (name for name, reason in reasons.items() if reason is None and name not in weights)
    return SortedFiles(
        fused.files,
        fused.index,
        tuple(sorted(others)),
        {name: reason for name, reason in sorted(reasons.items()) if reason is not None},
        {path: one.variant for path, one in sorted(chosen.items()) if one and one.variant},
        tuple(sorted(named.keys() - {path.partition("/")[0] for path, held in inside.items() if held})),
        {path: (one.files, one.index) for path, one in also.items()},
    )


def _by_folder(
    names: Iterable[str], wanted: Sequence[str], named: Collection[str]
) -> tuple[dict[str, list[str]], dict[str, str | None]]:
    """The files of each folder, those that are `wanted` first, and why others stay behind."""
    inside: dict[str, list[str]] = {folder: [] for folder in (*wanted, *named)}
    left: dict[str, str | None] = {}
    for name in sorted(names):
        parts = PurePosixPath(name).parts
        if any(part.startswith(".") for part in parts):
            left[name] = HIDDEN
        elif named and len(parts) > 1 and parts[0] not in {*named, *wanted}:
            left[name] = UNNAMED
        else:
            inside.setdefault(name.rpartition("/")[0], []).append(name)
    return inside, left


def _to_fuse(folder: ComponentFolder, folders: Sequence[ComponentFolder], main: WeightSet | None) -> WeightSet:
    """The weights of a component to fuse; `main` are those of the first of them."""
    if (found := folder.choose(main)) is None:
        folder.refuse_only_pickles(None, None)
        raise folder.listing.fail(folder.without_weights(folders))
    return found


def _refuse_emptied(named: Iterable[str], reasons: Mapping[str, str | None], listing: FileListing) -> None:
    """Refuse a component of which no file is taken: the pipeline would not load any more."""
    for path in named:
        held = {name: reason for name, reason in reasons.items() if name.startswith(f"{path}/")}
        if held and None not in held.values():
            name, reason = min(held.items())
            raise listing.fail(
                f"{path}/ of {listing.label}, which {MODEL_INDEX} names, has no file that is taken ({name}: {reason}); "
                "give its vocabulary a usual name, or take the component out of the index"
            )


def _own_class(model_index: object) -> dict[str, tuple[str, str]]:
    """Module and class of a pipeline that is defined in the repository itself, by the top folder's path."""
    pair = model_index.get("_class_name") if isinstance(model_index, dict) else None
    return {"": (str(pair[0]), str(pair[1]))} if isinstance(pair, list) and len(pair) == 2 else {}


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
