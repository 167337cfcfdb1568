"""Laws of what does not change: taken over as asked, and an edit of the merge edits no base in silence."""

import os
import tempfile
from pathlib import Path

import pytest

import lora_fuse
from lora_fuse import LoraInput
from lora_fuse.cli import main
from lora_fuse.machine.files import Untouched, can_reflink, is_read_only, link_between, take_over
from tests.support import tiny

VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def lora(tmp_path: Path) -> LoraInput:
    return LoraInput("l", tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors()), 1.0)


def cached(base: Path, hub: Path, *, shared: bool) -> Path:
    """The base as the Hub's client keeps it: blobs, and a snapshot of links to them.

    `shared` moves the blobs to where all repositories have them, and leaves links, as the client does with Xet's.
    """
    snapshot = hub / "models--a--b" / "snapshots" / ("c" * 40)
    blobs = hub / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in base.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
        if shared:
            (hub / "blobs" / "ab").mkdir(parents=True, exist_ok=True)
            (blobs / str(number)).rename(hub / "blobs" / "ab" / str(number))
            (blobs / str(number)).symlink_to(Path("../../blobs/ab", str(number)))
    return snapshot


@pytest.mark.parametrize("how", ["auto", "reflink", "hardlink", "copy"])
def test_weights_are_taken_over_as_asked_and_text_is_copied(
    tmp_path: Path, base: Path, lora: LoraInput, how: Untouched
) -> None:
    plan = lora_fuse.plan(base, [lora])
    fused = lora_fuse.fuse(plan, tmp_path / "out", untouched=how)
    assert (tmp_path / "out" / VAE).read_bytes() == (base / VAE).read_bytes()
    assert (tmp_path / "out" / VAE).samefile(base / VAE) == (how == "hardlink")
    assert fused.linked == ((VAE,) if how == "hardlink" else ())
    assert not (tmp_path / "out" / "vae/config.json").samefile(base / "vae/config.json")
    again = lora_fuse.fuse(plan, tmp_path / "again", untouched=how)  # the links of the first are no change of the base
    assert again.manifest.files == fused.manifest.files


@pytest.mark.skipif(can_reflink(Path(__file__), Path(tempfile.gettempdir())), reason="blocks are shared here")
@pytest.mark.parametrize("shared", [False, True])
def test_the_cache_is_shared_read_only_and_that_is_said(
    tmp_path: Path, base: Path, lora: LoraInput, capsys: pytest.CaptureFixture[str], shared: bool
) -> None:
    snapshot = cached(base, tmp_path / "hub", shared=shared)
    assert not is_read_only(snapshot / VAE)
    arguments = ["fuse", str(snapshot), str(tmp_path / "out"), "--lora", str(lora.path)]
    assert main(arguments) == 0
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "hard links" in line)
    assert said.startswith("unchanged weights (88.0B in 1 files) are hard links to the base's, so do not edit them")
    assert "--untouched copy" in said
    assert (tmp_path / "out" / VAE).samefile(snapshot / VAE)
    assert is_read_only(tmp_path / "out" / VAE)
    assert not is_read_only(tmp_path / "out" / "vae/config.json")
    assert main([*arguments, "--untouched", "copy"]) == 0
    assert "hard links" not in capsys.readouterr().out
    assert not (tmp_path / "out" / VAE).samefile(snapshot / VAE)
    assert not is_read_only(tmp_path / "out" / VAE)
    with (tmp_path / "out" / VAE).open("r+b") as file:
        file.write(b"edited")
    assert not (snapshot / VAE).read_bytes().startswith(b"edited")


@pytest.mark.skipif(can_reflink(Path(__file__), Path(tempfile.gettempdir())), reason="blocks are shared here")
def test_a_base_that_is_read_only_already_is_linked(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    (base / VAE).chmod(0o444)
    lora_fuse.fuse(lora_fuse.plan(base, [lora]), tmp_path / "out")
    assert (tmp_path / "out" / VAE).samefile(base / VAE)
    lora_fuse.fuse(lora_fuse.plan(base, [lora]), tmp_path / "out", untouched="reflink")
    assert not (tmp_path / "out" / VAE).samefile(base / VAE)


def test_what_cannot_be_shared_is_copied(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "a", Path("/dev/shm")  # noqa: S108
    source.write_bytes(b"weights")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second filesystem here")
    ways: list[Untouched] = ["auto", "reflink", "hardlink"]
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        for how in ways:
            assert take_over(source, Path(folder) / how, how) == "copy"
            assert (Path(folder) / how).read_bytes() == b"weights"


def test_a_try_says_what_can_be_done_and_leaves_nothing(tmp_path: Path) -> None:
    if not can_reflink(Path(__file__), tmp_path):
        assert [link_between(tmp_path, tmp_path, read_only=mode) for mode in (True, False)] == ["hardlink", "copy"]
    assert list(tmp_path.iterdir()) == []
