"""The files of a merged repository beside the fused weights, compared with the base's in both directions.

A file is the base's byte for byte, or it is made here again from the base and the recipe, by other lines than the
engine's. One that is missing is as wrong as one too many.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadCheckpoint
from lora_fuse.machine import FileRecord, file_state, files
from lora_fuse.recipe import Manifest
from lora_fuse.verification.byte_comparison import pieces, same_bytes

if TYPE_CHECKING:
    from lora_fuse.verification.rederivation import Expectation

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
# Files that no merge leaves behind, whatever the engine's table of files says.
NEEDED = re.compile(r"(licen[cs]e|notice)[^/]*|[^/]+\.(json|txt|model)", re.IGNORECASE)
NAMES_DTYPE = ("torch_dtype", "dtype")  # in a configuration
WEIGHTS = (".safetensors", ".sft")
MOST = 200_000  # files and folders of one, as links show them


def sort_base(base: Path, components: Sequence[str], names: Set[str] | None) -> repository_files.SortedFiles:
    """Sort the files of a base, those of its lock or all that lie there, as every fuse does: what is left is named.

    Raises:
        BadCheckpoint: a component has no weights, see `repository_files.sort_files`.
    """
    main, *more = components
    return repository_files.sort_folder(base, main, names or _listed(base), more)


def compare_files(
    merged: Path,
    base: Path,
    fused: Set[str],
    base_sorted: repository_files.SortedFiles,
    expected: Expectation,
    advance: Callable[[int], None],
    indexes: Mapping[str, dict[str, Any]],
) -> tuple[int, list[str]]:
    """Compare all files but `fused`, the POSIX paths of the fused weights; `advance` is told the bytes of each.

    `indexes` are those that list other tensors than the base's, as they should be, by POSIX path.
    What `base_sorted` leaves behind may be missing, but for what is needed by the lines here.

    Returns:
        The number of files that were compared with the base's, and what is wrong.
    """
    problems: list[str] = []
    made = dict(_made_again(base, expected, problems)) | dict(indexes)
    problems += [f"{name} is called generated, and no recipe asks for it" for name in expected.generated - made.keys()]
    theirs = {*base_sorted.all_shards, *base_sorted.others, *base_sorted.left}
    beside = expected.beside - made.keys()
    ours = _listed(merged) - beside
    components = _components(base / INDEX, problems)
    left = {name for name in base_sorted.left if not _is_needed(name, components)}
    needed = (theirs - left | made.keys()) - beside
    problems += [f"{name} is in the base and not in {merged}" for name in sorted(needed - ours)]
    problems += _unfused(ours, fused)
    others = sorted(ours - fused - made.keys())
    compared = [name for name in others if name in theirs]
    here = [name for name in compared if name not in expected.promised]
    differing = _differing(merged, base, here, advance)
    differing |= _unpromised(merged, expected.promised, set(compared) - set(here), advance)
    for name in sorted(ours - fused):
        if name in made:
            problems += _differences(merged / name, made[name])
        elif name not in theirs:
            problems.append(f"{name} is not in the base and no recipe asks for it")
        elif name in differing:
            problems.append(f"{name} differs from the base's")
    problems += _incomplete(merged, components, theirs, ours)
    return len(others), problems


def _listed(
    folder: Path, place: str = "", above: tuple[Path, ...] = (), left: Iterator[int] | None = None
) -> frozenset[str]:
    """Every file below a folder, also behind links; a link to a folder above is one name.

    Raises:
        BadCheckpoint: a folder cannot be read, or there is no end of them.
    """
    names: set[str] = set()
    left = iter(range(MOST)) if left is None else left
    inside = (*above, folder.resolve())
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        if folder.name == "lost+found":
            return frozenset({place.rstrip("/")})
        raise BadCheckpoint(
            f"{folder} cannot be listed ({error.strerror}); give yourself the right to read it"
        ) from error
    for path in paths:
        if next(left, None) is None:
            raise BadCheckpoint(f"{path} is one of more than {MOST} files and folders; copy those that are links")
        if path.is_dir() and path.resolve() not in inside:
            names |= _listed(path, f"{place}{path.name}/", inside, left)
        else:
            names.add(f"{place}{path.name}")
    return frozenset(names)


def _differing(merged: Path, base: Path, names: Sequence[str], advance: Callable[[int], None]) -> set[str]:
    """The files that are not the base's byte for byte, or cannot be read."""
    differing = set()
    tasks: list[tuple[str, tuple[int, int]]] = []
    for name in names:
        size = _size(base / name)
        if size is None or size != _size(merged / name):
            differing.add(name)
        else:
            tasks += [(name, piece) for piece in pieces(size)]

    def is_same(task: tuple[str, tuple[int, int]], told: Callable[[int], None]) -> bool:
        name, (start, nbytes) = task
        told(nbytes)
        try:
            return same_bytes(merged / name, base / name, (start, start), nbytes)
        except OSError:
            return False

    results = file_state.in_threads(is_same, tasks, advance, lambda task: task[1][1])
    return differing | {name for (name, _), same in zip(tasks, results, strict=True) if not same}


