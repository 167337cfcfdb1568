"""Files of a published repository beside the merged checkpoint: card, pictures, provenance, a list, a signature.

The list, `lora_fuse.json`, is the manifest with every other file of the repository in it and the name of the release,
so that a download can be checked file by file and no other release stands in for it; the signature, `model.sig`, is
over all of them and the list. `download_check` checks both.

Invariant: all of it is made from records and pictures that the pipeline left, without the network, and the same build
gives the same bytes (an ECDSA signature is not, so the last one is kept while it is right).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, replace
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

from lora_fuse.errors import PublishRefused
from lora_fuse.hub import payload
from lora_fuse.machine import files
from lora_fuse.recipe import Manifest, checkout, records, sections
from lora_fuse.release.recipe_only import refuse_large
from lora_fuse.release.signing import SIGNATURE, keep_or_sign

LIST = "lora_fuse.json"
PROVENANCE = "provenance.json"
BOM = "bom.cdx.json"


def write_release(
    folder: Path,
    merged: Path,
    manifest: records.ReleaseList,
    texts: Mapping[str, bytes],
    additions: Mapping[str, payload.Addition],
    signer: sections.Signer | None,
    absent: AbstractSet[str] = frozenset(),
) -> dict[str, payload.Addition]:
    """Write the texts to `folder`, list everything, and sign it if there is a signer.

    The folder is emptied before, but for a signature that still holds.

    `absent` are the files that are listed and not published, as of a recipe; the signature is over what is.

    Returns:
        Every file to publish beside the manifest's, by POSIX path: texts, additions, list and signature.

    Raises:
        PublishRefused: two files have the same path, or the repository of a recipe is too large.
        BadKey: the signer cannot sign.
    """
    signature = folder / SIGNATURE
    before = signature.read_bytes() if signature.is_file() else None
    shutil.rmtree(folder, ignore_errors=True)
    beside = dict(additions)
    for name, content in texts.items():
        beside[name] = _written(folder / name, content)
    _refuse_twins(manifest, beside)
    everything = records.to_json(listed(manifest, beside, absent)).encode()
    beside = {name: addition for name, addition in beside.items() if name not in absent}
    beside[LIST] = _written(folder / LIST, everything)
    mine = {name: merged / name for name in manifest.files if name not in absent}
    if signer is not None:
        with TemporaryDirectory(dir=folder.parent, prefix=".release.") as staging:
            root = Path(staging, "repository")
            paths = mine | {name: path for name, (path, _) in beside.items()}
            for name, path in paths.items():  # links, as what is signed lies in several places
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).symlink_to(path.resolve())
            beside[SIGNATURE] = _written(signature, keep_or_sign(root, signer, before))
    if absent:
        refuse_large([*(manifest.files[name].size for name in mine), *(record.size for _, record in beside.values())])
    return beside


def named(manifest: Manifest, repository: str | None, tag: str | None, tool: records.Tool) -> records.ReleaseList:
    """The manifest with the name of the release that it becomes, and who built it."""
    parts = {part.name: getattr(manifest, part.name) for part in fields(Manifest)}
    builder = records.Builder(tool.version, tool.git, tool.dirty, checkout.this_repository())
    return records.ReleaseList(**parts, repository=repository, tag=tag, builder=builder)


def listed(
    manifest: records.ReleaseList, additions: Mapping[str, payload.Addition], absent: AbstractSet[str] = frozenset()
) -> records.ReleaseList:
    """The manifest as it is published: with every file of the repository, and no path of this machine."""
    generated = {
        name: records.MergedFile(record.size, record.sha256, "generated") for name, (_, record) in additions.items()
    }
    base = manifest.base and replace(manifest.base, path=_last(manifest.base.path))
    loras = tuple(replace(lora, path=_last(lora.path)) for lora in manifest.loras)
    entries = dict(sorted({**manifest.files, **generated}.items()))
    weights: sections.Weights = "recipe" if absent else "full"
    return replace(manifest, base=base, loras=loras, files=entries, weights=weights, absent=tuple(sorted(absent)))


def public_parameters(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's parameters without paths of this machine: of each `path`, only the last name is left."""
    return {
        key: public_parameters(value) if isinstance(value, Mapping) else _last(value) if key == "path" else value
        for key, value in sections.items()
    }


def _last(path: str | None) -> str | None:
    return None if path is None else PurePath(path).name


def _written(path: Path, content: bytes) -> payload.Addition:
    files.replace_bytes(path, content)
    return path, files.hash_file(path)


def _refuse_twins(manifest: Manifest, additions: Mapping[str, payload.Addition]) -> None:
    for name in sorted(additions):
        if name in manifest.files or name in (LIST, SIGNATURE):
            raise PublishRefused(f"{name} is both in the merged checkpoint and made for the repository; fuse again")
