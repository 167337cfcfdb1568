"""Laws of the place of a merge: only what was made here is replaced, an input never, and a link stays."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Lock

import pytest

import lora_fuse
from lora_fuse import LoraInput
from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.cli import main
from lora_fuse.errors import Refused
from lora_fuse.fusion.manifest import manifest_path, read_manifest
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import make_plan
from lora_fuse.machine import staging
from tests.support import tiny
from tests.support.machine import small_disk

SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"


@pytest.fixture
def lora(tmp_path: Path) -> LoraInput:
    path = tiny.write_lora(tmp_path / "loras" / "l.safetensors", tiny.lora_tensors())
    return LoraInput("l", path, 1.0)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A base that is one file."""
    folder = tiny.write_component(tmp_path / "component", tiny.weights(), shards=1)
    return (folder / "diffusion_pytorch_model.safetensors").rename(tmp_path / "one.safetensors")


def fuse(base: Path, out: Path, lora: LoraInput, *, replace: bool = False) -> None:
    lora_fuse.fuse(lora_fuse.plan(base, [lora]), out, replace=replace)


def state(folder: Path) -> dict[str, object]:
    """Everything below a folder: content of files, targets of links, inodes of folders."""
    below = sorted(path for path in folder.rglob("*") if ".lock" not in path.name)
    return {str(path.relative_to(folder)): content(path) for path in below}


def content(path: Path) -> object:
    if path.is_symlink():
        return path.readlink()
    return path.read_bytes() if path.is_file() else path.stat().st_ino


def pipeline(place: Path) -> None:
    """Somebody's own pipeline, of the names that a merge has."""
    tiny.write_pipeline(place, tiny.weights(seed=5))


