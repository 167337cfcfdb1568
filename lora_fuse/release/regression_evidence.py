"""Evidence of a regression for a release: the merged pictures, the card's table, figures for a bill of materials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.errors import PublishRefused, Rerun
from lora_fuse.hub import payload
from lora_fuse.machine import files, progress
from lora_fuse.pictures import Case
from lora_fuse.regression import candidates, gate
from lora_fuse.release.card import Evidence, ShownCase, ShownChange, ShownExport
from lora_fuse.release.recipe_only import copy_name

AGAIN = Rerun("regress", force=True)
PLOT = "images/blocks.png"
FIGURES = ("golden.psnr_db", "unfused.psnr_db", "over_floor")


def shown_evidence(
    metrics: Mapping[str, Any], verify: Mapping[str, Any], cases: Sequence[Case], plot: str | None
) -> Evidence:
    """A run of the regression as the card shows it, by `metrics.json`, `verify.json` and the path of the plot."""
    verdict = f"{metrics['verdict']}: {gate.MEANINGS[metrics['verdict']]}."
    shown = tuple(_shown(case, metrics) for case in cases)
    return Evidence(verdict, metrics["environment"], shown, plot, _kept(verify), tuple(verify["warnings"]))


def shown_exports(metrics: Mapping[str, Any], cases: Sequence[Case], merged: Path) -> tuple[ShownExport, ...]:
    """The exports of a merged repository that were judged, by their keys of `metrics.json`."""
    names = [key.split(".")[1] for key in metrics if gate.EXPORT_VERDICT.fullmatch(key)]
    kind = str(open_checkpoint(merged).config.get("_class_name")) if names else ""
    return tuple(_export(name, metrics, cases, kind) for name in names)


def with_copies(evidence: Evidence) -> Evidence:
    """The evidence with the smaller copies of its pictures."""
    cases = [
        replace(case, picture=copy_name(case.picture), inputs=tuple(map(copy_name, case.inputs)))
        for case in evidence.cases
    ]
    return replace(evidence, cases=tuple(cases), smaller=True)


def _export(name: str, metrics: Mapping[str, Any], cases: Sequence[Case], kind: str) -> ShownExport:
    start = f"exports.{name}"
    cosine = metrics[f"{start}.cosine"]
    return ShownExport(
        metrics[f"{start}.file"],
        name,
        kind,
        size=progress.human_bytes(metrics[f"{start}.bytes"]),
        sha256=metrics[f"{start}.sha256"],
        error=f"{metrics[f'{start}.relative_l2']:.2g}",
        lora="all of it" if cosine is None else f"cosine {cosine:.3f}",
        over_floor=f"{max(metrics[f'{start}.{case.name}.over_floor'] for case in cases):.3g}",
    )


def _kept(verify: Mapping[str, Any]) -> tuple[ShownChange, ...]:
    """List what the weights have of the change that was meant: of all targets, and of each that was measured."""
    named = {"all targets": verify["update"], **verify["changes"]}
    found = [
        ShownChange(name, change["cosine"], change["noise"]) for name, change in named.items() if _measured(change)
    ]
    return (*found[:1], *sorted(found[1:], key=lambda change: (change.cosine, change.name)))


def _measured(change: Mapping[str, Any]) -> bool:
    return change.get("cosine") is not None


def judged_pictures(
    cases: Sequence[Case], judged: candidates.Candidates, manifest_sha256: str, images: Path
) -> dict[str, payload.Addition]:
    """The merged pictures and the input pictures of their cases, by their paths in the repository.

    Raises:
        PublishRefused: a picture is of another merge, or is not the one that was judged, or was made from another.
    """
    if judged.manifest_sha256 != manifest_sha256:
        raise PublishRefused("the run's pictures are of another merge", rerun=AGAIN)
    pictures = {}
    for case in cases:
        path, record = _picture(images / f"{case.name}.merged.png")
        if case.name not in judged.cases or record.sha256 != judged.cases[case.name].sha256:
            raise PublishRefused(f"{path} is not the picture that was judged", rerun=AGAIN)
        pictures[f"images/{case.name}.png"] = (path, record)
        read = judged.cases[case.name].provenance.case.images
        for name, path in zip(_inputs(case), case.images, strict=True):
            pictures[name] = _picture(path)
            if pictures[name][1].sha256 != read.get(path.as_posix()):
                raise PublishRefused(f"{path} is not the picture that {case.name} was made from", rerun=AGAIN)
    return pictures


def performance_metrics(metrics: Mapping[str, Any], cases: Sequence[Case]) -> list[dict[str, str]]:
    """Figures of the run as CycloneDX has them; those that are infinite or were not measured are left out."""
    figures = [(name, case.name, metrics.get(f"{case.name}.{name}")) for case in cases for name in FIGURES]
    return [{"type": name, "value": f"{value:g}", "slice": case} for name, case, value in figures if value is not None]


def _shown(case: Case, metrics: Mapping[str, Any]) -> ShownCase:
    name = case.name
    over = metrics.get(f"{name}.over_floor")
    return ShownCase(
        name,
        case.prompt,
        case.seed,
        case.height,
        case.width,
        verdict=metrics[f"{name}.verdict"],
        to_golden=_psnr(metrics, f"{name}.golden"),
        to_unfused=_psnr(metrics, f"{name}.unfused"),
        over_floor="–" if over is None else f"{over:.2f}",  # noqa: RUF001
        picture=f"images/{name}.png",
        frames=case.frames,
        inputs=_inputs(case),
    )


def _inputs(case: Case) -> tuple[str, ...]:
    """Paths of the input pictures in the repository."""
    return tuple(
        f"images/{case.name}.input{number if number > 1 else ''}{path.suffix.lower()}"
        for number, path in enumerate(case.images, start=1)
    )


def _picture(path: Path) -> payload.Addition:
    try:
        return path, files.hash_file(path)
    except OSError as error:
        raise PublishRefused(f"{path} cannot be read ({error.strerror})", rerun=AGAIN) from error


def _psnr(metrics: Mapping[str, Any], pair: str) -> str:
    if metrics.get(f"{pair}.identical"):
        return "identical"
    value = metrics.get(f"{pair}.psnr_db")
    return "–" if value is None else f"{value:.1f} dB"  # noqa: RUF001
