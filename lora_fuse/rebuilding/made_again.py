"""A published checkpoint made again: base and LoRAs at their commits, fused, and every sha256 compared with the list.

Invariant: what is in OUT afterwards is what the list says, byte for byte, and otherwise OUT is as it was.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from lora_fuse.checkpoint import dtypes, fitness
from lora_fuse.errors import BadConfig, BadSource, Refused
from lora_fuse.fusion import Fused, FuseJob, Plan, plan_base
from lora_fuse.hub import lock_base, lock_lora, streamed_base
from lora_fuse.lora import LoraInput
from lora_fuse.machine import direct_io, files, progress, text
from lora_fuse.rebuilding.published_recipe import PublishedRecipe, read_recipe
from lora_fuse.recipe import Lock, Manifest, Source, hf_cache, records
from lora_fuse.release import Trusted, contents

FROM_HUB = "streamed from the Hub"


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A checkpoint that was made again: what it is, and the merge that was written."""

    recipe: PublishedRecipe
    fused: Fused
    base: str  # the place that it was read from, in words


@dataclass(frozen=True, slots=True)
class _OpenBase:
    """The base as a folder, and its weights where those are still on their way."""

    root: Path
    words: str
    streamed: direct_io.StreamedFiles | None = None


def rebuild(  # noqa: PLR0913 - by keyword, each is a choice of its own
    place: str,
    out: Path,
    *,
    trusted: Trusted | None = None,
    expected: Mapping[str, str] | None = None,
    base: Path | None = None,
    loras: Mapping[str, Path] | None = None,
    device: str = "auto",
    replace: bool = False,
) -> Rebuilt:
    """Make the checkpoint of a published repository again, in `out`, with all that was published beside it.

    Args:
        place: ``owner/name@revision`` on the Hub, or a folder; with weights or a recipe.
        out: the folder to make, as for a fuse.
        trusted: who has to have signed it, see `read_recipe`.
        expected: the `repository` and `tag` that it has to be.
        base: a folder that is the base, in the place of the repository that is named.
        loras: files or folders that are LoRAs, by their names in the list.
        device: as for a fuse.
        replace: replace whatever is at `out`.

    Raises:
        BadSource: the repository, the base or a LoRA cannot be had, or is not what the list says.
        Refused: see `read_recipe`; or a file came out with another sha256, the first by name is said, with both.
        Refused: for all that a fuse refuses.
    """
    recipe = read_recipe(place, trusted, expected)
    listing = recipe.listing
    given = dict(loras or {})
    unknown = sorted(given.keys() - {lora.name for lora in listing.loras})
    if unknown:
        known = ", ".join(lora.name for lora in listing.loras)
        raise BadConfig(f"--lora {unknown[0]}={given[unknown[0]]}: the LoRAs of {recipe.label} are {known}")
    inputs = [_input(recipe, lora, given.get(lora.name)) for lora in listing.loras]
    with _opened_base(recipe, base) as opened:
        job = FuseJob(
            _plan(recipe, opened, inputs),
            out,
            device=device,
            pipeline=recipe.pipeline,
            scheduler=recipe.scheduler,
            replace=replace,
            force_quantised=listing.requantised is not None,
            also=recipe.beside,
        )
        fused = job.run(base=listing.base, approve=lambda made: _approved(recipe, made))
    return Rebuilt(recipe, fused, opened.words)


def _input(recipe: PublishedRecipe, lora: records.MergedLora, given: Path | None) -> LoraInput:
    """A LoRA as it goes into the fuse: the file or folder that was given, or the one at its commit, fetched."""
    component = lora.components[0] if len(lora.components) == 1 else None
    if given is not None:
        return LoraInput(lora.name, given, lora.scale, component)
    if lora.repo_id is None or lora.filename is None:
        raise BadSource(
            f"the LoRA {lora.name} of {recipe.label} was a file of who published it, sha256 {lora.sha256}; name yours, "
            f"--lora {lora.name}=FILE"
        )
    progress.log(f"rebuild: the LoRA {lora.repo_id}@{lora.revision}, {lora.filename}")
    lock = lock_lora(Source(repo_id=lora.repo_id, path=None, revision=lora.revision), lora.filename, previous=None)
    return LoraInput(lora.name, hf_cache.locate(lock) / lock.lora_name, lora.scale, component)


