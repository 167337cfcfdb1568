"""The model families that recipes name: one row each, with what the shapes of weights cannot tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Family:
    """A base on the Hub, the pipeline that runs it, and the LoRA files that were made for it.

    `loras` are patterns of ``repo_id/filename``. A file that matches another family's pattern and not this one's is a
    known wrong pair: it may merge (the shapes agree) and still give worse pictures. `alpha` is what those files have.
    """

    base: str
    pipeline: str
    loras: tuple[str, ...]
    alpha: float = 8.0  # at rank 64: the headers of lightx2v's files


_LIGHTNING = "lightx2v/Qwen-Image-Lightning"

FAMILIES = (
    Family(
        "Qwen/Qwen-Image",
        "QwenImagePipeline",
        (f"{_LIGHTNING}/Qwen-Image-Lightning-*", f"{_LIGHTNING}/Qwen-Image-fp8-*"),
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

    `base` is a repository id; None is a local folder, of which nothing is known.
    """
    known = {family.base for family in FAMILIES}
    warnings = []
    for repo_id, filename in loras:
        made_for = [family.base for family in FAMILIES if _matches(family, f"{repo_id}/{filename}")]
        if made_for and base in known and base not in made_for:
            warnings.append(
                f"{filename} was made for {made_for[0]}, not for {base}: it merges, and pictures may be worse"
            )
    return warnings


def alpha_warnings(loras: Iterable[tuple[str | None, Mapping[int, float]]]) -> list[str]:
    """A sentence for each LoRA without an alpha that should have one.

    `loras` are filenames and what `lora_fuse.lora.LoraFile.missing_alphas` says of them.
    """
    warnings = []
    for filename, missing in loras:
        name = (filename or "").rpartition("/")[2]
        known = [family.alpha for family in FAMILIES if any(_is_named(name, pattern) for pattern in family.loras)]
        of = "the files of its family have" if known else "trainers that write such keys have by default"
        for rank, usual in missing.items():
            alpha = known[0] if known else usual
            warnings.append(
                f"{name}: no alpha is said anywhere for modules of rank {rank}, so it counts as {rank} and the factor "
                f"is 1; with alpha {alpha:g}, which {of}, it would be {alpha / rank:g}: then use that as the scale"
            )
    return warnings


def _is_named(name: str, pattern: str) -> bool:
    """True where a filename says by itself that a family's pattern means it."""
    last = pattern.rpartition("/")[2]
    return fnmatchcase(name, last if last != "*" else f"{pattern.split('/')[-2]}*")


def _matches(family: Family, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in family.loras)
