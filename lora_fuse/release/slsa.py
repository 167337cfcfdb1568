"""Where a merge came from, as an in-toto statement with an SLSA provenance predicate. Pure: a manifest in, JSON out.

Formats: in-toto Statement v1 (github.com/in-toto/attestation, spec/v1/statement.md) and SLSA provenance v1
(slsa.dev/spec/v1.0/provenance). The records are dataclasses as everywhere here: the in-toto-attestation package has
no class for this predicate, only protobuf messages of it, and would bring protobuf into every installation. A test
reads what is written here with that package.

Invariant: no clock time and no host in it, so the same build gives the same statement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from lora_fuse.machine import FileRecord
from lora_fuse.recipe import Lock, Manifest, records

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:lora-fuse:fuse:1"  # what externalParameters mean: the sections of params.yaml, by their names


@dataclass(frozen=True, slots=True)
class Artifact:
    """A ResourceDescriptor: an artifact by name and digest (by algorithm)."""

    name: str
    digest: dict[str, str]


@dataclass(frozen=True, slots=True)
class Resource(Artifact):
    """One that has an address."""

    uri: str


@dataclass(frozen=True, slots=True)
class Definition:
    """How it was built: `external` parameters are the recipe's, `internal` ones the tool's."""

    build_type: Annotated[str, Field(alias="buildType")]
    external: Annotated[dict[str, Any], Field(alias="externalParameters")]
    internal: Annotated[dict[str, Any], Field(alias="internalParameters")]
    dependencies: Annotated[tuple[Resource | Artifact, ...], Field(alias="resolvedDependencies")]


@dataclass(frozen=True, slots=True)
class Builder:
    """Who built it: `id` is repository and commit."""

    id: str
    version: dict[str, str]


@dataclass(frozen=True, slots=True)
class Run:
    """The run; when it was is left out."""

    builder: Builder


@dataclass(frozen=True, slots=True)
class Predicate:
    """The SLSA provenance."""

    definition: Annotated[Definition, Field(alias="buildDefinition")]
    run: Annotated[Run, Field(alias="runDetails")]


@dataclass(frozen=True, slots=True)
class Statement:
    """The in-toto statement."""

    kind: Annotated[str, Field(alias="_type")]
    subject: tuple[Artifact, ...]
    predicate_type: Annotated[str, Field(alias="predicateType")]
    predicate: Predicate


def provenance_json(
    manifest: Manifest,
    exports: Mapping[str, FileRecord],
    *,
    parameters: Mapping[str, Any],
    tool: records.Tool,
    repository: str | None,
) -> str:
    """The content of `provenance.json`.

    Args:
        manifest: of the merge; its files are the subjects.
        exports: the merge in other formats, subjects as well.
        parameters: of the recipe, by section.
        tool: what wrote the merge.
        repository: address of the repository that the tool was run from; None where that is unknown.
    """
    files: Mapping[str, FileRecord | records.MergedFile] = {**manifest.files, **exports}
    commit = f"@{tool.git}" if tool.git else ""
    internal = {"version": tool.version, "modified": bool(tool.dirty)}
    return records.to_json(
        Statement(
            STATEMENT,
            tuple(Artifact(name, {"sha256": file.sha256}) for name, file in sorted(files.items())),
            PREDICATE,
            Predicate(
                Definition(BUILD_TYPE, dict(parameters), internal, dependencies(manifest)),
                Run(Builder(f"{repository or 'pkg:pypi/lora-fuse'}{commit}", {"lora-fuse": tool.version})),
            ),
        )
    )


def dependencies(manifest: Manifest) -> tuple[Resource | Artifact, ...]:
    """What went in: every repository with its commit, and every file with its sha256."""
    found: list[Resource | Artifact] = [*_of_base(manifest.base)] if manifest.base else []
    for lora in manifest.loras:
        found += _of_lora(lora)
    return tuple(one for number, one in enumerate(found) if one not in found[:number])  # two LoRAs of one repository


def purl(repo_id: str, commit: str | None, file: str | None = None) -> str:
    """The package URL of a Hub repository (github.com/package-url/purl-spec, type huggingface), or of a file in it."""
    at = f"@{commit}" if commit else ""
    return f"pkg:huggingface/{repo_id}{at}" + (f"#{file}" if file else "")


def _of_base(base: Lock) -> Sequence[Resource | Artifact]:
    if base.repo_id is None:
        return [Artifact(f"base/{name}", {"sha256": file.sha256}) for name, file in sorted(base.files.items())]
    return [
        *_repository(base.repo_id, base.revision),
        *(
            Resource(name, {"sha256": file.sha256}, purl(base.repo_id, base.revision, name))
            for name, file in sorted(base.files.items())
        ),
    ]


def _of_lora(lora: records.MergedLora) -> Sequence[Resource | Artifact]:
    name = lora.filename or f"{lora.name}.safetensors"
    if lora.repo_id is None:
        return [Artifact(f"lora/{name}", {"sha256": lora.sha256})]
    file = Resource(name, {"sha256": lora.sha256}, purl(lora.repo_id, lora.revision, name))
    return [*_repository(lora.repo_id, lora.revision), file]


def _repository(repo_id: str, commit: str | None) -> list[Resource]:
    return [Resource(repo_id, {"gitCommit": commit}, purl(repo_id, commit))] if commit else []
