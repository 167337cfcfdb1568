"""LoRA files and the bases that they were made for, by their names: what the shapes of weights cannot tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from lora_fuse.models.families import families
from lora_fuse.models.family import KnownBase

COMPONENT = "transformer"  # the main one of most families


def pair_warnings(base: str | None, loras: Iterable[tuple[str | None, str | None]]) -> list[str]:
    """A sentence for each LoRA, a repository id and a filename, that is known to be made for another base.

    `base` is a repository id; None is a local folder, of which nothing is known. A file is known by its repository, or
    by its own name wherever it lies.
    """
    known = {one.repo_id: one for one in _bases()}
    fits = {base, *known[base].loras_of} if base in known else set()
    warnings = []
    for repo_id, filename in loras:
        made_for = [one.repo_id for one in _bases() if _is_one_of(one.loras, repo_id, filename)]
        in_fp8 = [one.repo_id for one in _bases() if _is_one_of(one.fp8_loras, repo_id, filename)]
        if in_fp8:
            said = f"{in_fp8[0]} in fp8 (e4m3fn), not for weights of other dtypes"
        elif made_for and fits and fits.isdisjoint(made_for):
            said = f"{made_for[0]}, not for {base}"
        else:
            continue
        warnings.append(f"{filename} was made for {said}: it merges, and pictures may be worse")
    return warnings


def is_of_a_family(filename: str) -> bool:
    """True for a file whose name says by itself that it was made for the base of a known family."""
    return any(_is_one_of((*one.loras, *one.fp8_loras), None, filename) for one in _bases())


def alpha_warnings(loras: Iterable[tuple[str | None, Mapping[int, float]]]) -> list[str]:
    """A sentence for each LoRA without an alpha that should have one.

    `loras` are filenames and what `lora_fuse.lora.LoraFile.missing_alphas` says of them.
    """
    warnings = []
    for filename, missing in loras:
        name = (filename or "").rpartition("/")[2]
        of_name = [one.alpha for one in _bases() if _is_one_of((*one.loras, *one.fp8_loras), None, name)]
        known = [alpha for alpha in of_name if alpha is not None]
        of = "the files of its family have" if known else "trainers that write such keys have by default"
        for rank, usual in missing.items():
            alpha = known[0] if known else usual
            warnings.append(
                f"{name}: no alpha is said anywhere for modules of rank {rank}, so it counts as {rank} and the factor "
                f"is 1; with alpha {alpha:g}, which {of}, it would be {alpha / rank:g}: then use that as the scale"
            )
    return warnings


def _bases() -> tuple[KnownBase, ...]:
    return tuple(base for family in families() for base in family.bases)


def _is_one_of(patterns: Iterable[str], repo_id: str | None, filename: str | None) -> bool:
    """True where a pattern means a file, by its repository or by its own name; some write it in another style."""
    name = re.sub(r"[ _]", "-", (filename or "").rpartition("/")[2]).lower()
    return any(
        fnmatchcase(f"{repo_id}/{filename}", pattern) or fnmatchcase(name, _own_name(pattern).lower())
        for pattern in patterns
    )


def _own_name(pattern: str) -> str:
    """The pattern of a file's own name; of all the files of a folder, that of the distillations that it holds."""
    *_, folder, last = pattern.split("/")
    return last if last != "*" else f"{folder.removesuffix('-Lightning')}-Lightning-*"
