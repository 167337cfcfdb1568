"""Laws of a base: what its index says and what its shards hold is the same, or it is refused."""

import json
import shutil
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


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


SECOND = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensor without an entry": (lambda base: edit_index(base, "norm.weight", None), r"'norm\.weight'.*no entry"),
    "tensor in another shard": (
        lambda base: edit_index(base, "norm.weight", "diffusion_pytorch_model-00002-of-00002.safetensors"),
        r"'norm\.weight'.*no entry for it there",
    ),
    "missing component": (
        lambda base: shutil.rmtree(base / "vae"),
        "has no vae, which its model_index.json names; .* or fuse into .*/transformer alone",
    ),
    "missing shard": (lambda base: (base / SECOND).unlink(), f"has no {SECOND}"),
    "shard outside its folder": (
        lambda base: edit_index(base, "norm.weight", "../vae/diffusion_pytorch_model.safetensors"),
        "not a safetensors file beside it",
    ),
    "index that does not parse": (lambda base: (base / INDEX).write_text("{"), r"index\.json is not readable JSON"),
    "shard that is a link to nothing": (lambda base: dangle(base / SECOND), "no such file"),
    "text that is a link to nothing": (
        lambda base: dangle(base / "vae/config.json"),
        "vae/config.json is a link to nothing",
    ),
    "weights of another component that are none": (
        lambda base: (base / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"<html>"),
        "vae/diffusion_pytorch_model.safetensors is a web page",
    ),
    "a text that is a pointer": (
        lambda base: (base / "vae/vocab.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "vae/vocab.json is a pointer of git-lfs",
    ),
    "index without a map": (lambda base: (base / INDEX).write_text("{}"), "weight_map"),
    "two candidates, no index": (lambda base: (base / INDEX).unlink(), "has 2 safetensors files and no index"),
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
    with pytest.raises(BadCheckpoint, match="nowhere is not there: expected"):
        open_checkpoint(tmp_path / "nowhere")


def test_an_entry_of_the_index_that_no_shard_has_is_remarked_on(base: Path) -> None:
    plain = open_checkpoint(base)
    edit_index(base, "tied.weight", "diffusion_pytorch_model-00001-of-00002.safetensors")
    tied = open_checkpoint(base)
    assert tied.tensors().keys() == plain.tensors().keys()
    assert plain.remarks == ()
    assert "tied weights: tied.weight" in tied.remarks[0]


def test_a_base_without_the_component_names_those_that_it_has(base: Path) -> None:
    with pytest.raises(
        BadCheckpoint, match=r"has no component unet; it has weights in transformer, vae: .*--component"
    ):
        open_checkpoint(base, "unet")
    with pytest.raises(BadCheckpoint, match=r"has no safetensors weights in scheduler/; it has weights in transformer"):
        open_checkpoint(base, "scheduler")


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path, base: Path) -> None:
    plain = open_checkpoint(base)
    linked = tmp_path / "linked"
    linked.mkdir()
    for part in base.iterdir():
        (linked / part.name).symlink_to(part)
    (base / "vae" / "loop").symlink_to(linked)
    (base / "vae" / "itself").symlink_to(".")
    found = open_checkpoint(linked)
    assert found.tensors() == plain.tensors()
    assert found.others == plain.others
    assert {"vae/itself", "vae/loop"} <= found.left.keys()


def test_a_component_may_be_a_link_into_the_hubs_cache(tmp_path: Path, base: Path) -> None:
    """Its files are links to blobs without a suffix there."""
    blobs = tmp_path / "cache" / "blobs"
    snapshot = tmp_path / "cache" / "snapshots" / "1" / "transformer"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted((base / "transformer").iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../../blobs/{number:064x}")
    (base / "transformer").rmdir()
    (base / "transformer").symlink_to(snapshot)
    assert open_checkpoint(base).tensors().keys() == tiny.weights().keys()
