"""All checks of a recipe on this machine: reads what they need and puts them together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_fuse.errors import BadSource, NoDevice, Refused
from lora_fuse.fusion import read_manifest, resolve_device
from lora_fuse.machine import files, progress, space
from lora_fuse.models import COMPONENT
from lora_fuse.recipe import Lock, Source, hf_cache
from lora_fuse.studies.doctor import access, disk, memory, pictures, software
from lora_fuse.studies.doctor.finding import Finding, fail, ok, warn
from lora_fuse.studies.doctor.stock import Stock, base_stock, lora_stock


@dataclass(frozen=True, slots=True)
class ExaminedRecipe:
    """What of a recipe's parameters a machine has to fit.

    Attributes:
        name: of the recipe.
        base: where the base is.
        loras: source, file name and scale of each LoRA.
        locks: of the last download: the base's, and the LoRAs' by name.
        scale: of the whole.
        cases: names of the pictures.
        placement: where they are made.
        dtype: of the weights then.
        threads: of torch then.
        device: what fuses.
        untouched: how files that do not change are taken over.
        exports: how many other formats are written.
        publishes: whether the result is published.
        merged: the folder of the result.
        manifest: its manifest.
        goldens: folder of the recipe's approved pictures.
    """

    name: str
    base: Source
    loras: Mapping[str, tuple[Source, str, float]]
    locks: tuple[Lock | None, Mapping[str, Lock]]
    scale: float
    cases: tuple[str, ...]
    placement: str
    dtype: str
    threads: int | None
    device: str
    untouched: files.Untouched
    exports: int
    publishes: bool
    merged: Path
    manifest: Path
    goldens: Path

    @property
    def sources(self) -> list[Source]:
        """Base and LoRAs."""
        return [self.base, *(source for source, _, _ in self.loras.values())]


def examine(recipe: ExaminedRecipe, pyproject: Path = Path("pyproject.toml")) -> Iterator[Finding]:
    """Every check, in the order in which a build comes to them. Nothing is fetched, and no file stays."""
    needed_python, needed = software.requirements(pyproject)
    yield software.python(needed_python)
    yield software.packages(needed)
    yield software.command("git", "install git")
    yield software.command("dvc", "source .venv/bin/activate, or make setup")
    yield from _sources(recipe)


def _sources(recipe: ExaminedRecipe) -> Iterator[Finding]:
    stocks: dict[str, Stock] = {}
    refusals: dict[str, Refused] = {}
    base_lock, lora_locks = recipe.locks
    looks: dict[str, Callable[[], Stock]] = {"base": partial(base_stock, recipe.base, base_lock)}
    for name, (source, file, _) in recipe.loras.items():
        looks[f"LoRA {name}"] = partial(lora_stock, source, file, lora_locks.get(name))
    for label, look in looks.items():
        try:
            stocks[label] = look()
        except Refused as refused:
            refusals[label] = refused
    missing = sum(len(stock.missing) for stock in stocks.values())
    used = any(source.repo_id for source in recipe.sources)
    yield access.reach(refusals, missing, used=used)
    yield access.token(needed=used and bool(missing or refusals), publishes=recipe.publishes)
    for label, refusal in refusals.items():
        yield fail(label, str(refusal))
    for label, stock in stocks.items():
        yield _stock(label, stock)
    yield from _places(recipe, stocks)
    yield from _machine(recipe, stocks.get("base"))
    yield software.determinism(os.environ, on_gpu=recipe.placement != "cpu")
    key = pictures.key_here(recipe.placement, recipe.dtype, recipe.threads)
    if key is None:
        yield warn("goldens", "not known without the GPU that the pictures need")
    else:
        yield pictures.approved_pictures(recipe.goldens, recipe.cases, key)


def _stock(label: str, stock: Stock) -> Finding:
    here = f"{progress.human_bytes(stock.to_fetch)} to fetch" if stock.missing else "all of it here"
    return ok(
        label,
        f"{stock.label}: {len(stock.sizes)} files, {progress.human_bytes(stock.size)} by {stock.known_by}, {here}",
    )


def _places(recipe: ExaminedRecipe, stocks: Mapping[str, Stock]) -> Iterator[Finding]:
    """Disks: what is fetched goes to the cache, what is merged beside the last merge; it may be the same disk."""
    cache, out = hf_cache.cache_dir(), recipe.merged.parent
    uses_cache = any(source.repo_id for source in recipe.sources)
    findings = [disk.writable("artifacts", out), *([disk.writable("cache", cache)] if uses_cache else [])]
    yield from findings
    yield disk.locks(out)
    base = stocks.get("base")
    source = files.nearest_folder(cache if recipe.base.repo_id else Path(str(recipe.base.path)))
    try:
        link = "copy" if recipe.untouched == "copy" else files.link_between(source, files.nearest_folder(out))
    except OSError:
        link = "copy"
    fused, rest = _parts(base)
    yield disk.sharing(link, rest, " and ".join(dict.fromkeys(map(disk.filesystem, (source, out)))))
    fetch = sum(stock.to_fetch for stock in stocks.values())
    together = uses_cache and files.nearest_folder(cache).stat().st_dev == files.nearest_folder(out).stat().st_dev
    if base is None:
        yield warn("disk", "what is needed is not known, as the base's size is unknown")
        return
    if uses_cache and not together:
        yield disk.room("disk, cache", cache, space.free_bytes(cache), fetch, "base and LoRAs that are not here")
    needed = space.SPARE + fused + (rest if link == "copy" else 0) + recipe.exports * fused
    parts = f"the changed files, {progress.human_bytes(space.SPARE)} to spare" + (
        ", copies of the rest" if link == "copy" else ""
    )
    parts += ", exports" if recipe.exports else ""
    held, free = _held(recipe.merged), space.free_bytes(out)
    if together and fetch:
        needed, parts = needed + fetch, f"{parts}, and what is fetched, on the same disk"
    if held:
        yield disk.rebuild("disk", recipe.merged, free, needed, held, same=_is_of(recipe))
    else:
        yield disk.room("disk", out, free, needed, parts)


def _parts(base: Stock | None) -> tuple[int, int]:
    """Bytes that a fuse may change, which are the transformer's weights, and all others."""
    if base is None:
        return 0, 0
    fused = sum(base.sizes[name] for name in base.weights.get(COMPONENT, ()))
    return fused, base.size - fused


