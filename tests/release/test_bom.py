"""The bill of materials: valid, the same each time, with base and LoRA as ancestors."""

import json
import shutil

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from lora_fuse.fusion.manifest import read_manifest
from lora_fuse.recipe.paths import HERE as at  # noqa: N811
from lora_fuse.release.contents import BOM, LIST, PROVENANCE
from stages.publish import publish
from tests.hub_server import LoopbackHub
from tests.support.released import REPO
from tests.support.releases import LORA_FILE, Build


def test_statement_and_bill_of_materials_are_the_same_each_time(build: Build, hub: LoopbackHub) -> None:
    project = build()
    names = (PROVENANCE, BOM, LIST, "README.md", "images/blocks.png")
    publish(project.params())
    first = [hub.read(REPO, name) for name in names]
    shutil.rmtree(at.release)
    hub.registry.repos.clear()
    publish(project.params())
    assert [hub.read(REPO, name) for name in names] == first


@pytest.mark.parametrize("licences", [("apache-2.0", "mit"), ("openrail++", None)], ids=str)
def test_the_bill_of_materials_is_valid_and_has_base_and_lora_as_ancestors(
    build: Build, hub: LoopbackHub, licences: tuple[str, str | None]
) -> None:
    project = build(*licences)
    publish(project.params("publish.private=true"))
    text = hub.read(REPO, BOM).decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
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
    """The validator itself."""
    publish(build().params())
    content = json.loads(hub.read(REPO, BOM))
    content["metadata"]["component"]["modelCard"]["modelParameters"]["colour"] = "blue"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(content)) is not None
