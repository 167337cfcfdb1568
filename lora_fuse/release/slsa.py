"""Provenance of a merge as an in-toto statement with an SLSA predicate. Pure: a manifest in, JSON out.

Formats: in-toto Statement v1 (github.com/in-toto/attestation, spec/v1/statement.md) and SLSA provenance v1
(slsa.dev/spec/v1.0/provenance). They are written as plain mappings: the in-toto-attestation package has no class for
this predicate, only protobuf messages of it, and would bring protobuf into every installation. A test reads what is
written here with that package.

Invariant: no clock time and no host in it, so the same build gives the same statement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_fuse.machine import FileRecord
from lora_fuse.recipe import Lock, Manifest, records

if TYPE_CHECKING:
    from packageurl import PackageURL

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:lora-fuse:fuse:1"  # gives externalParameters their meaning: the sections of params.yaml
Descriptor = dict[str, Any]  # a ResourceDescriptor: an artifact by name and digest (by algorithm), and its address


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
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": dict(parameters),
        "internalParameters": {"version": tool.version, "modified": bool(tool.dirty)},
        "resolvedDependencies": dependencies(manifest),
    }
    builder = {"id": f"{repository or 'pkg:pypi/lora-fuse'}{commit}", "version": {"lora-fuse": tool.version}}
    statement = {
        "_type": STATEMENT,
        "subject": [_file(name, file.sha256) for name, file in sorted(files.items())],
        "predicateType": PREDICATE,
        "predicate": {"buildDefinition": definition, "runDetails": {"builder": builder}},
    }
    return records.to_json(statement)


def dependencies(manifest: Manifest) -> list[Descriptor]:
    """The sources of a merge: every repository with its commit, and every file with its sha256, each once."""
    descriptors = _of_base(manifest.base) if manifest.base else []
    for lora in manifest.loras:
        descriptors += _of_lora(lora)
    return [item for number, item in enumerate(descriptors) if item not in descriptors[:number]]


def purl(repo_id: str, commit: str | None, file: str | None = None) -> PackageURL:
    """The package URL of a Hub repository (github.com/package-url/purl-spec, type huggingface), or of a file in it."""
    from packageurl import PackageURL

    owner, _, name = repo_id.rpartition("/")
    return PackageURL("huggingface", owner or None, name, commit, subpath=file)


def _file(name: str, sha256: str, uri: PackageURL | None = None) -> Descriptor:
    descriptor: Descriptor = {"name": name, "digest": {"sha256": sha256}}
    return descriptor if uri is None else {**descriptor, "uri": uri.to_string()}


def _of_base(base: Lock) -> list[Descriptor]:
    files = sorted(base.files.items())
    if base.repo_id is None:
        return [_file(f"base/{name}", file.sha256) for name, file in files]
    uris = {name: purl(base.repo_id, base.revision, name) for name, _ in files}
    repository = _repository(base.repo_id, base.revision)
    return [*repository, *(_file(name, file.sha256, uris[name]) for name, file in files)]


def _of_lora(lora: records.MergedLora) -> list[Descriptor]:
    name = lora.filename or f"{lora.name}.safetensors"
    if lora.repo_id is None:
        return [_file(f"lora/{name}", lora.sha256)]
    file = _file(name, lora.sha256, purl(lora.repo_id, lora.revision, name))
    return [*_repository(lora.repo_id, lora.revision), file]


def _repository(repo_id: str, commit: str | None) -> list[Descriptor]:
    if commit is None:
        return []
    return [{"name": repo_id, "digest": {"gitCommit": commit}, "uri": purl(repo_id, commit).to_string()}]
