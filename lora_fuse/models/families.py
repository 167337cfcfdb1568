"""The model families that recipes name: one row each, with what the shapes of weights cannot tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Family:
    """A base on the Hub, the pipeline that runs it, and the LoRA files that were made for it.

    `loras` are patterns of ``repo_id/filename``. A file that matches another family's pattern and not this one's is a
    known wrong pair: it may merge (the shapes agree) and still give worse pictures. So is one of `fp8_loras`, which
    were made for the same base in fp8 (e4m3fn), whatever it is fused into here. `alpha` is what those files have.
    """

    base: str
    pipeline: str
    loras: tuple[str, ...]
    alpha: float = 8.0  # at rank 64: the headers of lightx2v's files
    fp8_loras: tuple[str, ...] = ()


_LIGHTNING = "lightx2v/Qwen-Image-Lightning"

FAMILIES = (
    Family(
        "Qwen/Qwen-Image",
        "QwenImagePipeline",
        (f"{_LIGHTNING}/Qwen-Image-Lightning-*",),
        fp8_loras=(f"{_LIGHTNING}/Qwen-Image-fp8-e4m3fn-Lightning-*",),
    ),
    Family("Qwen/Qwen-Image-Edit", "QwenImageEditPipeline", (f"{_LIGHTNING}/Qwen-Image-Edit-Lightning-*",)),
    Family("Qwen/Qwen-Image-Edit-2509", "QwenImageEditPlusPipeline", (f"{_LIGHTNING}/Qwen-Image-Edit-2509/*",)),
    Family(
        "Qwen/Qwen-Image-Edit-2511",
        "QwenImageEditPlusPipeline",
        ("lightx2v/Qwen-Image-Edit-2511-Lightning/*",),
    ),
    Family("Qwen/Qwen-Image-2512", "QwenImagePipeline", ("lightx2v/Qwen-Image-2512-Lightning/*",)),
)

COMPONENT = "transformer"  # what every family so far fuses into


def pair_warnings(base: str | None, loras: Iterable[tuple[str | None, str | None]]) -> list[str]:
    """A sentence for each LoRA, a repository id and a filename, that is known to be made for another base.

    `base` is a repository id; None is a local folder, of which nothing is known. A file is known by its repository, or
    by its own name wherever it lies.
    """
    known = {family.base for family in FAMILIES}
    warnings = []
    for repo_id, filename in loras:
        made_for = [family.base for family in FAMILIES if _is_one_of(family.loras, repo_id, filename)]
        in_fp8 = [family.base for family in FAMILIES if _is_one_of(family.fp8_loras, repo_id, filename)]
        if in_fp8:
            said = f"{in_fp8[0]} in fp8 (e4m3fn), not for weights of other dtypes"
        elif made_for and base in known and base not in made_for:
            said = f"{made_for[0]}, not for {base}"
        else:
            continue
        warnings.append(f"{filename} was made for {said}: it merges, and pictures may be worse")
    return warnings


def is_of_a_family(filename: str) -> bool:
    """True for a file whose name says by itself that it was made for the base of a known family."""
    return any(_is_one_of((*family.loras, *family.fp8_loras), None, filename) for family in FAMILIES)


def alpha_warnings(loras: Iterable[tuple[str | None, Mapping[int, float]]]) -> list[str]:
    """A sentence for each LoRA without an alpha that should have one.

    `loras` are filenames and what `lora_fuse.lora.LoraFile.missing_alphas` says of them.
    """
    warnings = []
    for filename, missing in loras:
        name = (filename or "").rpartition("/")[2]
        known = [family.alpha for family in FAMILIES if _is_one_of((*family.loras, *family.fp8_loras), None, name)]
        of = "the files of its family have" if known else "trainers that write such keys have by default"
        for rank, usual in missing.items():
            alpha = known[0] if known else usual
            warnings.append(
                f"{name}: no alpha is said anywhere for modules of rank {rank}, so it counts as {rank} and the factor "
                f"is 1; with alpha {alpha:g}, which {of}, it would be {alpha / rank:g}: then use that as the scale"
            )
    return warnings


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
