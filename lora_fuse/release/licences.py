"""Licences: which a source states, and under which a merge of several may be published. Pure: words in, words out.

A merge is a derivative of all its parts, and a licence is not inherited: the merge needs one that all of them allow.
The table below answers the plain cases only. What it does not answer is unknown, and a person has to say it
(`publish.license`). It is no legal advice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_fuse.recipe import License, Manifest

# Permissive licences by their id on the Hub, from the one that asks least of who passes the work on to the one that
# asks most. Parts under several of them are published under the last, with the notices of the others kept.
PERMISSIVE = (
    "unlicense",
    "cc0-1.0",
    "zlib",
    "isc",
    "mit",
    "bsd",
    "bsd-2-clause",
    "bsd-3-clause",
    "bsd-3-clause-clear",
    "apache-2.0",
)
# They forbid derivatives: not even two parts under the same one may be merged and passed on.
NO_DERIVATIVES = frozenset({"cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"})
# Everything else may be merged with its own kind only: an OpenRAIL licence has use restrictions that differ from text
# to text (bigscience-openrail-m, creativeml-openrail-m, openrail++), a copyleft one asks for itself.
UNKNOWN = frozenset({"unknown", "other"})  # ids that name no text

SETTING = "publish.license"
OTHER = License("other")


@dataclass(frozen=True, slots=True)
class MergeLicence:
    """The licence of a merge.

    `problem` is a sentence on why it may not be published for everybody, None if it may; `license` is then ``other``.
    `notices` are the licences of the parts by what a person would call these, as they say themselves.
    """

    license: License
    problem: str | None
    notices: Mapping[str, str]


def resolve_licence(manifest: Manifest, by_hand: str | None = None) -> MergeLicence:
    """The licence under which a merge may be published.

    Args:
        manifest: of the merge; base and LoRAs say what their sources stated when they were downloaded.
        by_hand: the id that somebody states; the table is not asked then.
    """
    parts = [("the base" if manifest.base is None else manifest.base.repo_id or "the base", _of_base(manifest))]
    parts += [(lora.repo_id or f"LoRA {lora.name}", lora.license) for lora in manifest.loras]
    notices = {part: "no licence stated" if found is None else found.label for part, found in parts}
    if by_hand is not None:
        return MergeLicence(License(by_hand, origin="by hand"), None, notices)
    found = [(part, stated) for part, stated in parts if stated is not None]
    for part, stated in parts:
        if stated is None or (stated.id in UNKNOWN and not (stated.name and stated.link)):
            said = "states no licence" if stated is None else f"states {stated.label}, which names no text"
            return MergeLicence(OTHER, f"{part} {said} (known: {_list(notices)}); {_way_out()}", notices)
        if stated.id in NO_DERIVATIVES:
            return MergeLicence(OTHER, f"{part} is under {stated.id}, which forbids derivatives; {_way_out()}", notices)
    if len({_text(stated) for _, stated in found}) == 1:
        return MergeLicence(found[0][1], None, notices)
    if all(stated.id in PERMISSIVE for _, stated in found):
        return MergeLicence(
            max((stated for _, stated in found), key=lambda one: PERMISSIVE.index(one.id)), None, notices
        )
    first = found[0]
    other = next(pair for pair in found if _text(pair[1]) != _text(first[1]))
    return MergeLicence(
        OTHER,
        f"{first[0]} is under {first[1].label} and {other[0]} under {other[1].label}, which are not known to go "
        f"together; {_way_out()}",
        notices,
    )


def _of_base(manifest: Manifest) -> License | None:
    return manifest.base.license if manifest.base else None


def _text(stated: License) -> tuple[str | None, ...]:
    """What tells a licence's text from another."""
    return (stated.id, stated.name, stated.link) if stated.id == "other" else (stated.id,)


def _list(notices: Mapping[str, str]) -> str:
    return ", ".join(f"{part}: {label}" for part, label in notices.items())


def _way_out() -> str:
    return f"state the licence of the merge by hand, {SETTING}: ID in conf/config.yaml, or publish privately"
