"""Candidates for approval: every merged picture's sha256 and everything that it came from."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lora_fuse.machine import FileRecord, files
from lora_fuse.pictures import CaseOf, encode, pairs
from lora_fuse.recipe import Manifest, records
from lora_fuse.regression.case_judgement import JudgedPair
from lora_fuse.regression.run_record import Environment, RunRecord
from lora_fuse.regression.verdicts import Comparison

SCHEMA = 1
WORKERS = min(8, os.cpu_count() or 1)  # cases whose pictures are encoded at once


@dataclass(frozen=True, slots=True)
class CaseRecord(CaseOf[dict[str, str]]):
    """A case as a record has it, the sha256 of its input pictures by path."""

    images: dict[str, str]


@dataclass(frozen=True, slots=True)
class PictureInputs:
    """All that a picture depends on, but for who makes it and on what machine.

    Attributes:
        base: what a person would call it, ``repo@commit`` or a path.
        base_sha256: of the list of the base's files, their sizes and sha256.
        manifest_sha256: of the manifest of the merge, so of every byte of it.
        true_cfg_scale: 1.0 is without guidance, and without the negative prompt.
        scheduler: the settings that the recipe gives; empty where it keeps the base's.
        sigmas: that were visited.
        call_sigmas: that went into the call; none leave them to the scheduler.
    """

    recipe: str
    base: str
    base_sha256: str
    loras: tuple[records.MergedLora, ...]
    manifest_sha256: str
    pipeline: str
    case: CaseRecord
    steps: int
    true_cfg_scale: float
    negative_prompt: str | None
    scheduler: dict[str, bool | int | float | str | list[bool | int | float | str] | None]
    sigmas: tuple[float, ...]
    call_sigmas: tuple[float, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True, slots=True)
class Provenance(PictureInputs):
    """Everything that a picture came from; `environment` has versions and flags, `tool` the commit."""

    environment: Environment
    tool: records.Tool

    @classmethod
    def of(cls, inputs: PictureInputs, run: RunRecord) -> Provenance:
        """A picture's inputs, and who made it where."""
        given = {name: getattr(inputs, name) for name in PictureInputs.__dataclass_fields__}
        return cls(**given, environment=run.environment, tool=run.tool)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A picture of the last run: its sha256 as a PNG file, whether merged and unfused agree, and what it came from.

    `floor` is the case's noise floor, by metric; a PSNR that is infinite is left out. `clip` is how one flickers and
    moves, see `lora_fuse.pictures.calls.clip`.
    """

    sha256: str
    agrees: bool
    reasons: tuple[str, ...]
    floor: dict[str, float]
    provenance: PictureInputs
    clip: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The pictures of a run that may be approved, by case."""

    schema: int
    manifest_sha256: str
    cases: dict[str, Candidate]


def candidates(
    judged: Sequence[JudgedPair], manifest: Manifest, manifest_sha256: str, setup: pairs.Setup
) -> Candidates:
    """The record of a run's merged pictures."""
    with ThreadPoolExecutor(WORKERS, "hash") as pool:
        hashes = list(pool.map(lambda case: hashlib.sha256(case.pair.merged.png).hexdigest(), judged))
    return Candidates(
        SCHEMA,
        manifest_sha256,
        {
            case.name: Candidate(
                sha256=sha256,
                agrees=case.result.agrees,
                reasons=case.result.reasons,
                floor=_finite(case.result.floor),
                provenance=_inputs(case.pair, manifest, manifest_sha256, setup),
                clip=dict(case.pair.merged.clip),
            )
            for case, sha256 in zip(judged, hashes, strict=True)
        },
    )