def _unpromised(
    merged: Path, promised: Mapping[str, FileRecord], names: Set[str], advance: Callable[[int], None]
) -> set[str]:
    """The files that have not the size and sha256 that the Hub promises of the base's, or cannot be read."""

    def is_same(name: str, told: Callable[[int], None]) -> bool:
        try:
            return files.hash_file(merged / name, told) == promised[name]
        except OSError:
            return False

    ordered = sorted(names)
    results = file_state.in_threads(is_same, ordered, advance, lambda name: promised[name].size)
    return {name for name, same in zip(ordered, results, strict=True) if not same}


def _size(path: Path) -> int | None:
    """Size of a file in bytes; None of what is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _made_again(base: Path, expected: Expectation, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The content of what the recipe changes.

    The class of the pipeline, and of a scheduler that names one; all of a scheduler, but for its class where it names
    none; the dtype that a configuration names.
    """
    changes: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
    named: dict[str, Any] = {} if expected.pipeline is None else {"_class_name": expected.pipeline}
    if "_class_name" in expected.scheduler:
        named["scheduler"] = ["diffusers", expected.scheduler["_class_name"]]
    if named:
        changes[INDEX] = lambda index: index | named
    if expected.scheduler:
        changes[SCHEDULER] = lambda old: {key: old[key] for key in old if key[:1] == "_"} | dict(expected.scheduler)
    converted = expected.converted if expected.dtype else frozenset()
    configs = {(PurePosixPath(name).parent / "config.json").as_posix() for name in converted}
    for name in (name for name in configs if (base / name).is_file()):
        changes[name] = lambda config: config | {key: expected.dtype for key in NAMES_DTYPE if config.get(key)}
    for name, change in changes.items():
        try:
            yield name, change(files.read_json(base / name, dict, BadCheckpoint))
        except BadCheckpoint as error:
            problems.append(str(error))


def _differences(path: Path, wanted: Mapping[str, Any]) -> Iterator[str]:
    try:
        content = files.read_json(path, dict, BadCheckpoint)
    except BadCheckpoint as error:
        yield str(error)
        return
    for key in sorted(content.keys() | wanted.keys()):
        ours, theirs = (json.dumps(side[key]) if key in side else "not there" for side in (content, wanted))
        if ours != theirs:
            yield f"{path.name}: {key} is {ours}, base and recipe say {theirs}"


def _components(index: Path, problems: list[str]) -> list[str]:
    """The folders that a pipeline's index names: pairs of a library and a class."""
    if not index.is_file():
        return []
    try:
        content = files.read_json(index, dict, BadCheckpoint)
    except BadCheckpoint as error:
        problems.append(str(error))
        return []
    pairs = {name: value for name, value in content.items() if not name.startswith("_") and isinstance(value, list)}
    return sorted(name for name, value in pairs.items() if any(isinstance(one, str) for one in value))


def _is_needed(name: str, components: list[str]) -> bool:
    """True for licences and for the texts of a component that is named, whatever they are."""
    path = PurePosixPath(name)
    named = len(path.parts) < 3 and path.parent.name in ("", *components) and not path.name.startswith(".")
    return named and ".index." not in path.name and NEEDED.fullmatch(path.name) is not None


def _unfused(ours: Set[str], fused: Set[str]) -> Iterator[str]:
    """Weights beside the fused ones, or at the top of a pipeline: whoever loads them has no merge."""
    folders = {PurePosixPath(name).parent for name in fused} | {PurePosixPath()}
    for name in sorted(ours - fused):
        if name.endswith(WEIGHTS) and PurePosixPath(name).parent in folders:
            yield f"{name} holds weights that were not fused"


def _incomplete(merged: Path, components: list[str], theirs: Set[str], ours: Set[str]) -> Iterator[str]:
    """The components that are not there, or have lost all of their weights."""
    for component in components:
        if not (merged / component).is_dir():
            yield f"{INDEX} names {component}, and {merged} has no such folder"
            continue
        with_weights = [
            any(name.startswith(f"{component}/") and name.endswith(WEIGHTS) for name in side) for side in (theirs, ours)
        ]
        if with_weights == [True, False]:
            yield f"{component}/ has weights in the base, and none in {merged}"


def check_files(manifest: Manifest, merged: Path) -> list[str]:
    """Compare the files on disk with the manifest by name and size; one sentence for each difference.

    Content is not hashed here: the engine hashed it while it was written, and publishing hashes what it sends.
    """
    present = {path.relative_to(merged).as_posix(): path for path in merged.rglob("*") if not path.is_dir()}
    listed = manifest.files
    problems = [f"{name} is in the manifest and not in {merged}" for name in sorted(listed.keys() - present.keys())]
    problems += [f"{name} is in {merged} and not in the manifest" for name in sorted(present.keys() - listed.keys())]
    for name in sorted(present.keys() & listed.keys()):
        size = present[name].stat().st_size
        if size != listed[name].size:
            problems.append(f"{name} has {size} bytes, the manifest says {listed[name].size}")
    return problems
