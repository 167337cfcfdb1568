"""Laws of a base: what its index says and what its shards hold is the same, or it is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.errors import BadCheckpoint
from tests.support import tiny

INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


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


SECOND = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensor without an entry": (lambda base: edit_index(base, "norm.weight", None), r"'norm\.weight'.*no entry"),
    "entry without a tensor": (
        lambda base: edit_index(base, "extra.weight", "diffusion_pytorch_model-00001-of-00002.safetensors"),
        r"'extra\.weight'.*does not have it",
    ),
    "missing shard": (lambda base: (base / SECOND).unlink(), "no such file"),
    "shard outside its folder": (
        lambda base: edit_index(base, "norm.weight", "../vae/diffusion_pytorch_model.safetensors"),
        "beside its index",
    ),
    "index that does not parse": (lambda base: (base / INDEX).write_text("{"), r"index\.json is not readable JSON"),
    "index without a map": (lambda base: (base / INDEX).write_text("{}"), "weight_map"),
    "two candidates, no index": (lambda base: (base / INDEX).unlink(), "0 index files and 2 safetensors"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_base_is_refused(base: Path, kind: str) -> None:
    damage, said = BROKEN[kind]
    damage(base)
    with pytest.raises(BadCheckpoint, match=said):
        open_checkpoint(base)


def test_a_place_that_is_no_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="no base"):
        open_checkpoint(tmp_path)