def peft_folder(place: Path) -> None:
    tiny.write_lora(place / "adapter_model.safetensors", tiny.lora_tensors("peft", alpha=None))
    (place / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 2}')


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    "name", ["base", "base/transformer", "base/new/out", ".", "loras", "linked base", "linked loras", "elsewhere"]
)
def test_an_input_is_never_replaced(tmp_path: Path, base: Path, lora: LoraInput, name: str, replace: bool) -> None:
    (tmp_path / "linked base").symlink_to(base)
    (tmp_path / "linked loras").symlink_to(tmp_path / "loras")
    (base / "vae").rename(tmp_path / "elsewhere")  # of a base that is put together by links
    (base / "vae").symlink_to(tmp_path / "elsewhere")
    before = state(tmp_path)
    with pytest.raises(Refused, match="which the merge reads, overlap"):
        fuse(base, tmp_path / name, lora, replace=replace)
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", ["one.safetensors", "loras/l.safetensors", "a link", "a hard link", "base by a link"])
def test_a_file_that_is_an_input_is_never_replaced(tmp_path: Path, single: Path, lora: LoraInput, name: str) -> None:
    (tmp_path / "a link").symlink_to(lora.path)
    (tmp_path / "a hard link").hardlink_to(lora.path)
    (tmp_path / "base by a link").symlink_to(single)
    before = state(tmp_path)
    with pytest.raises(Refused, match="overlap"):
        fuse(single, tmp_path / name, lora, replace=True)
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", ["adapter", "adapter/out"])
def test_the_folder_of_an_adapter_is_an_input(tmp_path: Path, base: Path, name: str) -> None:
    peft_folder(tmp_path / "adapter")
    with pytest.raises(Refused, match="overlap"):
        fuse(base, tmp_path / name, LoraInput("l", tmp_path / "adapter", 1.0), replace=True)


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_does_not_replace_a_folder_nor_a_folder_a_file(
    tmp_path: Path, base: Path, single: Path, lora: LoraInput, replace: bool
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    before = state(tmp_path)
    with pytest.raises(Refused, match=r"one\.safetensors is a file, and OUT .* name the file to write, .*/folder/one"):
        fuse(single, tmp_path / "folder", lora, replace=replace)
    with pytest.raises(Refused, match=r"is a folder, and OUT .*file is none"):
        fuse(base, tmp_path / "file", lora, replace=replace)
    with pytest.raises(Refused, match="neither a file nor a folder"):
        fuse(single, tmp_path / "pipe", lora, replace=replace)
    with pytest.raises(Refused, match="file is a file; name another place"):
        fuse(base, tmp_path / "file" / "out", lora, replace=replace)
    assert state(tmp_path) == before


def test_a_slash_at_the_end_is_a_folder(
    tmp_path: Path, single: Path, lora: LoraInput, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fuse", str(single), f"{tmp_path}/new/", "--lora", str(lora.path)]) == 2
    assert f"name the file to write, {tmp_path}/new/one.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_working_folder_and_a_mount_are_not_exchanged(
    tmp_path: Path, base: Path, lora: LoraInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(Refused, match=r"OUT .*here is the working folder, .* name a folder in it, .*/here/merged"):
        fuse(base, Path(), lora)
    with pytest.raises(Refused, match="where a disk is mounted"):
        fuse(base, Path("/proc"), lora, replace=True)


def note_beside(place: Path) -> None:
    """An earlier merge into which somebody put a file of their own."""
    (place / "notes.txt").write_text("years")


def edit(place: Path) -> None:
    with (place / "transformer/config.json").open("a") as file:
        file.write("\n\n")


def unfuse(place: Path) -> None:
    """The folder of an earlier merge, in which now other weights lie."""
    shutil.rmtree(place)
    pipeline(place)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (note_beside, "notes.txt is in it and not as lora-fuse made it"),
        (edit, "config.json is in it and not as lora-fuse made it"),
        (unfuse, "out is a folder that lora-fuse did not make"),
        (lambda place: (place / "vae/x").symlink_to("/"), "vae/x is in it"),
        (lambda place: manifest_path(place).write_text("mine"), "manifest.json is no Manifest of a merge"),
        (lambda place: place.with_name("out.build.json").write_text("[]"), "build.json is no BuildRecord"),
    ],
    ids=["a note", "an edit", "other weights", "a link", "another manifest", "another record"],
)
def test_what_lora_fuse_did_not_make_stays_unless_it_is_said(
    tmp_path: Path, base: Path, lora: LoraInput, change: Callable[[Path], None], said: str
) -> None:
    out = tmp_path / "out"
    fuse(base, out, lora)
    wanted = {path.relative_to(out) for path in out.rglob("*")}
    change(out)
    before = state(tmp_path)
    with pytest.raises(Refused, match=said) as refused:
        fuse(base, out, LoraInput("l", lora.path, 0.5))
    assert "--replace" in str(refused.value)
    assert state(tmp_path) == before
    fuse(base, out, lora, replace=True)
    assert {path.relative_to(out) for path in out.rglob("*")} == wanted
    assert read_manifest(manifest_path(out))[0].targets == 6


def test_a_folder_and_a_file_of_somebody_stay(tmp_path: Path, base: Path, single: Path, lora: LoraInput) -> None:
    pipeline(tmp_path / "flux")
    (tmp_path / "vae.safetensors").write_bytes(single.read_bytes())
    before = state(tmp_path)
    with pytest.raises(Refused, match=r"flux is a folder that lora-fuse did not make; .* --replace"):
        fuse(base, tmp_path / "flux", lora)
    with pytest.raises(Refused, match=r"safetensors is a file that lora-fuse did not make; .* --replace"):
        fuse(single, tmp_path / "vae.safetensors", lora)
    assert state(tmp_path) == before


def test_an_earlier_merge_is_replaced_also_without_its_manifest(
    tmp_path: Path, base: Path, single: Path, lora: LoraInput
) -> None:
    other = tiny.write_pipeline(tmp_path / "other", tiny.weights(seed=3), shards=1)
    for source, name in ((base, "out"), (single, "out.safetensors")):
        out = tmp_path / name
        fuse(source, out, lora)
        fuse(source, out, LoraInput("l", lora.path, 0.5))  # the manifest says that it was made here
        manifest_path(out).unlink()
        fuse(source, out, lora)  # the header does
    fuse(other, tmp_path / "out", lora)  # of other files
    assert not (tmp_path / "out" / SHARD).exists()


