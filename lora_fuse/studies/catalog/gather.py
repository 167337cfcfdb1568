"""Reads what the stages of a variant left, and compares it with what is wanted; builds nothing, decides nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_fuse.errors import BadSource, LoraFuseError
from lora_fuse.fusion import read_manifest
from lora_fuse.hub import Receipt
from lora_fuse.machine import files
from lora_fuse.pictures import encode
from lora_fuse.recipe import Manifest, Source, hf_cache, records
from lora_fuse.studies.catalog.records import CasePicture, Entry, Places, Publication, Size, State, Step, Wanted

SIDE = 256  # pixels of a thumbnail's longer side
QUALITY = 85


def gather(wanted: Wanted, at: Places) -> Entry:
    """A variant as it is found; a result that cannot be read is said in its entry, and stops no other one's."""
    plain = Entry(
        name=wanted.name,
        recipe=wanted.recipe,
        state="not built",
        notes=(),
        command=wanted.build,
        pipeline=wanted.pipeline,
        base=_asked("base", wanted.base),
        loras=tuple(
            replace(_asked(name, lora.source), file=lora.filename, scale=lora.scale)
            for name, lora in sorted(wanted.loras.items())
        ),
        repo_id=wanted.repo_id,
        tag=wanted.tag,
    )
    try:
        if not (at.manifest.exists() and at.merged.is_dir()):
            return replace(plain, publication=_publication(wanted, at, None))
        return _built(plain, wanted, at)
    except (LoraFuseError, OSError, KeyError, TypeError) as error:
        said = str(error) if isinstance(error, LoraFuseError) else f"{type(error).__name__}: {error}"
        return replace(plain, state="unreadable", notes=(said,))


def _built(plain: Entry, wanted: Wanted, at: Places) -> Entry:
    manifest, manifest_sha256 = read_manifest(at.manifest)
    verify, metrics = _read(at.verify, manifest_sha256), _read(at.metrics, manifest_sha256)
    stale = [*_differences(wanted, manifest, at), *_other_files(wanted, manifest, at)]
    missing = [f"{what} yet" for what, one in _unfinished(verify, metrics, wanted) if one]
    state: State = "stale" if stale else "incomplete" if missing else "built"
    publication = _publication(wanted, at, manifest_sha256)
    passed = bool(verify and metrics and verify["passed"] and metrics["passed"])
    to_send = wanted.publish if passed and (publication is None or publication.notes) else None
    base = manifest.base
    return replace(
        plain,
        state=state,
        notes=(*stale, *missing),
        command=to_send if state == "built" and passed else wanted.build,
        base=plain.base
        if base is None
        else Step("base", base.repo_id or str(base.path), base.requested, base.revision),
        loras=tuple(
            Step(one.name, one.repo_id or str(one.path), None, one.revision, one.filename, one.sha256, one.scale)
            for one in manifest.loras
        ),
        weights=verify["passed"] if verify else None,
        targets=manifest.targets,
        size=_size(manifest, at.merged),
        verdict=metrics["verdict"] if metrics else None,
        passed=passed if metrics else None,
        environment=metrics["environment"] if metrics else None,
        judged=_written(at.metrics) if metrics else None,
        report=at.report if metrics and at.report.exists() else None,
        manifest_sha256=manifest_sha256,
        pictures=tuple(_pictures(wanted, metrics, at)) if metrics else (),
        publication=publication,
    )


def _read(path: Path, manifest_sha256: str) -> dict[str, Any] | None:
    """A stage's result, if it is there and of this merge."""
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content if content["manifest_sha256"] == manifest_sha256 else None
    except (ValueError, KeyError, TypeError) as error:
        raise BadSource(f"{path} is not what its stage writes ({error!r})") from error


def _unfinished(
    verify: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None, wanted: Wanted
) -> list[tuple[str, bool]]:
    drawn = metrics or {}
    missing = [name for name in wanted.cases if f"{name}.verdict" not in drawn]
    return [
        ("these weights are not verified", verify is None),
        ("no picture is made of these weights", metrics is None),
        (f"no picture of {', '.join(missing)} is made", metrics is not None and bool(missing)),
    ]


