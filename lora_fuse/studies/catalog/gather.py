"""Reads what the stages of a variant left, and compares it with its recipe; builds nothing, decides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_fuse.errors import BadSource, LoraFuseError
from lora_fuse.fusion import read_manifest
from lora_fuse.hub import Receipt
from lora_fuse.machine import files
from lora_fuse.models import COMPONENT
from lora_fuse.pictures import encode, picture
from lora_fuse.recipe import Artifacts, Manifest, Recipe, Source, hf_cache, paths, records
from lora_fuse.regression import gate
from lora_fuse.studies.catalog.entry import CasePicture, CatalogEntry, Publication, Size, State, Step

SIDE = 256  # pixels of a thumbnail's longer side
QUALITY = 85
ELSEWHERE = "its weights are not on this machine, which has the records of its build"


def gather(recipe: Recipe, at: Artifacts, *, of: str, build: str, publish: str | None) -> CatalogEntry:
    """Describe a variant; a result that cannot be read is named in its entry, and stops no other one's.

    `of` is the recipe that it varies, `build` and `publish` are commands; None if it is not to be published.
    """
    unbuilt = CatalogEntry(
        name=recipe.name,
        recipe=of,
        state="not built",
        notes=(),
        command=build,
        pipeline=recipe.base.pipeline,
        base=Step("base", recipe.base.label, recipe.base.revision),
        loras=tuple(
            Step(name, lora.label, lora.revision, file=lora.filename, scale=recipe.fuse.scale_of(name))
            for name, lora in sorted(recipe.loras.items())
        ),
        repo_id=recipe.publish.repo_id,
        tag=recipe.publish.tag,
    )
    try:
        if not at.manifest.exists():
            return replace(unbuilt, publication=_publication(recipe, at, None))
        return _built(unbuilt, recipe, at, publish)
    except (LoraFuseError, OSError, KeyError, TypeError) as error:
        note = str(error) if isinstance(error, LoraFuseError) else f"{type(error).__name__}: {error}"
        return replace(unbuilt, state="unreadable", notes=(note,))


def _built(unbuilt: CatalogEntry, recipe: Recipe, at: Artifacts, publish: str | None) -> CatalogEntry:
    manifest, manifest_sha256 = read_manifest(at.manifest)
    verify = _read(at.verify, "verify", manifest_sha256)
    metrics = _read(at.metrics, "regress", manifest_sha256)
    stale = [*_differences(recipe, manifest, at), *_other_files(recipe, manifest, at)]
    missing = [*_unfinished(verify, metrics, recipe), *([] if at.merged.is_dir() else [ELSEWHERE])]
    stale += [] if stale or missing else _contradictions(recipe, at)
    state: State = "stale" if stale else "incomplete" if missing else "built"
    publication = _publication(recipe, at, manifest_sha256)
    passed = bool(verify and metrics and verify["passed"] and metrics["passed"])
    to_send = publish if publication is None or publication.notes else None
    base = manifest.base
    entry = replace(
        unbuilt,
        state=state,
        notes=(*stale, *missing),
        command=to_send if state == "built" and passed else unbuilt.command,
        base=Step("base", base.repo_id or str(base.path), base.requested, base.revision) if base else unbuilt.base,
        loras=tuple(
            Step(lora.name, lora.repo_id or str(lora.path), None, lora.revision, lora.filename, lora.sha256, lora.scale)
            for lora in manifest.loras
        ),
        weights=verify["passed"] if verify else None,
        targets=manifest.targets,
        size=_size(manifest, at.merged),
        manifest_sha256=manifest_sha256,
        publication=publication,
    )
    if metrics is None:
        return entry
    return replace(
        entry,
        verdict=metrics["verdict"],
        passed=passed,
        environment=metrics["environment"],
        judged=f"{datetime.fromtimestamp(at.metrics.stat().st_mtime, UTC):%Y-%m-%dT%H:%MZ}",
        report=at.report if at.report.exists() else None,
        pictures=tuple(_pictures(recipe, metrics, at)),
    )


def _read(path: Path, stage: str, manifest_sha256: str) -> dict[str, Any] | None:
    """A stage's result, if it is there and of this merge."""
    if not path.exists():
        return None
    content = paths.read_object(path, stage)
    if "manifest_sha256" not in content:
        raise BadSource(f"{path} names no manifest, so it is not what its stage writes")
    return content if content["manifest_sha256"] == manifest_sha256 else None


def _unfinished(verify: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None, recipe: Recipe) -> Iterator[str]:
    """The steps that are still to be done, a sentence each."""
    if verify is None:
        yield "these weights are not verified yet"
    if metrics is None:
        yield "no picture is made of these weights yet"
    elif missing := [name for name in recipe.regress.cases if f"{name}.verdict" not in metrics]:
        yield f"no picture of {', '.join(missing)} is made yet"


def _contradictions(recipe: Recipe, at: Artifacts) -> Iterator[str]:
    """The reason why the gate cannot decide on what lies there, if it cannot."""
    try:
        gate.decide(recipe, at)
    except LoraFuseError as refusal:
        yield str(refusal)


