"""The files that travel to every node: the code, and the small inputs that are named by a path of the project.

They are listed, and nothing else travels: no configuration of the user, no token, no cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadCheckpoint, BadSource
from lora_fuse.machine import files, progress
from lora_fuse.recipe import Recipe, paths, stated_licence

LARGEST = 256_000_000  # bytes of all; Ray's own bound is 512 MiB, and the head sends them to each node
UNSENT = frozenset({"__pycache__"})
ADAPTER = ("adapter_config.json",)  # beside PEFT's weights


@dataclass(frozen=True, slots=True)
class Package:
    """Files by the POSIX path that they have on a node; `absolute` are those that a node has to have by itself."""

    files: dict[str, Path]
    absolute: tuple[str, ...] = ()

    @classmethod
    def of(cls, code: Iterable[ModuleType], places: Iterable[Path]) -> Package:
        """Packages of code as they are imported here, and files and folders of the working folder, where they are.

        Raises:
            BadSource: together they are too large to travel, or a link leads out of a folder.
        """
        found: dict[str, Path] = {}
        for module in code:
            folder = Path(str(module.__file__)).parent
            found |= {f"{folder.name}/{name}": path for name, path in _below(folder)}
        outside = []
        for place in places:
            if place.is_absolute() or ".." in place.parts:
                outside.append(str(place))
            elif place == Path():  # a LoRA that lies in the project's folder itself: its files are named
                continue
            elif place.is_dir():
                found |= {f"{place.as_posix()}/{name}": path for name, path in _below(place)}
            elif place.exists():
                found[place.as_posix()] = place
        _refuse_large(found)
        return cls(dict(sorted(found.items())), tuple(sorted(set(outside))))

    def write(self, path: Path) -> None:
        """Write it as a ZIP; the same files give the same bytes, so that a node has them once."""
        with ZipFile(path, "w", ZIP_DEFLATED) as packed:
            for name, file in self.files.items():
                packed.writestr(ZipInfo(name), files.read_bytes(file, LARGEST), ZIP_DEFLATED)


def project_files(recipes: Iterable[Recipe]) -> list[Path]:
    """The files and folders that nodes need for recipes: local sources, pictures, goldens, the build's locks.

    Raises:
        BadSource: a link leads out of a LoRA's folder.
    """
    found = [paths.HERE.base_lock, paths.HERE.lora_lock]
    for recipe in recipes:
        if recipe.base.path is not None:
            found.append(Path(recipe.base.path))
        for lora in recipe.loras.values():
            if lora.path is not None:
                folder = Path(lora.path)
                names = (lora.filename, *ADAPTER, *stated_licence.NAMES, "README.md")
                found += [_inside(folder, name) for name in names]
        found += [Path(image) for case in recipe.regress.cases.values() for image in case.images]
        found.append(paths.GOLDEN / recipe.name)
    return list(dict.fromkeys(found))


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    """The regular files of a folder by POSIX path; a link that leads out of a base or LoRA is refused, as by a fuse."""
    for name in repository_files.list_files(folder):
        if UNSENT.isdisjoint(Path(name).parts) and (folder / name).is_file():
            yield name, _inside(folder, name)


def _inside(folder: Path, name: str) -> Path:
    try:
        return repository_files.locate(folder, name)
    except BadCheckpoint as error:
        raise BadSource(str(error)) from error


def _refuse_large(found: dict[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in found.items()}
    if (total := sum(sizes.values())) > LARGEST:
        largest = max(sizes, key=sizes.__getitem__)
        raise BadSource(
            f"the project's files that the nodes need have {progress.human_bytes(total)}, and at most "
            f"{progress.human_bytes(LARGEST)} travel; the largest is {largest} with "
            f"{progress.human_bytes(sizes[largest])}: name it by a whole path that every node has, or "
            "name a Hub repository"
        )
