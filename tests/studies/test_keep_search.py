"""Laws of the search for layers to keep: the most error that goes at a size, and a line that a recipe takes."""

import json

import pytest

from lora_fuse.errors import BadConfig
from lora_fuse.studies.keep_search.layer_choice import Layer, by_latents, choose, patterns
from stages.export import bytes_of, take_search
from tests.support.workspace import Workspace

LAYERS = [
    Layer("blocks.0.to_q", 10, 5.0),
    Layer("blocks.1.to_q", 10, 4.0),
    Layer("blocks.0.mlp", 40, 8.0),
    Layer("blocks.1.mlp", 40, 4.0),
    Layer("out", 5, 0.0),
]


def test_what_takes_most_error_a_byte_is_kept_as_far_as_it_fits() -> None:
    assert [layer.module for layer in choose(LAYERS, 65)] == ["blocks.0.to_q", "blocks.1.to_q", "blocks.0.mlp"]
    assert [layer.module for layer in choose(LAYERS, 15)] == ["blocks.0.to_q"]
    assert choose(LAYERS, 0) == []


def test_a_kind_of_which_all_layers_are_kept_is_one_pattern() -> None:
    assert patterns(choose(LAYERS, 65), LAYERS) == ["blocks.*.to_q", "blocks.0.mlp"]


def test_what_a_kind_does_to_the_latents_is_shared_by_the_errors_of_its_layers() -> None:
    found = by_latents(LAYERS, {"blocks.*.to_q": 0.9, "blocks.*.mlp": 1.2, "out": 0.1})
    assert [layer.error for layer in found] == pytest.approx([0.5, 0.4, 0.8, 0.4, 0.0])


def test_a_size_is_a_number_of_bytes() -> None:
    assert (bytes_of("12"), bytes_of("13.5GB"), bytes_of("4MB")) == (12, 13_500_000_000, 4_000_000)
    assert take_search(["a=b", "--search", "4MB", "--json"]) == (["a=b", "--json"], "4MB")
    assert take_search(["--search=4MB"]) == ([], "4MB")
    assert take_search(["a=b"]) == (["a=b"], None)
    for wrong in ("", "4TB", "-1", "much", "9" * 400):
        with pytest.raises(BadConfig, match="--search takes a size"):
            bytes_of(wrong)


def test_a_search_halves_the_error_of_pocket_s_latents_and_writes_nothing(built: Workspace) -> None:
    before = sorted(path for path in (built.root / "artifacts").rglob("*") if "seen" not in path.name)
    said = json.loads(
        built.stage("export", "export.formats=[nvfp4]", "~regress.cases.hat", "--search", "4MB", "--json")
    )
    assert said["bytes"] <= 4_000_000
    assert said["after"] < said["before"] / 2
    assert said["keep"]
    assert sorted(path for path in (built.root / "artifacts").rglob("*") if "seen" not in path.name) == before
    refused = built.stage("export", "export.formats=[nvfp4]", "--search", "1MB", code=2)
    assert "bytes at least, and --search gives it 1000000" in refused
