"""All checks of a recipe on this machine: reads what they need and puts them together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from lora_fuse.checkpoint import repository_files
from lora_fuse.differences import presence
from lora_fuse.errors import BadGolden, BadSource, NoDevice, Refused
from lora_fuse.fusion import plan_base, read_manifest, resolve_device
from lora_fuse.hub import sizes
from lora_fuse.lora import LoraInput
from lora_fuse.machine import files, progress, space
from lora_fuse.pictures import environment
from lora_fuse.recipe import Artifacts, Recipe, hf_cache, paths
from lora_fuse.regression import goldens
from lora_fuse.studies.doctor import access, disk, memory, software
from lora_fuse.studies.doctor.finding import Finding, fail, ok, warn


def examine(recipe: Recipe, at: Artifacts, pyproject: Path = Path("pyproject.toml")) -> Iterator[Finding]:
    """Every check, in the order in which a build comes to them. No file is fetched, and none stays."""
    needed_python, needed = software.requirements(pyproject)
    yield software.python(needed_python)
    yield software.packages(needed)
    yield software.command("git", "install git")
    yield software.command("dvc", "source .venv/bin/activate, or make setup")
    yield from _sources(recipe, at)


def _sources(recipe: Recipe, at: Artifacts) -> Iterator[Finding]:
    found, refusals = _sizes(recipe, at)
    missing = sum(len(size.missing) for size in found.values())
    used = _uses_the_hub(recipe)
    yield access.reach(refusals, missing, used=used)
    yield access.token(needed=used and bool(missing or refusals), publishes=recipe.publish.enabled)
    for label, refusal in refusals.items():
        yield fail(label, str(refusal))
    for label, size in found.items():
        yield _size(label, size)
    yield from _places(recipe, at, found)
    yield from _machine(recipe, found.get("base"))
    if not refusals and not missing:
        yield in_the_base(recipe, found)
    yield from _pictures(recipe)


def _sizes(recipe: Recipe, at: Artifacts) -> tuple[dict[str, sizes.SourceSize], dict[str, Refused]]:
    """Sizes of base and LoRAs by label, and the error of each that cannot be had."""
    base_lock, lora_locks = at.earlier_locks()
    base_size = partial(sizes.base_size, timeout=access.PATIENCE, once=True)
    lora_size = partial(sizes.lora_size, timeout=access.PATIENCE, once=True)
    looks: dict[str, Callable[[], sizes.SourceSize]] = {"base": partial(base_size, recipe.base, base_lock)}
    for name, lora in recipe.loras.items():
        looks[f"LoRA {name}"] = partial(lora_size, lora, lora.filename, lora_locks.get(name))
    found: dict[str, sizes.SourceSize] = {}
    refusals: dict[str, Refused] = {}
    for label, look in looks.items():
        try:
            found[label] = look()
        except Refused as refused:
            refusals[label] = refused
    return found, refusals


def _uses_the_hub(recipe: Recipe) -> bool:
    return any(source.repo_id for source in (recipe.base, *recipe.loras.values()))


def _size(label: str, size: sizes.SourceSize) -> Finding:
    here = f"{progress.human_bytes(size.to_fetch)} to fetch" if size.missing else "all of it here"
    total = f"{len(size.sizes)} files, {progress.human_bytes(size.total)} by {size.known_by}"
    return ok(label, f"{size.label}: {total}, {here}")


def _places(recipe: Recipe, at: Artifacts, found: Mapping[str, sizes.SourceSize]) -> Iterator[Finding]:
    """Disks: what is fetched goes to the cache, what is merged beside the last merge; it may be the same disk."""
    cache = hf_cache.cache_dir()
    merged = at.merged.resolve() if at.merged.is_symlink() else at.merged  # a merge goes through the link
    out = merged.parent
    uses_cache = _uses_the_hub(recipe)
    yield disk.writable("artifacts", out)
    if uses_cache:
        yield disk.writable("cache", cache)
    yield disk.locks(out)
    base = found.get("base")
    source = files.nearest_folder(cache if recipe.base.repo_id else Path(str(recipe.base.path)))
    nearest = files.nearest_folder(out)
    editable = recipe.base.path if source.stat().st_dev == nearest.stat().st_dev else None
    try:
        copies = recipe.fuse.untouched == "copy" or recipe.streams
        link = "copy" if copies else files.link_between(source, nearest, read_only=recipe.base.repo_id is not None)
    except OSError:
        link = "copy"
    fused = base.fused(recipe.components) if base else 0
    rest = base.total - fused if base else 0
    yield disk.sharing(link, rest, " and ".join(dict.fromkeys(map(disk.filesystem, (source, out)))), editable)
    if base is None:
        yield warn("disk", "what is needed is not known, as the base's size is unknown")
        return
    parts = {
        "the changed files": recipe.fuse.growth * fused,
        f"{progress.human_bytes(space.SPARE)} to spare": space.SPARE,
    }
    if link == "copy":
        parts["copies of the rest"] = rest
    if recipe.export.formats:
        parts["exports"] = len(recipe.export.formats) * fused
    fetch = _to_fetch(recipe, found)
    if uses_cache and files.nearest_folder(cache).stat().st_dev != files.nearest_folder(out).stat().st_dev:
        yield disk.room("disk, cache", cache, space.free_bytes(cache), fetch, "base and LoRAs that are not here")
    elif fetch:
        parts["and what is fetched, on the same disk"] = fetch
    needed = sum(parts.values())
    own = _own_bytes(merged)
    if own:
        yield disk.rebuild("disk", merged, space.free_bytes(out), needed, own, same=_is_of(recipe, at))
    else:
        yield disk.room("disk", out, space.free_bytes(out), needed, ", ".join(parts))


def _to_fetch(recipe: Recipe, found: Mapping[str, sizes.SourceSize]) -> int:
    """Bytes that come to the cache: not the weights of a base that is streamed."""
    streamed = {name for name in found["base"].missing if recipe.streams and repository_files.is_weights(name)}
    return sum(size.to_fetch for size in found.values()) - sum(found["base"].sizes[name] for name in streamed)


def _own_bytes(merged: Path) -> int:
    """Bytes that are a merge's own: files with a second name are shared with the base."""
    infos = [path.stat() for path in merged.rglob("*") if path.is_file()] if merged.is_dir() else []
    return sum(info.st_size for info in infos if info.st_nlink == 1)


