"""Exports: the same tensors under the other names, streamed, aligned, and whole or not there."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_fuse.checkpoint.shards import Checkpoint, open_checkpoint
from lora_fuse.errors import BadCheckpoint, BadConfig, NoSpace
from lora_fuse.exports.formats import FORMATS, SUMS, export, export_size, is_export, words
from lora_fuse.machine.files import FileRecord, hash_file
from lora_fuse.recipe.recipe import Recipe
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "model.diffusion_model."
PLACE = "diffusion_models/tiny.safetensors"
METADATA = {"lora_fuse": '{"base": null}', "lora_fuse.manifest_sha256": "5" * 64}


def component(folder: Path, shards: int = 2, **config: object) -> Checkpoint:
    """A transformer whose class is known, with tensors of several widths."""
    tensors = {
        **tiny.weights(),
        "norm.table": np.arange(5, dtype=np.uint8),
        "norm.wide": np.linspace(0, 1, 7),
        "norm.half": np.arange(3, dtype=np.float16),
        "norm.single": np.arange(3, dtype=np.float32),
        "norm.fp8": np.arange(3).astype(ml_dtypes.float8_e4m3fn),
        "norm.number": np.array(2.5, dtype=np.float32),
    }
    tiny.write_component(folder, tensors, shards)
    (folder / "config.json").write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel", **config}))
    return open_checkpoint(folder)


def octets(tensor: torch.Tensor) -> tiny.Array:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def single_file(checkpoint: Checkpoint, out: Path) -> FileRecord:
    told: list[int] = []
    files = export(checkpoint, out, ["single_file"], name="tiny", metadata=METADATA, progress=told.append)
    assert list(files) == [PLACE]
    assert sum(told) == files[PLACE].size == export_size(checkpoint, ["single_file"], METADATA)
    return files[PLACE]


def test_every_tensor_is_there_under_its_new_name_with_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = component(tmp_path / "t")
    record = single_file(checkpoint, tmp_path / "out")
    assert record == hash_file(tmp_path / "out" / PLACE)
    ours = {PREFIX + name: tensor for shard in checkpoint.shards for name, tensor in load_file(shard.path).items()}
    theirs = load_file(tmp_path / "out" / PLACE)
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert (theirs[name].dtype, theirs[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(octets(theirs[name]), octets(tensor))


def test_the_header_is_in_the_order_of_safetensors_itself_and_says_what_the_file_is(tmp_path: Path) -> None:
    single_file(component(tmp_path / "t"), tmp_path / "out")
    raw = (tmp_path / "out" / PLACE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    assert entries.pop("__metadata__") == {"format": "pt", **METADATA}
    assert length % 8 == 0
    widths = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "F8_E4M3": 1}
    assert list(entries) == sorted(entries, key=lambda name: (-widths[entries[name]["dtype"]], name))
    assert all(entry["data_offsets"][0] % widths[entry["dtype"]] == 0 for entry in entries.values())


def test_the_bytes_do_not_depend_on_the_shards(tmp_path: Path) -> None:
    one, two = component(tmp_path / "one", shards=1), component(tmp_path / "two", shards=2)
    assert single_file(one, tmp_path / "a").sha256 == single_file(two, tmp_path / "b").sha256


def test_a_model_of_the_newer_edit_kind_has_comfyui_s_flag(tmp_path: Path) -> None:
    """Without `__index_timestep_zero__` ComfyUI runs Qwen-Image-Edit-2511 in the older way."""
    single_file(component(tmp_path / "new", zero_cond_t=True), tmp_path / "a")
    single_file(component(tmp_path / "old", zero_cond_t=False), tmp_path / "b")
    flag = f"{PREFIX}__index_timestep_zero__"
    with safe_open(tmp_path / "a" / PLACE, "numpy") as new, safe_open(tmp_path / "b" / PLACE, "numpy") as old:
        assert set(new.keys()) - set(old.keys()) == {flag}
        assert new.get_slice(flag).get_shape() == [0]


def test_a_model_whose_names_are_not_known_is_refused(tmp_path: Path) -> None:
    checkpoint = component(tmp_path / "t", _class_name="FluxTransformer2DModel")
    with pytest.raises(BadCheckpoint, match=r"FluxTransformer2DModel.*export\.formats"):
        single_file(checkpoint, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"'gguf'; known are single_file"):
        export(component(tmp_path / "t"), tmp_path / "out", ["gguf"], name="x", metadata={}, progress=lambda _: None)


def test_a_shard_that_was_cut_meanwhile_leaves_no_file(tmp_path: Path) -> None:
    checkpoint = component(tmp_path / "t")
    shard = checkpoint.shards[0].path
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(BadCheckpoint, match="ends within"):
        single_file(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_an_earlier_run_left_goes(tmp_path: Path) -> None:
    checkpoint = component(tmp_path / "t")
    single_file(checkpoint, tmp_path / "out")
    assert sums(tmp_path / "out") == [(hash_file(tmp_path / "out" / PLACE).sha256, PLACE)]
    assert export(checkpoint, tmp_path / "out", [], name="x", metadata={}, progress=lambda _: None) == {}
    assert sums(tmp_path / "out") == []
    assert [path.name for path in (tmp_path / "out").rglob("*")] == [SUMS]


def sums(out: Path) -> list[tuple[str, ...]]:
    return [tuple(line.split("  ")) for line in (out / SUMS).read_text().splitlines()]


def test_too_little_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Ten terabytes, of which the disk holds only the header."""
    folder = tmp_path / "t"
    component(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    sparse(folder / "diffusion_pytorch_model.safetensors", 10_000_000_000_000)
    with pytest.raises(NoSpace, match=r"export\.formats"):
        single_file(open_checkpoint(folder), tmp_path / "out")


def sparse(path: Path, nbytes: int) -> None:
    """A shard with one tensor that takes no room on disk."""
    entry = {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}
    text = json.dumps({"w": entry}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + nbytes)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Of 400 MB, which would all be in memory otherwise; what getrusage says would be the parent's as well."""
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
    sparse(folder / "diffusion_pytorch_model.safetensors", 400_000_000)
    script = r"""
import re, sys
from pathlib import Path
from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.exports.formats import export
files = export(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), ["single_file"], name="big", metadata={},
               progress=lambda _: None)
print(next(iter(files.values())).size)
print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
"""
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    size, peak = map(int, done.stdout.split())
    assert size > 400_000_000
    assert peak < 200_000_000


def test_every_format_has_a_place_of_its_own_and_words() -> None:
    assert all("{}" in one.place and words(one.place.format("x")) == one.words for one in FORMATS.values())


def test_a_path_that_a_format_gives_is_an_export_and_no_other() -> None:
    assert all(is_export(one.place.format("x-1.0")) for one in FORMATS.values())
    others = ("diffusion_models/a/b.safetensors", "diffusion_models/x.py", "x.safetensors", "vae/x.safetensors")
    assert not any(map(is_export, others))


def test_pocket_exports_as_its_recipe_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage itself, on pocket's base as if it were merged."""
    from lora_fuse.recipe.records import Exports, Manifest, MergedFile, from_json, to_json
    from stages.config import compose
    from stages.export import export_formats

    monkeypatch.chdir(ROOT)
    tree = compose(["export.formats=[single_file]"])
    model = ROOT / "pocket/model"
    monkeypatch.chdir(tmp_path)
    Path("artifacts").mkdir()
    Path("artifacts/merged").symlink_to(model)
    names = [
        path.relative_to(model).as_posix() for path in model.rglob("*") if path.suffix in {".json", ".safetensors"}
    ]
    files = {name: MergedFile(1, "5" * 64, "base") for name in names}
    manifest = to_json(Manifest(1, "pocket", None, (), 1.0, 0, files))
    Path("artifacts/merged.manifest.json").write_text(manifest)
    assert export_formats(Recipe.parse(tree, "test")) == 0
    record = from_json(Exports, Path("artifacts/export.json").read_text(), "export.json")
    assert list(record.files) == ["diffusion_models/pocket.safetensors"]
    theirs = load_file(Path("artifacts/export/diffusion_models/pocket.safetensors"))
    for shard in open_checkpoint(model).shards:
        for name, tensor in load_file(shard.path).items():
            np.testing.assert_array_equal(octets(theirs.pop(PREFIX + name)), octets(tensor))
    assert not theirs
