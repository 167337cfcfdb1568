"""Laws of a base: what its index says and what its shards hold is the same, or it is refused."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from lora_fuse.checkpoint import repository_files
from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.errors import BadCheckpoint, BadSource
from lora_fuse.verification import whole_files
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
    for name in ("flux-Q8_0.gguf", "model.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(
            BadCheckpoint, match=f"or one .safetensors or .gguf file; of what it holds, name {name} itself"
        ):
            open_checkpoint(tmp_path)
        (tmp_path / name).unlink()
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
        if part.is_dir():
            (linked / part.name).symlink_to(part)
        else:
            shutil.copy(part, linked)
    (linked / "NOTICE").symlink_to("model_index.json")  # within the base
    (base / "vae" / "loop").symlink_to(linked)
    (base / "vae" / "itself").symlink_to(".")
    found = open_checkpoint(linked)
    assert found.tensors() == plain.tensors()
    assert found.others == ("NOTICE", *plain.others)
    assert {"vae/itself", "vae/loop"} <= found.left.keys()


def test_links_that_multiply_come_to_an_end(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two links in each of 30 folders to the next one are a thousand million folders."""
    for depth in range(30):
        (tmp_path / f"{depth}").mkdir()
        for link in "ab":
            (tmp_path / f"{depth}" / link).symlink_to(tmp_path / f"{depth + 1}")
    (tmp_path / "30").mkdir()
    (base / "vae/many").symlink_to(tmp_path / "0")
    monkeypatch.setattr(repository_files, "MOST_ENTRIES", 100)
    monkeypatch.setattr(whole_files, "MOST", 100)
    with pytest.raises(BadSource, match="one of more than 100 files and folders"):
        open_checkpoint(base)
    with pytest.raises(BadCheckpoint, match="one of more than 100 files and folders"):
        whole_files.sort_base(base, ["transformer"], None)


def test_a_component_may_be_a_link_into_the_hubs_cache(tmp_path: Path, base: Path) -> None:
    """Its files are links to blobs without a suffix there."""
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1" / "transformer"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted((base / "transformer").iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../../blobs/{number:064x}")
    (base / "transformer").rmdir()
    (base / "transformer").symlink_to(snapshot)
    assert open_checkpoint(base).tensors().keys() == tiny.weights().keys()


def put_aside(path: Path, into: Path) -> None:
    """Leave a link where something was."""
    into.parent.mkdir(parents=True, exist_ok=True)
    path.rename(into)
    path.symlink_to(into)


def put_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def clone_with_linked_component(base: Path) -> None:
    (base / ".git").mkdir()
    put_aside(base / "vae", base.parent / "vae")


# Something at a path of a base that no part of one is, and the words that refuse it.
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a private file": (
        lambda base: (base / "vae/notes.txt").symlink_to("/etc/hostname"),
        r"vae/notes\.txt: a link leads to /etc/hostname, out of .*/base: copy the file",
    ),
    "a licence that is none": (lambda base: (base / "LICENSE").symlink_to("/etc/hostname"), "a link leads to /etc"),
    "a shard elsewhere": (lambda base: put_aside(base / SECOND, base.parent / "x"), "a link leads to .*/x, out of"),
    "an index elsewhere": (lambda base: put_aside(base / INDEX, base.parent / "x"), "a link leads to .*/x, out of"),
    "a folder of a folder": (
        lambda base: (base / "vae/sub").symlink_to(base.parent / "sub"),
        r"vae/sub/LICENSE\.txt: a link leads to .*/sub/LICENSE\.txt, out of",
    ),
    "a component of a git clone": (
        clone_with_linked_component,
        "vae/.*: a link leads to .*/vae/.*, out of",
    ),
    "a named pipe": (lambda base: put_pipe(base / "vae/vocab.json"), r"vae/vocab\.json is .* no plain file"),
    "a pipe of weights": (lambda base: put_pipe(base / SECOND), "it is a named pipe, not a regular file"),
    "a device": (lambda base: (base / "vae/vocab.json").symlink_to("/dev/zero"), "a link leads to /dev/zero"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_file_of_the_base_is_refused(tmp_path: Path, base: Path, kind: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "LICENSE.txt").write_text("a licence")
    change, message = FOREIGN[kind]
    change(base)
    with pytest.raises(BadCheckpoint, match=message):
        open_checkpoint(base)


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder of this user's, who is not root while a test lasts: root reads everything."""
    root = os.geteuid() == 0
    with TemporaryDirectory() as folder:
        if root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


def test_what_stays_behind_may_be_anything(base: Path) -> None:
    plain = open_checkpoint(base)
    (base / "vae/notes.md").symlink_to("/etc/hostname")
    os.mkfifo(base / "vae/pipe")
    found = open_checkpoint(base)
    assert found.others == plain.others
    assert {"vae/notes.md", "vae/pipe"} <= found.left.keys()


def test_a_folder_that_cannot_be_read_is_no_gap(as_nobody: Path) -> None:
    base = tiny.write_pipeline(as_nobody / "base", tiny.weights())
    (base / "lost+found").mkdir(0)  # of a disk, for root alone
    assert "lost+found" in open_checkpoint(base).left
    (base / "vae").chmod(0)
    with pytest.raises(BadSource, match=r"base/vae cannot be listed \(Permission denied\)"):
        open_checkpoint(base)
    (base / "vae").chmod(0o700)
    (base / "lost+found").chmod(0o700)
