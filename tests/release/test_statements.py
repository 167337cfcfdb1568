"""The statement of provenance and the bill of materials: valid, the same each time, with every file and source."""

import json
import shutil
from dataclasses import replace

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from packageurl import PackageURL

from lora_fuse.fusion.manifest import read_manifest
from lora_fuse.recipe import checkout as provenance
from lora_fuse.recipe.checkout import this_tool
from lora_fuse.recipe.paths import HERE as at  # noqa: N811
from lora_fuse.release.contents import BOM, LIST, PROVENANCE
from lora_fuse.release.slsa import provenance_json, purl
from stages.publish import publish
from tests.hub_server import LoopbackHub
from tests.support.released import LORA_FILE, REPO, Build


def test_the_statement_is_in_toto_s_and_names_every_file_and_source(build: Build, hub: LoopbackHub) -> None:
    project = build()
    publish(project.params())
    text = hub.read(REPO, PROVENANCE).decode()
    message = json_format.Parse(text, statement_pb2.Statement())  # of an unknown field an error
    Statement.copy_from_pb(message).validate()
    assert message.predicate_type == "https://slsa.dev/provenance/v1"
    found = json_format.ParseDict(json.loads(text)["predicate"], provenance_pb2.Provenance())
    manifest, _ = read_manifest(at.manifest)
    assert {one.name: one.digest["sha256"] for one in message.subject} == {
        name: file.sha256 for name, file in manifest.files.items()
    }
    base, (lora,) = manifest.base, manifest.loras
    assert base is not None
    resolved = found.build_definition.resolved_dependencies
    dependencies = {PackageURL.from_string(one.uri): dict(one.digest) for one in resolved}
    assert dependencies == {
        purl("carol/base", base.revision): {"gitCommit": base.revision},
        **{purl("carol/base", base.revision, name): {"sha256": file.sha256} for name, file in base.files.items()},
        purl("dave/lora", lora.revision): {"gitCommit": lora.revision},
        purl("dave/lora", lora.revision, LORA_FILE): {"sha256": lora.sha256},
    }
    parameters = json_format.MessageToDict(found.build_definition.external_parameters)
    assert parameters["fuse"]["scale"] == 1.0
    assert parameters["base"]["repo_id"] == "carol/base"
    tool = this_tool()
    assert tool.git
    assert found.run_details.builder.id.endswith(f"@{tool.git}")


def test_local_sources_are_dependencies_without_an_address(build: Build) -> None:
    build()
    manifest, _ = read_manifest(at.manifest)
    assert manifest.base is not None
    local = replace(
        manifest,
        base=replace(manifest.base, repo_id=None, path="somewhere", revision=None),
        loras=tuple(replace(lora, repo_id=None, path="else", revision=None) for lora in manifest.loras),
    )
    text = provenance_json(local, {}, parameters={}, tool=this_tool(), repository=None)
    found = json.loads(text)["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert {one["name"].split("/")[0] for one in found} == {"base", "lora"}
    assert all(one.keys() == {"name", "digest"} for one in found)
    assert "somewhere" not in text


@pytest.mark.parametrize(
    ("remote", "said"),
    [
        ("https://me:s3cret@example.org/owner/name.git", "https://example.org/owner/name"),
        ("git@example.org:owner/name.git", "https://example.org/owner/name"),
        ("ssh://git@example.org/owner/name", "ssh://example.org/owner/name"),
        ("/home/me/name", None),
        ("file:///home/me/name", None),
        (None, None),
    ],
)
def test_the_builder_s_repository_has_no_password_in_it(
    monkeypatch: pytest.MonkeyPatch, remote: str | None, said: str | None
) -> None:
    monkeypatch.setattr(provenance, "_git", lambda *_: remote)
    assert provenance.this_repository() == said


def test_statement_and_bill_of_materials_are_the_same_each_time(build: Build, hub: LoopbackHub) -> None:
    project = build()
    names = (PROVENANCE, BOM, LIST, "README.md", "images/blocks.png")
    publish(project.params())
    first = [hub.read(REPO, name) for name in names]
    shutil.rmtree(at.release)
    hub.registry.repos.clear()
    publish(project.params())
    assert [hub.read(REPO, name) for name in names] == first


def against_the_schema(text: str) -> object:
    """The schema's complaint, if any; a grammar for addresses is made at the import, for a second."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)


@pytest.mark.parametrize("licences", [("apache-2.0", "mit"), ("openrail++", None)], ids=str)
def test_the_bill_of_materials_is_valid_and_has_base_and_lora_as_ancestors(
    build: Build, hub: LoopbackHub, licences: tuple[str, str | None]
) -> None:
    project = build(*licences)
    publish(project.params("publish.private=true"))
    text = hub.read(REPO, BOM).decode()
    assert against_the_schema(text) is None
    content = json.loads(text)
    model = content["metadata"]["component"]
    manifest, manifest_sha256 = read_manifest(at.manifest)
    assert model["type"] == "machine-learning-model"
    assert model["version"] == manifest_sha256[:12]
    assert {one["name"]: one["hashes"][0]["content"] for one in model["components"]} == {
        name: file.sha256 for name, file in manifest.files.items()
    }
    base, lora = sorted(model["pedigree"]["ancestors"], key=lambda one: str(one["bom-ref"]))
    assert (base["name"], lora["name"]) == ("carol/base", f"dave/lora/{LORA_FILE}")
    assert lora["hashes"] == [{"alg": "SHA-256", "content": manifest.loras[0].sha256}]
    assert base["version"] == (manifest.base and manifest.base.revision)
    assert ("licenses" in lora) == (licences[1] is not None)
    card = model["modelCard"]
    assert card["modelParameters"]["task"] == "image-to-image"
    assert {"type": "over_floor", "value": "0.75", "slice": "rabbit"} in card["quantitativeAnalysis"][
        "performanceMetrics"
    ]
    assert "timestamp" not in content["metadata"]


def test_a_broken_bill_of_materials_would_be_seen(build: Build, hub: LoopbackHub) -> None:
    publish(build().params())
    content = json.loads(hub.read(REPO, BOM))
    content["metadata"]["component"]["modelCard"]["modelParameters"]["colour"] = "blue"
    assert against_the_schema(json.dumps(content)) is not None