def test_a_place_with_nothing_in_it_is_free(tmp_path: Path, base: Path, single: Path, lora: LoraInput) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    fuse(base, tmp_path / "folder", lora)
    fuse(single, tmp_path / "file", lora)
    fuse(base, tmp_path / "not" / "yet", lora)


@pytest.mark.parametrize("held", [False, True])
def test_an_out_that_is_a_link_goes_through_it(tmp_path: Path, base: Path, lora: LoraInput, held: bool) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/target")
    if held:
        fuse(base, tmp_path / "disk" / "target", LoraInput("l", lora.path, 0.5))
    fuse(base, tmp_path / "out", lora)
    assert (tmp_path / "out").readlink() == Path("disk/target")
    assert lora_fuse.verify(tmp_path / "disk" / "target", base, [lora]).passed
    assert read_manifest(tmp_path / "out.manifest.json")[0].loras[0].scale == 1.0
    assert not list(tmp_path.glob(".out.*")) + list((tmp_path / "disk").glob(".*partial*"))


def test_links_in_a_circle_are_one_error(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    (tmp_path / "out").symlink_to("other")
    (tmp_path / "other").symlink_to("out")
    with pytest.raises(Refused, match=r"OUT .*out"):
        fuse(base, tmp_path / "out", lora)


def test_the_disk_behind_a_link_is_the_one_that_needs_room(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    with small_disk(tmp_path / "small", "2m") as disk:
        (tmp_path / "out").symlink_to(disk / "merged")
        with pytest.raises(lora_fuse.LoraFuseError, match=f"and the disk of {disk} has"):
            fuse(base, tmp_path / "out", lora)


def test_what_comes_there_while_it_is_written_stays(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    out = tmp_path / "out"
    lock = Lock()

    def meanwhile(_: int) -> None:  # from any thread
        with lock:
            if not out.exists():
                pipeline(out)

    with pytest.raises(Refused, match="did not make"):
        write_merged(
            make_plan(open_checkpoint(base), [lora]), out, device="cpu", generated={}, known={}, progress=meanwhile
        )
    assert (out / "README.md").read_text() == "the base's card\n"
    assert not list(tmp_path.glob(".out.partial-*"))


def test_names_that_only_look_like_ours_are_left_alone(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    kept = [".out.partial-backup", ".out.previous", f".out.partial-{'a' * 16}", f".out1.partial-{'b' * 16}"]
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    ours = tmp_path / f".out.partial-{'c' * 16}" / "files"
    ours.mkdir(parents=True)
    (tmp_path / ".out.lock").write_text("mine")
    fuse(base, tmp_path / "out", lora)
    fuse(base, tmp_path / "out[1]", lora)
    assert [(tmp_path / name / "mine").read_text() for name in kept] == ["mine"] * 4
    assert (tmp_path / ".out.lock").read_text() == "mine"
    assert not ours.parent.exists()


def test_a_record_that_cannot_be_written_is_found_before_the_merge(
    tmp_path: Path, base: Path, single: Path, lora: LoraInput
) -> None:
    (tmp_path / "out.manifest.json").mkdir()
    before = state(tmp_path)
    with pytest.raises(Refused, match=r"out\.manifest\.json, where the merge's record is written, is a folder"):
        fuse(base, tmp_path / "out", lora, replace=True)
    with pytest.raises(Refused, match=r"the name of OUT .* is not UTF-8"):
        fuse(single, tmp_path / os.fsdecode(b"\x83"), lora)
    with pytest.raises(Refused, match="longer than"):
        fuse(base, tmp_path / ("x" * 240), lora)
    assert state(tmp_path) == before


def test_where_names_cannot_be_exchanged_the_old_result_steps_aside(
    tmp_path: Path, base: Path, lora: LoraInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse(base, tmp_path / "out", LoraInput("l", lora.path, 0.5))
    monkeypatch.setattr(staging, "_exchange", lambda *_: False)  # as on NFS
    fuse(base, tmp_path / "out", lora)
    assert lora_fuse.verify(tmp_path / "out", base, [lora]).passed
    assert not list(tmp_path.glob(".out.partial-*"))
