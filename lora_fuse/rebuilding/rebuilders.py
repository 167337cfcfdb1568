"""Statements of several rebuilders, counted: so many of those who are named have made the same bytes.

A rebuilder who states other bytes is named with them, and counts for nobody, however many files they agree on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from lora_fuse.errors import BadConfig, BadSource, naming_extras
from lora_fuse.machine import files, text
from lora_fuse.rebuilding.attestation import Attestation, public_key, signers_of
from lora_fuse.rebuilding.published_recipe import merge_of
from lora_fuse.recipe import records, sections
from lora_fuse.release import contents

MOST = 1000  # files of attestations
BESIDE = ".attestations"  # added to a folder's name: where its attestations are, if the policy names no place


class Policy(sections.Section):
    """A policy file: who may state a rebuild, each with the file of a public key, and how many have to.

    Places are relative to the policy's own folder.
    """

    needed: PositiveInt
    rebuilders: Annotated[dict[sections.Name, sections.Text], Field(min_length=1)]
    attestations: sections.Text | None = None

    @model_validator(mode="after")
    def _enough_are_named(self) -> Policy:
        if self.needed > len(self.rebuilders):
            raise ValueError(f"{self.needed} are needed, and {len(self.rebuilders)} named; name more, or need fewer")
        return self


@dataclass(slots=True)
class Counted:
    """Rebuilders by what they state of a release, as names, or as a sentence for each that states other bytes."""

    needed: int
    named: int
    agree: list[str] = field(default_factory=list)
    differ: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_enough(self) -> bool:
        """As many as are needed have made the same bytes."""
        return len(self.agree) >= self.needed


def count_rebuilders(folder: Path, policy_file: Path) -> Counted:
    """Count who has made the merge of a published repository again, by its list.

    Raises:
        BadConfig: the policy cannot be used, or two rebuilders have one key.
        BadKey: a key cannot be used.
        BadSource: the folder has no list, or there is no folder of attestations.
        MissingExtra: the library is not installed.
    """
    policy = _read_policy(policy_file)
    listing = _read_list(folder)
    wanted = {name: file.sha256 for name, file in merge_of(listing).items()}
    keys = {name: public_key(policy_file.parent / key) for name, key in policy.rebuilders.items()}
    ids = [key.keyid for key in keys.values()]
    if twice := [name for name, key in keys.items() if ids.count(key.keyid) > 1]:
        raise BadConfig(f"{policy_file}: {' and '.join(twice)} have the same key, and count once; give each their own")
    found = Counted(policy.needed, len(keys))
    agreed: set[str] = set()
    for path in _attestations(folder, policy, policy_file):
        try:
            names, stated = signers_of(path, keys)
        except BadSource as error:
            found.notes.append(str(error))
            continue
        if (stated.repository, stated.tag) != (listing.repository, listing.tag):
            found.notes.append(f"{path.name}, by {', '.join(names)}, is of {stated.repository}, tag {stated.tag}")
            continue
        difference = _difference(stated, wanted)
        for name in names:
            if difference is None:
                agreed.add(name)
            else:
                found.differ[name] = difference
    found.agree = sorted(agreed - found.differ.keys())
    return found


def _read_list(folder: Path) -> records.ReleaseList:
    path = folder / contents.LIST
    try:
        return records.from_json(records.ReleaseList, files.read_text(files.inside(folder, contents.LIST)), str(path))
    except OSError as error:
        raise BadSource(
            f"{path} cannot be read ({error}), which says what rebuilders state; get a good copy"
        ) from error


def _read_policy(path: Path) -> Policy:
    remedy = "it has needed, rebuilders (NAME: public key) and attestations, see docs/rebuild.md"
    try:
        parse = files.parse_json if path.suffix == ".json" else files.parse_yaml
        with naming_extras(f"--rebuilders {path}"):
            values = parse(files.read_text(path))
    except (OSError, ValueError) as error:
        raise BadConfig(f"--rebuilders {path} cannot be read ({error}); {remedy}") from error
    return sections.parse_section(Policy, values, f"--rebuilders {path}", remedy)


def _attestations(folder: Path, policy: Policy, policy_file: Path) -> list[Path]:
    whole = folder.absolute()
    beside = whole.with_name(whole.name + BESIDE)
    place = beside if policy.attestations is None else policy_file.parent / policy.attestations
    try:
        paths = sorted(path for path in place.iterdir() if path.suffix == ".json")
    except (OSError, ValueError) as error:
        raise BadSource(
            f"{place} is no folder that can be read ({text.one_line(error)}), and attestations are looked for there; "
            "name it, attestations: FOLDER"
        ) from error
    if len(paths) > MOST:
        raise BadSource(f"{place} has {len(paths)} attestations, and {MOST} are read; take those of other releases out")
    return paths


def _difference(stated: Attestation, wanted: dict[str, str]) -> str | None:
    """The first file by name that a rebuilder states otherwise than the list; None without one."""
    for name, sha256 in sorted(wanted.items()):
        got = stated.files.get(name)
        if got != sha256:
            return f"{name} has sha256 {got or 'none'}, and {contents.LIST} says {sha256}"
    return None
