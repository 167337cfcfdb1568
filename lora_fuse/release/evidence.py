"""What a run of the regression has to show others: the merged pictures, the table, figures for a bill of materials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_fuse.errors import PublishRefused, Rerun
from lora_fuse.hub import Addition
from lora_fuse.pictures import Case
from lora_fuse.regression import candidates, gate
from lora_fuse.release.bom import Measured
from lora_fuse.release.card import Evidence, ShownCase
from lora_fuse.release.contents import addition

AGAIN = Rerun("regress", force=True)
PLOT = "images/blocks.png"
FIGURES = ("golden.psnr_db", "unfused.psnr_db", "over_floor")


def evidence(metrics: Mapping[str, Any], cases: Sequence[Case], plot: str | None = PLOT) -> Evidence:
    """The run as the card shows it.

    Args:
        metrics: the content of `metrics.json`, as `lora_fuse.regression.review.flat_metrics` makes it.
        cases: that were rendered.
        plot: path of the picture of the blocks in the repository.
    """
    verdict = f"{metrics['verdict']}: {gate.MEANINGS[metrics['verdict']]}."
    return Evidence(verdict, metrics["environment"], tuple(_shown(case, metrics) for case in cases), plot)


def pictures(
    cases: Sequence[Case], found: candidates.Candidates, manifest_sha256: str, images: Path
) -> dict[str, Addition]:
    """The merged pictures and what they were made from, by their paths in the repository.

    Args:
        cases: that were rendered.
        found: the record of the run's pictures.
        manifest_sha256: of the merge that is published.
        images: the folder of the run's pictures.

    Raises:
        PublishRefused: a picture is of another merge, or is not the one that was judged.
    """
    if found.manifest_sha256 != manifest_sha256:
        raise PublishRefused("the run's pictures are of another merge", rerun=AGAIN)
    made = {}
    for case in cases:
        one = _picture(images / f"{case.name}.merged.png")
        if case.name not in found.cases or one[1].sha256 != found.cases[case.name].sha256:
            raise PublishRefused(f"{one[0]} is not the picture that was judged", rerun=AGAIN)
        made[f"images/{case.name}.png"] = one
        made |= {name: _picture(path) for name, path in zip(_inputs(case), case.images, strict=True)}
    return made


def measured(metrics: Mapping[str, Any], cases: Sequence[Case]) -> tuple[Measured, ...]:
    """Figures of the run; what is infinite or was not measured is left out."""
    figures = [(name, case.name, metrics.get(f"{case.name}.{name}")) for case in cases for name in FIGURES]
    return tuple(Measured(name, case, value) for name, case, value in figures if value is not None)


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
        inputs=_inputs(case),
    )


def _inputs(case: Case) -> tuple[str, ...]:
    """Paths of the input pictures in the repository."""
    return tuple(
        f"images/{case.name}.input{number if number > 1 else ''}{path.suffix.lower()}"
        for number, path in enumerate(case.images, start=1)
    )


def _picture(path: Path) -> Addition:
    try:
        return addition(path)
    except OSError as error:
        raise PublishRefused(f"{path} cannot be read ({error.strerror})", rerun=AGAIN) from error


def _psnr(metrics: Mapping[str, Any], pair: str) -> str:
    if metrics.get(f"{pair}.identical"):
        return "identical"
    value = metrics.get(f"{pair}.psnr_db")
    return "–" if value is None else f"{value:.1f} dB"  # noqa: RUF001
