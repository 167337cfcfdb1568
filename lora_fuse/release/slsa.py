"""Provenance of a merge as an in-toto statement with an SLSA predicate. Pure: a manifest in, JSON out.

Formats: in-toto Statement v1 (github.com/in-toto/attestation, spec/v1/statement.md) and SLSA provenance v1
(slsa.dev/spec/v1.0/provenance), as plain mappings: the in-toto-attestation package has only protobuf messages for this
predicate, and would bring protobuf into every installation. A test reads what is written here with it.

Invariant: no clock time and no host in it, so the same build gives the same statement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_fuse.machine import FileRecord
from lora_fuse.recipe import Manifest, records

if TYPE_CHECKING:  # who reads statements needs none
    from packageurl import PackageURL

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
    """The content of `provenance.json`; its subjects are the merged files and the exports.

    The builder is the `repository` that the tool was run from; None where that is unknown.
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
    return statement_json({name: file.sha256 for name, file in files.items()}, definition, builder)


def statement_json(sums: Mapping[str, str], definition: Mapping[str, Any], builder: Mapping[str, Any]) -> str:
    """An in-toto statement on files by their sha256, with an SLSA provenance of this build definition and builder."""
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [_file(name, sha256) for name, sha256 in sorted(sums.items())],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {"buildDefinition": dict(definition), "runDetails": {"builder": dict(builder)}},
    }
    return records.to_json(statement)


def dependencies(manifest: Manifest) -> list[Descriptor]:
    """The sources of a merge: every repository with its commit, and every file with its sha256, each once."""
    descriptors: list[Descriptor] = []
    if base := manifest.base:
        hashes = {name: file.sha256 for name, file in sorted(base.files.items())}
        descriptors += _of_source("base", base.repo_id, base.revision, hashes)
    for lora in manifest.loras:
        hashes = {lora.filename or f"{lora.name}.safetensors": lora.sha256}
        descriptors += _of_source("lora", lora.repo_id, lora.revision, hashes)
    return [item for number, item in enumerate(descriptors) if item not in descriptors[:number]]


def purl(repo_id: str, commit: str | None, file: str | None = None) -> PackageURL:
    """The package URL of a Hub repository (github.com/package-url/purl-spec, type huggingface), or of a file in it."""
    from packageurl import PackageURL

    owner, _, name = repo_id.rpartition("/")
    return PackageURL("huggingface", owner or None, name, commit, subpath=file)


def _file(name: str, sha256: str) -> Descriptor:
    return {"name": name, "digest": {"sha256": sha256}}


def _of_source(kind: str, repo_id: str | None, commit: str | None, hashes: Mapping[str, str]) -> list[Descriptor]:
    """A repository and its files, or local files in a folder named by their `kind`."""
    if repo_id is None:
        return [_file(f"{kind}/{name}", sha256) for name, sha256 in hashes.items()]
    uri = purl(repo_id, commit).to_string()
    repository = [{"name": repo_id, "digest": {"gitCommit": commit}, "uri": uri}] if commit else []
    files = [{**_file(name, sha256), "uri": purl(repo_id, commit, name).to_string()} for name, sha256 in hashes.items()]
    return [*repository, *files]
