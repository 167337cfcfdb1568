"""Laws of a base: what its index says and what its shards hold is the same, or it is refused."""

import json
from pathlib import Path

import pytest

from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.errors import BadCheckpoint
from tests.support import tiny

INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_pipeline(tmp_path / "base", tiny.weights())


def test_a_pipeline_a_component_and_a_file_hold_the_same_tensors(tmp_path: Path, base: Path) -> None:
    single = tiny.write_component(tmp_path / "single", tiny.weights(), shards=1)
    kinds = [base, base / "transformer", single, single / "diffusion_pytorch_model.safetensors"]
    opened = [open_checkpoint(root) for root in kinds]
    assert [one.kind for one in opened] == ["pipeline", "component", "component", "file"]
    assert all(one.tensors().keys() == tiny.weights().keys() for one in opened)


def edit_index(base: Path, name: str, filename: str | None) -> None:
    index = json.loads((base / INDEX).read_text())
    if filename is None:
        del index["weight_map"][name]
    else:
        index["weight_map"][name] = filename
    (base / INDEX).write_text(json.dumps(index))


def test_a_tensor_without_an_index_entry_is_refused(base: Path) -> None:
    edit_index(base, "norm.weight", None)
    with pytest.raises(BadCheckpoint, match=r"'norm\.weight'.*no entry"):
        open_checkpoint(base)


def test_an_index_entry_without_a_tensor_is_refused(base: Path) -> None:
    edit_index(base, "extra.weight", "diffusion_pytorch_model-00001-of-00002.safetensors")
    with pytest.raises(BadCheckpoint, match=r"'extra\.weight'.*does not have it"):
        open_checkpoint(base)


def test_a_missing_shard_is_refused(base: Path) -> None:
    (base / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="no such file"):
        open_checkpoint(base)


def test_a_shard_outside_its_folder_is_refused(base: Path) -> None:
    edit_index(base, "norm.weight", "../vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(BadCheckpoint, match="beside its index"):
        open_checkpoint(base)


def test_an_index_that_does_not_parse_is_refused(base: Path) -> None:
    (base / INDEX).write_text("{")
    with pytest.raises(BadCheckpoint, match=r"index\.json is not readable JSON"):
        open_checkpoint(base)
    (base / INDEX).write_text("{}")
    with pytest.raises(BadCheckpoint, match="weight_map"):
        open_checkpoint(base)


def test_two_candidates_without_an_index_are_refused(base: Path) -> None:
    (base / INDEX).unlink()
    with pytest.raises(BadCheckpoint, match="0 index files and 2 safetensors"):
        open_checkpoint(base)


def test_a_place_that_is_no_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="no base"):
        open_checkpoint(tmp_path)