def _differences(wanted: Wanted, manifest: Manifest, at: Places) -> Iterator[str]:
    """How the configuration differs from what was built, a sentence each."""
    base = manifest.base
    asked = None if base is None else (base.repo_id or base.path, base.requested)
    if asked != (wanted.base.label, wanted.base.revision):
        yield f"the base is {_named(wanted.base)} now, and {base.label if base else 'unknown'} was built on"
    built = {lora.name: lora for lora in manifest.loras}
    for name in sorted(wanted.loras.keys() | built.keys()):
        now, then = wanted.loras.get(name), built.get(name)
        if now is None or then is None:
            yield f"LoRA {name} is {'new' if now else 'gone'}"
        elif (now.source.label, now.filename) != (then.repo_id or then.path, then.filename):
            was = f"{then.repo_id or then.path}/{then.filename}"
            yield f"LoRA {name} is {_named(now.source)}/{now.filename} now, was {was}"
        elif now.scale != then.scale:
            yield f"LoRA {name} has scale {now.scale:g} now, was built with {then.scale:g}"
    if manifest.selection != wanted.selection:
        yield "other modules are chosen or scaled now"
    index, scheduler = _json(at.merged / "model_index.json"), _json(at.merged / "scheduler/scheduler_config.json")
    if index.get("_class_name") != wanted.pipeline:
        yield f"the pipeline is {wanted.pipeline} now, was {index.get('_class_name')}"
    for key, value in wanted.scheduler.items():
        if scheduler.get(key) != value:
            yield f"the scheduler's {key} is {value} now, was {scheduler.get(key)}"


def _other_files(wanted: Wanted, manifest: Manifest, at: Places) -> Iterator[str]:
    """Sources that are other files now than those that were built from, as far as that costs no network."""
    if at.base_lock.exists() and manifest.base:
        base = records.from_json(records.BaseLock, at.base_lock.read_text(encoding="utf-8"), str(at.base_lock)).base
        if base.files != manifest.base.files:
            yield f"the base is locked to {base.label} now, and {manifest.base.label} was built on"
    if not at.lora_lock.exists():
        return
    locks = records.from_json(records.LoraLock, at.lora_lock.read_text(encoding="utf-8"), str(at.lora_lock)).loras
    for lora in manifest.loras:
        lock, now = locks.get(lora.name), wanted.loras.get(lora.name)
        if lock and lora.sha256 not in {record.sha256 for record in lock.files.values()}:
            yield f"LoRA {lora.name} is locked to another file now than the one that was built from"
        elif lock and now and lock.requested != now.source.revision:
            yield f"LoRA {lora.name} is asked for at {now.source.revision} now, was {lock.requested}"
        elif now and now.source.path:
            file = Path(now.source.path) / now.filename
            sha256 = files.hash_file(file).sha256 if file.is_file() else lora.sha256
            if sha256 != lora.sha256:
                yield f"LoRA {lora.name}: {file} has sha256 {sha256[:12]}… now, was {lora.sha256[:12]}…"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadSource(f"{path} cannot be read ({error})") from error
    return content if isinstance(content, dict) else {}


def _asked(name: str, source: Source) -> Step:
    return Step(name, source.label, source.revision)


def _named(source: Source) -> str:
    return f"{source.label}@{source.revision}" if source.revision else source.label


def _size(manifest: Manifest, merged: Path) -> Size:
    taken = {name: file.size for name, file in manifest.files.items() if file.origin == "base"}
    linked = None
    if manifest.base:
        try:
            root = hf_cache.locate(manifest.base)
            linked = sum(size for name, size in taken.items() if (root / name).samefile(merged / name))
        except (BadSource, OSError):
            linked = None
    return Size(sum(file.size for file in manifest.files.values()), sum(taken.values()), linked)


def _written(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="minutes").replace("+00:00", "Z")


def _pictures(wanted: Wanted, metrics: Mapping[str, Any], at: Places) -> Iterator[CasePicture]:
    for case, prompt in wanted.cases.items():
        path = at.images / f"{case}.merged.png"
        yield CasePicture(case, prompt, metrics.get(f"{case}.verdict"), path, _thumbnail(path))


def _thumbnail(path: Path) -> encode.Encoded | None:
    from lora_fuse.pictures import picture

    try:
        whole = picture.Picture(picture.read_levels(path))
    except OSError:
        return None
    return encode.encoded(whole, large=0, side=SIDE, quality=QUALITY)


def _publication(wanted: Wanted, at: Places, manifest_sha256: str | None) -> Publication | None:
    if not at.receipt.exists():
        return None
    receipt = records.from_json(Receipt, at.receipt.read_text(encoding="utf-8"), str(at.receipt))
    if receipt.status != "published":
        return None
    pairs = [("repository", receipt.repo_id, wanted.repo_id), ("tag", receipt.tag, wanted.tag)]
    notes = [f"the {what} asked for now is {now}, it was {then}" for what, then, now in pairs if now != then]
    if wanted.repo_id is None:
        notes = ["it is not to be published any more; what is there stays"]
    if receipt.manifest_sha256 != manifest_sha256:
        notes.insert(0, "what was published is not what is built now")
    return Publication(str(receipt.repo_id), str(receipt.commit), receipt.tag, receipt.url, tuple(notes))