def save_pictures(judged: Sequence[JudgedPair], folder: Path) -> None:
    """Write ``CASE.merged.png``, ``CASE.unfused.png`` and so on, lossless; an approval copies the first.

    A clip is played by the WebP of the same name.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def save(case: JudgedPair) -> None:
        sides = {"merged": case.pair.merged, "unfused": case.pair.unfused, "baseline": case.pair.baseline}
        sides |= case.pair.exports
        for side, rendered in sides.items():
            if rendered is not None:
                (folder / f"{case.name}.{side}.png").write_bytes(rendered.png)
            if rendered is not None and rendered.frames is not None:
                played = encode.playing(rendered.frames, rendered.frames_per_second, side=max(rendered.size))
                (folder / f"{case.name}.{side}.webp").write_bytes(played.data)

    with ThreadPoolExecutor(WORKERS, "save") as pool:
        list(pool.map(save, judged))


def _finite(floor: Comparison | None) -> dict[str, float]:
    if floor is None:
        return {}
    return {name: records.rounded(value) for name, value in floor.values.items() if math.isfinite(value)}


def _inputs(pair: pairs.Pair, manifest: Manifest, manifest_sha256: str, setup: pairs.Setup) -> PictureInputs:
    base = manifest.base
    case = pair.case
    images = {path.as_posix(): files.hash_file(path).sha256 for path in case.images}
    return PictureInputs(
        recipe=manifest.recipe or "merge",
        base=base.label if base else "unknown",
        base_sha256=digest(base.files if base else {}),
        loras=manifest.loras,
        manifest_sha256=manifest_sha256,
        pipeline=setup.pipeline,
        case=CaseRecord(case.name, case.prompt, case.seed, images, case.height, case.width, case.frames),
        steps=setup.sampling.steps,
        true_cfg_scale=setup.sampling.true_cfg_scale,
        negative_prompt=setup.sampling.negative_prompt,
        scheduler=dict(setup.scheduler),
        sigmas=pair.merged.sigmas,
        call_sigmas=setup.sampling.call_sigmas,
    )


def digest(files: Mapping[str, FileRecord]) -> str:
    """The sha256 of a list of files, their sizes and sha256."""
    return hashlib.sha256(records.to_json(dict(files)).encode()).hexdigest()


def differences(now: Provenance, then: Provenance) -> list[str]:
    """List what has changed since a golden was approved, and so may have changed its picture, a sentence each."""
    sentences = [f"the base is {now.base}, and was {then.base}"] if now.base_sha256 != then.base_sha256 else []
    sentences += _lora_differences(now.loras, then.loras)
    alike = ("pipeline", "steps", "true_cfg_scale", "negative_prompt", "sigmas", "call_sigmas")
    here = now.environment
    there = then.environment
    machine = [name for name in Environment.__dataclass_fields__ if name not in {"key", "flags"}]
    kernels = ("isa", "threads")  # of the key; its versions are whole in the environment
    sides = [
        ("", {name: getattr(now, name) for name in alike}, {name: getattr(then, name) for name in alike}),
        ("scheduler ", now.scheduler, then.scheduler),
        ("the case's ", asdict(now.case), asdict(then.case)),
        ("", {name: getattr(here, name) for name in machine}, {name: getattr(there, name) for name in machine}),
        ("", {name: getattr(here.key, name) for name in kernels}, {name: getattr(there.key, name) for name in kernels}),
        ("", here.meant, there.meant),
    ]
    for what, new, old in sides:
        sentences += [
            f"{what}{name} is {new.get(name)}, was {old.get(name)}"
            for name in [*new, *(name for name in old if name not in new)]
            if new.get(name) != old.get(name)
        ]
    return sentences


def _lora_differences(now: Iterable[records.MergedLora], then: Iterable[records.MergedLora]) -> list[str]:
    after = {lora.name: lora for lora in now}
    before = {lora.name: lora for lora in then}
    sentences = [f"LoRA {name} is new" for name in after if name not in before]
    sentences += [f"LoRA {name} is gone" for name in before if name not in after]
    for name, new in after.items():
        old = before.get(name, new)
        if old.sha256 != new.sha256:
            sentences.append(f"LoRA {name} is {_place(new)}, was {_place(old)}")
        if old.scale != new.scale:
            sentences.append(f"LoRA {name} has scale {new.scale:g}, had {old.scale:g}")
    return sentences


def _place(lora: records.MergedLora) -> str:
    at = f"{lora.repo_id}@{(lora.revision or '')[:12]}" if lora.repo_id else str(lora.path)
    return f"{at}/{lora.filename} ({lora.sha256[:12]})"