@contextmanager
def _opened_base(recipe: PublishedRecipe, given: Path | None) -> Iterator[_OpenBase]:
    """The base: the folder that was given, or what the Hub's client has of its commit, or a stream.

    What is read more than once, as weights that are decoded, is fetched before.
    """
    lock = _base_of(recipe)
    source = Source(repo_id=lock.repo_id, path=None, revision=lock.revision) if lock.repo_id else None
    if given is not None:
        _refuse_other_sizes(given, lock)
        opened = _OpenBase(given, f"in {given}")
    elif source is None:
        raise BadSource(
            f"the base of {recipe.label}, {lock.path}, was a folder of who published it; name yours, --base FOLDER"
        )
    elif (here := _cached(lock)) is not None:
        opened = _OpenBase(here, "in the Hub client's cache")
    elif recipe.listing.source is not None or recipe.listing.dtype is not None:
        lock_base(source, previous=None)
        opened = _OpenBase(hf_cache.locate(lock), "fetched from the Hub")
    else:
        with streamed_base.open_streamed(source, lock=lock) as streamed:
            fitness.refuse_unloadable(streamed.root, BadSource)
            yield _OpenBase(streamed.root, FROM_HUB, streamed.files)
        return
    fitness.refuse_unloadable(opened.root, BadSource)
    yield opened


def _base_of(recipe: PublishedRecipe) -> Lock:
    if recipe.listing.base is None:  # refused where it was read
        raise BadSource(f"{recipe.label} names no base")
    return recipe.listing.base


def _cached(lock: Lock) -> Path | None:
    try:
        return hf_cache.locate(lock)
    except BadSource:
        return None


def _refuse_other_sizes(folder: Path, lock: Lock) -> None:
    """Refuse a folder that cannot be the base, by names and sizes; the bytes are in every sha256 of the result."""
    for name, record in sorted(lock.files.items()):
        path = files.inside(folder, name) if (folder / name).is_file() else None
        if path is None or path.stat().st_size != record.size:
            found = "is not there" if path is None else f"has {path.stat().st_size} bytes"
            raise BadSource(
                f"--base {folder}: {name} {found}, and the base has {record.size} bytes; name the same base"
            )


def _plan(recipe: PublishedRecipe, base: _OpenBase, inputs: list[LoraInput]) -> Plan:
    """The plan of the list; its LoRAs are those of the list, by their sha256.

    Raises:
        BadSource: a LoRA is another one.
        Refused: see `plan_base`.
    """
    listing = recipe.listing
    lock = _base_of(recipe)
    plan = plan_base(
        base.root,
        inputs,
        listing.selection,
        names=lock.files,
        label=lock.label if lock.repo_id else None,
        dtype=next((name for name, dtype in dtypes.OUTPUTS.items() if dtype == listing.dtype), None),
        requantise=listing.requantised is not None,
        streamed=base.streamed,
    )
    for wanted, lora in zip(listing.loras, plan.loras, strict=True):
        for what, got, listed in (
            ("", lora.sha256, wanted.sha256),
            (" (its configuration)", lora.config_sha256, wanted.config_sha256),
        ):
            if got != listed:
                raise BadSource(
                    f"{lora.path}{what} has sha256 {got}, and {recipe.label} was made of {wanted.name} with {listed}"
                )
    return plan


def _approved(recipe: PublishedRecipe, made: Manifest) -> Manifest:
    """The manifest of what was written, if that is what is listed, in its words.

    Raises:
        Refused: a file is missing, is one too many, or has another sha256.
    """
    listing = recipe.listing
    by = f", by lora-fuse {listing.builder.version}" if listing.builder else ""
    got = {name: file for name, file in made.files.items() if name not in recipe.beside}
    wanted = recipe.merge
    for name in sorted(got.keys() | wanted.keys()):
        mine = got[name].sha256 if name in got else "none"
        listed = wanted[name].sha256 if name in wanted else "none"
        if mine != listed:
            raise Refused(
                f"{name} came out with sha256 {mine}, and {contents.LIST} of {recipe.label} says {listed} "
                f"({recipe.signature}{by}); nothing was kept"
            )
    said = {part.name: getattr(listing, part.name) for part in fields(Manifest)}
    return Manifest(**said | {"files": {name: listing.files.get(name, file) for name, file in made.files.items()}})


def described(done: Rebuilt) -> list[str]:
    """A few lines on what was made again: its size, and the sha256 of what was fused."""
    made = done.recipe.merge
    total = progress.human_bytes(sum(file.size for file in made.values()))
    rate = progress.human_rate(done.fused.bytes_written, done.fused.seconds)
    lines = [f"{total} in {len(made)} files, each with the sha256 of the list; base {done.base}; written: {rate}"]
    lines += [f"  {file.sha256}  {name}" for name, file in made.items() if file.origin == "fused"]
    for name in done.recipe.exports:
        lines.append(text.line(f"  note: {name} is an export, and not made again{_fetching(done, name)}"))
    return lines


def _fetching(done: Rebuilt, name: str) -> str:
    """The way to an export that a repository has, as a verification of the whole misses it."""
    listing = done.recipe.listing
    if name in listing.absent or listing.repository is None:
        return ""
    words = [listing.repository, name, *(["--revision", listing.tag] if listing.tag else []), "--local-dir", "OUT"]
    return f"; hf download {shlex.join(words)} fetches it"
