"""Conditions of a golden: the very picture that was judged, of right weights, that a commit would give again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_fuse.errors import BadGolden, CheckFailed, Rerun
from lora_fuse.recipe import checkout
from lora_fuse.regression.candidates import Candidate
from lora_fuse.regression.goldens import AGAIN, check_picture
from lora_fuse.regression.run_record import RunRecord


def check_weights(
    manifest_sha256: str, chosen: Mapping[str, Candidate], verify: Mapping[str, Any], where: Path
) -> None:
    """Refuse pictures of wrong weights, or that are not what base and LoRA give: a golden of them would hide it.

    `verify` is what the weights' own check found, in the file `where`; `chosen` what is to be approved, by case.

    Raises:
        CheckFailed: they are.
    """
    if not verify["passed"] or verify["manifest_sha256"] != manifest_sha256:
        raise CheckFailed(f"the weights behind these pictures are not verified, see {where}; nothing was approved")
    for name, candidate in chosen.items():
        if not candidate.agrees:
            raise CheckFailed(f"{name}: {' '.join(candidate.reasons)} Mend the merge first; nothing was approved")


def check_asked(chosen: Mapping[str, Candidate], scales: Mapping[str, float], steps: int) -> None:
    """Refuse pictures of a run that was given other values by hand than the recipe's scales by LoRA, and its steps.

    Raises:
        CheckFailed: they are of other LoRAs, scales or steps.
    """
    for name, candidate in chosen.items():
        made = candidate.provenance
        used = {lora.name: lora.scale for lora in made.loras}
        if used != dict(scales) or made.steps != steps:
            raise CheckFailed(
                f"{name} was made with {_settings(used, made.steps)}, and the recipe says {_settings(scales, steps)}; "
                "nothing was approved",
                rerun=Rerun("build"),
            )


def _settings(scales: Mapping[str, float], steps: int) -> str:
    loras = ", ".join(f"{name} at scale {scale:g}" for name, scale in sorted(scales.items()))
    return f"{loras or 'no LoRA'} in {steps} steps"


def check_repeatable(run: RunRecord, candidates: str, root: Path) -> None:
    """Refuse pictures that no commit of the checkout at `root` would give again.

    Raises:
        CheckFailed: no commit would.
    """
    if not run.is_of(candidates):
        raise CheckFailed("the run's record is of other pictures than these; nothing was approved", rerun=AGAIN)
    modified = checkout.modified_files(root)
    if modified is None or run.tool.git is None:
        raise CheckFailed("this is no git checkout, so nothing says what made these pictures; nothing was approved")
    if modified:
        more = f" and {len(modified) - 1} more" if len(modified) > 1 else ""
        raise CheckFailed(f"no commit has {modified[0]}{more}: commit, render again; nothing was approved", rerun=AGAIN)
    if run.tool.dirty:
        raise CheckFailed(
            f"these pictures were made by a modified checkout of {run.tool.git[:12]}; nothing was approved", rerun=AGAIN
        )


def read_pictures(folder: Path, chosen: Mapping[str, Candidate]) -> dict[str, bytes]:
    """The PNG files of candidates, by case.

    Raises:
        BadGolden: one is missing, or is not the one that was judged.
    """
    pictures = {}
    for name, candidate in chosen.items():
        path = folder / f"{name}.merged.png"
        try:
            pictures[name] = path.read_bytes()
        except OSError as error:
            raise BadGolden(f"{path} cannot be read ({error}); nothing was approved", rerun=AGAIN) from error
        check_picture(pictures[name], candidate)
    return pictures