def _held(merged: Path) -> int:
    """Bytes that are a merge's own: files with a second name are shared with the base."""
    files = [path.stat() for path in merged.rglob("*") if path.is_file()] if merged.is_dir() else []
    return sum(info.st_size for info in files if info.st_nlink == 1)


def _is_of(recipe: ExaminedRecipe) -> bool:
    """Whether the last merge is of this recipe, sources and scales."""
    try:
        manifest, _ = read_manifest(recipe.manifest)
    except BadSource:
        return False
    base = manifest.base
    if (
        base is None
        or manifest.selection is not None
        or (manifest.recipe, manifest.scale) != (recipe.name, recipe.scale)
    ):
        return False
    held = {lora.name: (lora.repo_id, lora.path, lora.filename, lora.scale) for lora in manifest.loras}
    wanted = {n: (s.repo_id, s.path, file, scale) for n, (s, file, scale) in recipe.loras.items()}
    return (base.repo_id, base.path, base.requested) == (
        recipe.base.repo_id,
        recipe.base.path,
        recipe.base.revision,
    ) and held == wanted


def _machine(recipe: ExaminedRecipe, base: Stock | None) -> Iterator[Finding]:
    parts, exact = memory.weights(base, recipe.dtype) if base else ({}, True)
    dtype = recipe.dtype if exact else f"{recipe.dtype}, if they are stored so"
    if base is None:
        yield warn("memory", "what is needed is not known, as the base's size is unknown")
    else:
        yield memory.ram(parts, *memory.memory(), dtype)
    yield memory.gpu(recipe.placement, parts, memory.gpu_memory(), dtype)
    try:
        yield ok("fuse", f"on {resolve_device(recipe.device)}")
    except NoDevice as refusal:
        yield fail("fuse", str(refusal))
