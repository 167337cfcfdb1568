"""Licence of a merge, from those that its sources state. Pure: words in, words out.

A merge is a derivative of all its parts, and a licence is not inherited: the merge needs one that all of them allow.
The tables below answer the plain cases only. Every other case is unknown, and a person has to state the licence
(`publish.license`). This is no legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

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
# They forbid commercial use, by their ids and names: cc-by-nc-4.0, flux-1-dev-non-commercial-license, qwen-research,
# fair-noncommercial-research-license. Who publishes such a merge has to have decided to.
NON_COMMERCIAL = re.compile(r"non-?commercial|research|(?<![a-z])nc(?![a-z])", re.IGNORECASE)
# Everything else may be merged with its own kind only: an OpenRAIL licence has use restrictions that differ from text
# to text (bigscience-openrail-m, creativeml-openrail-m, openrail++), a copyleft one asks for itself.
UNKNOWN = frozenset({"unknown", "other"})  # ids that name no text

SETTING = "publish.license"
WAY_OUT = f"state the licence of the merge by hand, {SETTING}: ID in conf/config.yaml, or publish privately"


@dataclass(frozen=True, slots=True)
class MergeLicence:
    """The licence of a merge.

    Attributes:
        license: that it may be published under; ``other`` if there is a problem.
        problem: a sentence on why it may not be published for everybody; None if it may.
        notices: the licences of the parts as they state them, by the parts' names.
    """

    license: License
    problem: str | None
    notices: Mapping[str, str]


def resolve_licence(manifest: Manifest, by_hand: str | None = None) -> MergeLicence:
    """The licence under which a merge may be published, from those in its manifest, or the id stated `by_hand`."""
    base = manifest.base
    parts = [((base and base.repo_id) or "the base", base.license if base else None)]
    parts += [(lora.repo_id or f"LoRA {lora.name}", lora.license) for lora in manifest.loras]
    notices = {part: stated.label if stated else "no licence stated" for part, stated in parts}
    if by_hand is not None:
        same = next((stated for _, stated in parts if stated and stated.id == by_hand), License(by_hand))
        return MergeLicence(replace(same, origin="by hand"), None, notices)
    for part, stated in parts:
        if problem := _own_problem(stated, notices):
            return MergeLicence(License("other"), f"{part} {problem}; {WAY_OUT}", notices)
    known = [(part, stated) for part, stated in parts if stated is not None]
    first, licence = known[0]
    others = [(part, stated) for part, stated in known if _text(stated) != _text(licence)]
    if not others:
        return MergeLicence(licence, None, notices)
    if all(stated.id in PERMISSIVE for _, stated in known):
        strictest = max((stated for _, stated in known), key=lambda stated: PERMISSIVE.index(stated.id))
        return MergeLicence(strictest, None, notices)
    part, stated = others[0]
    problem = f"{first} is under {licence.label} and {part} under {stated.label}, which are not known to go together"
    return MergeLicence(License("other"), f"{problem}; {WAY_OUT}", notices)


def _own_problem(stated: License | None, notices: Mapping[str, str]) -> str | None:
    """The problem that a part's licence is by itself, whatever the others have."""
    known = ", ".join(f"{part}: {label}" for part, label in notices.items())
    if stated is None:
        return f"states no licence (known: {known})"
    if stated.id in UNKNOWN and not (stated.name and stated.link):
        return f"states {stated.label}, which names no text (known: {known})"
    if stated.id in NO_DERIVATIVES:
        return f"is under {stated.id}, which forbids derivatives"
    if NON_COMMERCIAL.search(stated.name or stated.id):
        return f"is under {stated.label}, which forbids commercial use (known: {known})"
    return None


def _text(stated: License) -> tuple[str | None, ...]:
    """The fields that tell a licence's text from another."""
    return (stated.id, stated.name, stated.link) if stated.id == "other" else (stated.id,)