def _differences(recipe: Recipe, manifest: Manifest, at: Artifacts) -> Iterator[str]:
    """Differences between the recipe and what was built, a sentence each."""
    base = manifest.base
    if base is None or (base.repo_id or base.path, base.requested) != (recipe.base.label, recipe.base.revision):
        yield f"the base is {_named(recipe.base)} now, and {base.label if base else 'unknown'} was built on"
    built = {lora.name: lora for lora in manifest.loras}
    for name in sorted(recipe.loras.keys() | built.keys()):
        now = recipe.loras.get(name)
        then = built.get(name)
        if now is None or then is None:
            yield f"LoRA {name} is {'new' if now else 'gone'}"
        elif (now.label, now.filename) != (then.repo_id or then.path, then.filename):
            was = f"{then.repo_id or then.path}/{then.filename}"
            yield f"LoRA {name} is {_named(now)}/{now.filename} now, was {was}"
        elif recipe.fuse.scale_of(name) != then.scale:
            yield f"LoRA {name} has scale {recipe.fuse.scale_of(name):g} now, was built with {then.scale:g}"
        elif now.component is not None and (now.component,) != (was_in := then.components or (COMPONENT,)):
            yield f"LoRA {name} goes into {now.component} now, was built into {', '.join(was_in)}"
    selection = recipe.fuse.selection
    if manifest.selection != (None if selection.everything else selection):
        yield "other modules are chosen or scaled now"
    if not at.merged.is_dir():  # built on another machine
        return
    index = paths.read_object(at.merged / "model_index.json", "fuse")
    if index.get("_class_name") != recipe.base.pipeline:
        yield f"the pipeline is {recipe.base.pipeline} now, was {index.get('_class_name')}"
    scheduler = paths.read_object(at.merged / "scheduler/scheduler_config.json", "fuse")
    for key, value in recipe.scheduler_config.items():
        if scheduler.get(key) != value:
            yield f"the scheduler's {key} is {value} now, was {scheduler.get(key)}"


def _other_files(recipe: Recipe, manifest: Manifest, at: Artifacts) -> Iterator[str]:
    """Sources that are other files now than those that were built from, as far as that costs no network."""
    base, locks = at.earlier_locks()
    if base and manifest.base and base.files != manifest.base.files:
        yield f"the base is locked to {base.label} now, and {manifest.base.label} was built on"
    if not at.lora_lock.exists():
        return
    for lora in manifest.loras:
        lock = locks.get(lora.name)
        now = recipe.loras.get(lora.name)
        if lock and lora.sha256 not in {record.sha256 for record in lock.files.values()}:
            yield f"LoRA {lora.name} is locked to another file now than the one that was built from"
        elif lock and now and lock.requested != now.revision:
            yield f"LoRA {lora.name} is asked for at {now.revision} now, was {lock.requested}"
        elif now and now.path:
            file = Path(now.path) / now.filename
            sha256 = files.hash_file(file).sha256 if file.is_file() else lora.sha256
            if sha256 != lora.sha256:
                yield f"LoRA {lora.name}: {file} has sha256 {sha256[:12]}… now, was {lora.sha256[:12]}…"


def _named(source: Source) -> str:
    return f"{source.label}@{source.revision}" if source.revision else source.label


def _size(manifest: Manifest, merged: Path) -> Size:
    taken = {name: file.size for name, file in manifest.files.items() if file.origin == "base"}
    linked: int | None = None
    if manifest.base:
        with suppress(BadSource, OSError):
            root = hf_cache.locate(manifest.base)
            linked = sum(size for name, size in taken.items() if (root / name).samefile(merged / name))
    return Size(sum(file.size for file in manifest.files.values()), sum(taken.values()), linked)


def _pictures(recipe: Recipe, metrics: Mapping[str, Any], at: Artifacts) -> Iterator[CasePicture]:
    for name, case in recipe.regress.cases.items():
        path = at.images / f"{name}.merged.png"
        yield CasePicture(name, case.prompt, metrics.get(f"{name}.verdict"), path, _thumbnail(path))


def _thumbnail(path: Path) -> encode.Encoded | None:
    try:
        whole = picture.Picture(picture.read_levels(path))
    except OSError:
        return None
    return encode.encoded(whole, large=0, side=SIDE, quality=QUALITY)


def _publication(recipe: Recipe, at: Artifacts, manifest_sha256: str | None) -> Publication | None:
    if not at.receipt.exists():
        return None
    receipt = records.read(Receipt, at.receipt)
    if receipt.status != "published":
        return None
    wanted = recipe.publish
    changes = [("repository", receipt.repo_id, wanted.repo_id), ("tag", receipt.tag, wanted.tag)]
    notes = [f"the {name} asked for now is {now}, it was {then}" for name, then, now in changes if now != then]
    if wanted.repo_id is None:
        notes = ["it is not to be published any more; what is there stays"]
    if receipt.manifest_sha256 != manifest_sha256:
        notes.insert(0, "what was published is not what is built now")
    return Publication(str(receipt.repo_id), str(receipt.commit), receipt.tag, receipt.url, tuple(notes))