def _is_of(recipe: Recipe, at: Artifacts) -> bool:
    """True if the last merge is of this recipe, sources and scales."""
    try:
        manifest, _ = read_manifest(at.manifest)
    except BadSource:
        return False
    base = manifest.base
    if base is None or manifest.selection is not None:
        return False
    built = {lora.name: (lora.repo_id, lora.path, lora.filename, lora.scale) for lora in manifest.loras}
    wanted = {
        name: (lora.repo_id, lora.path, lora.filename, recipe.fuse.scale_of(name))
        for name, lora in recipe.loras.items()
    }
    return (
        (manifest.recipe, manifest.scale) == (recipe.name, recipe.fuse.scale)
        and (base.repo_id, base.path, base.requested) == recipe.base.place
        and built == wanted
    )


def in_the_base(recipe: Recipe, found: Mapping[str, sizes.SourceSize]) -> Finding:
    """Look for the recipe's LoRAs in its base, all of which are here."""
    base = found["base"]
    inputs = [
        LoraInput(
            name, found[f"LoRA {name}"].root / lora.filename, recipe.fuse.scale_of(name), recipe.component_of(name)
        )
        for name, lora in sorted(recipe.loras.items())
    ]
    try:
        looked = presence.look_for(
            plan_base(base.root, inputs, recipe.fuse.selection, names=base.sizes, label=base.label)
        )
    except Refused as refusal:
        return fail("in the base", str(refusal))
    claims = [one.claim for one in looked if one.claim is not None]
    if claims:
        return warn("in the base", " and ".join(claims), "", presence.WAY_OUT)
    told = [f"{one.name} would show from {one.found.smallest:.2g} on" for one in looked if one.found is not None]
    return ok("in the base", f"no LoRA of the recipe is seen in it: {', '.join(told) or 'too few weights to tell'}")


def _machine(recipe: Recipe, base: sizes.SourceSize | None) -> Iterator[Finding]:
    regress = recipe.regress
    parts: dict[str, int] = {}
    dtype: str = regress.dtype
    if base is None:
        yield warn("memory", "what is needed is not known, as the base's size is unknown")
    else:
        parts, exact = memory.weights(base, dtype)
        dtype = dtype if exact else f"{dtype}, if they are stored so"
        yield memory.ram(regress.placement, parts, *memory.memory(), dtype)
    yield memory.gpu(regress.placement, parts, memory.gpu_memory(), dtype)
    try:
        yield ok("fuse", f"on {resolve_device(recipe.fuse.device)}")
    except NoDevice as refusal:
        yield fail("fuse", str(refusal))


def _pictures(recipe: Recipe) -> Iterator[Finding]:
    """Set torch up as `regress` does, for the same key; a process that does this goes on to nothing else."""
    regress = recipe.regress
    on_gpu = regress.placement != "cpu"
    yield software.determinism(os.environ, on_gpu=on_gpu)
    environment.make_deterministic(regress.threads)
    try:
        key = environment.environment(regress.placement, regress.dtype, compiled=regress.compile).key
    except NoDevice:
        yield warn("goldens", "not known without the GPU that the pictures need")
    else:
        yield approved_pictures(paths.GOLDEN / recipe.name, list(regress.cases), key)


def approved_pictures(folder: Path, cases: Sequence[str], key: environment.Key) -> Finding:
    """Predict what the gate will find for pictures of this machine's key, from the recipe's goldens in `folder`."""
    try:
        approved = goldens.Goldens(folder).for_run(key, cases)
    except BadGolden as refusal:
        return fail("goldens", str(refusal))
    own = [case for case, kept in approved.items() if any(not picture.elsewhere for picture in kept)]
    near = [case for case, kept in approved.items() if kept and case not in own]
    found = f"{len(own)} of {len(cases)} cases approved for {key}"
    if len(own) == len(cases):
        return ok("goldens", found)
    remedy = "look at the report of the build, then approve its pictures"
    code = "3 (no-golden)" if len(own) + len(near) < len(cases) else "4 (review)"
    more = f", {len(near)} for a machine much like it" if near else ""
    return warn("goldens", f"{found}{more}: gate will exit with {code}", "", remedy)
