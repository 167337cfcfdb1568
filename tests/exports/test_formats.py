"""Exports: every tensor under its own name, as it was or encoded, streamed, aligned, and whole or not there."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_fuse import fuse
from lora_fuse.checkpoint.shards import Checkpoint, open_checkpoint
from lora_fuse.errors import BadCheckpoint, BadConfig, NoSpace
from lora_fuse.exports import ExportOptions, making, read_export
from lora_fuse.exports.export_contents import as_merged
from lora_fuse.exports.formats import FORMATS, SUMS, export, export_size, is_export, words
from lora_fuse.fusion import exact_sums
from lora_fuse.fusion.plan import make_plan
from lora_fuse.lora import LoraInput
from lora_fuse.machine.files import FileRecord, hash_file
from lora_fuse.quantisation import FORMATS as CODECS
from lora_fuse.quantisation import Fp8Options
from lora_fuse.recipe.records import Exports, from_json
from tests.support import tiny
from tests.support.composed import recipe_of
from tests.support.matrices import matrix, qwen

ROOT = Path(__file__).resolve().parents[2]
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
    ours = {name: tensor for shard in checkpoint.shards for name, tensor in load_file(shard.path).items()}
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
    flag = "__index_timestep_zero__"
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


@pytest.mark.parametrize("name", ["single_file", "int8_convrot", "gguf_q8_0"])
def test_too_little_room_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    """Ten terabytes, of which the disk holds only the header."""
    folder = tmp_path / "t"
    component(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    sparse(folder / "diffusion_pytorch_model.safetensors", 10_240_000_000_000)
    with pytest.raises(NoSpace, match=r"export\.formats"):
        one_export(open_checkpoint(folder), tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def sparse(path: Path, nbytes: int) -> None:
    """A shard with one matrix in bfloat16 that takes no room on disk."""
    name = "transformer_blocks.0.attn.to_q.weight"
    entry = {"dtype": "BF16", "shape": [nbytes // 5120, 2560], "data_offsets": [0, nbytes]}
    text = json.dumps({name: entry}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + nbytes)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Of 400 MB, which would all be in memory otherwise; what getrusage says would be the parent's as well."""
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
    sparse(folder / "diffusion_pytorch_model.safetensors", 409_600_000)
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


QUANTISED = [name for name, one in FORMATS.items() if one.codec is not None]
FINE = {
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.img_mlp.net.0.proj",
    "transformer_blocks.0.img_mlp.net.2",
}
COARSE = FINE - {"transformer_blocks.0.img_mlp.net.2"}


def one_export(checkpoint: Checkpoint, out: Path, name: str, options: ExportOptions | None = None) -> Path:
    told: list[int] = []
    settings = options or ExportOptions()
    made = export(checkpoint, out, [name], name="tiny", metadata=METADATA, progress=told.append, options=settings)
    ((place, record),) = made.items()
    assert record == hash_file(out / place)
    assert sum(told) == record.size == export_size(checkpoint, [name], METADATA, settings)
    return out / place


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_export_has_every_weight_and_its_keep_list_is_honoured(tmp_path: Path, name: str) -> None:
    checkpoint = qwen(tmp_path / "t", zero_cond_t=True)
    stored = as_merged(checkpoint)
    path = one_export(checkpoint, tmp_path / "out", name)
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors().values()}
    read = dict(read_export(path, shapes))
    assert read.keys() == shapes.keys()
    changed = {key.removesuffix(".weight") for key, values in read.items() if not np.array_equal(values, stored(key))}
    assert changed == (COARSE if FORMATS[name].coarse else FINE)
    for key in changed:
        merged = stored(f"{key}.weight")
        assert np.linalg.norm(read[f"{key}.weight"] - merged) < 0.11 * np.linalg.norm(merged)


@pytest.mark.parametrize("name", [name for name in QUANTISED if FORMATS[name].ggml is None])
def test_a_container_is_aligned_and_says_what_it_is(tmp_path: Path, name: str) -> None:
    path = one_export(qwen(tmp_path / "t", zero_cond_t=True), tmp_path / "out", name)
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt", **METADATA}
        assert file.get_slice("__index_timestep_zero__").get_shape() == [0]
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    widths = {"F32": 4, "BF16": 2}
    del entries["__metadata__"]
    assert all(entry["data_offsets"][0] % widths.get(entry["dtype"], 1) == 0 for entry in entries.values())
    marks = [entry for key, entry in entries.items() if key.endswith(".comfy_quant")]
    assert len(marks) == (0 if name == "fp8_rows" else len(COARSE if FORMATS[name].coarse else FINE))


def test_gguf_says_its_architecture_and_has_vectors_in_float32(tmp_path: Path) -> None:
    """Without the one ComfyUI-GGUF refuses it; ggml has no sums of BF16 and F32 vectors."""
    path = one_export(qwen(tmp_path / "t", zero_cond_t=True), tmp_path / "out", "gguf_q8_0")
    reader = gguf.GGUFReader(path)
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert (said["general.architecture"], said["general.quantization_version"]) == ("qwen_image", 2)
    assert {key: said[key] for key in METADATA} == METADATA
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {key for key, kind in kinds.items() if kind == "Q8_0"} == {f"{module}.weight" for module in FINE}
    assert (kinds["img_in.weight"], kinds["img_in.bias"], kinds["txt_norm.weight"]) == ("BF16", "F32", "F32")
    (flag,) = (tensor for tensor in reader.tensors if tensor.name == "__index_timestep_zero__")
    assert (flag.shape.tolist(), flag.tensor_type.name) == ([0], "F32")
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


@pytest.mark.parametrize("name", ["int8_convrot", "gguf_q8_0", "nvfp4"])
def test_bytes_do_not_depend_on_threads_or_memory(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = qwen(tmp_path / "t")
    first = hash_file(one_export(checkpoint, tmp_path / "a", name)).sha256
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert hash_file(one_export(checkpoint, tmp_path / "b", name)).sha256 == first
    monkeypatch.setattr(making, "at_once", lambda: 1)
    assert hash_file(one_export(checkpoint, tmp_path / "c", name)).sha256 == first


def test_fp8_by_chance_is_another_file_for_another_seed(tmp_path: Path) -> None:
    checkpoint = qwen(tmp_path / "t")
    made = [
        hash_file(one_export(checkpoint, tmp_path / str(at), "fp8_scaled", ExportOptions(fp8=Fp8Options(seed=seed))))
        for at, seed in enumerate((1, 1, 2, None))
    ]
    assert made[0] == made[1]
    assert len({record.sha256 for record in made}) == 3


def test_a_user_keeps_more_and_not_what_is_not_there(tmp_path: Path) -> None:
    checkpoint = qwen(tmp_path / "t")
    keep = ("transformer_blocks.*.attn.*",)
    path = one_export(checkpoint, tmp_path / "out", "int8_convrot", ExportOptions(keep=keep))
    with safe_open(path, "numpy") as file:
        assert {key for key in file.keys() if key.endswith("weight_scale")} == {  # noqa: SIM118 - no mapping
            f"{module}.weight_scale" for module in FINE - {"transformer_blocks.0.attn.to_q"}
        }
    for bad, message in ((("blocks.9.*",), r"'blocks\.9\.\*' matches none"), (("*",), "leaves none")):
        with pytest.raises(BadConfig, match=message):
            one_export(checkpoint, tmp_path / "none", "int8_convrot", ExportOptions(keep=bad))
    assert not (tmp_path / "none").exists()


def broken(checkpoint: Checkpoint, value: float) -> ExportOptions:
    """Weights one of whose rows is bad."""

    def matrix_of(name: str) -> npt.NDArray[np.float32]:
        values = as_merged(checkpoint)(name)
        if name == "transformer_blocks.0.img_mlp.net.0.proj.weight":
            values[5] = value
        return values

    return ExportOptions(matrix=matrix_of)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("name", ["int8_convrot", "gguf_q8_0", "fp8_rows"])
def test_values_that_no_format_holds_leave_nothing(tmp_path: Path, name: str, value: float) -> None:
    checkpoint = qwen(tmp_path / "t")
    with pytest.raises(
        BadCheckpoint, match=r"net\.0\.proj\.weight' cannot be quantised: its row 5 .* export\.keep"
    ) as bad:
        one_export(checkpoint, tmp_path / "out", name, broken(checkpoint, value))
    assert "\n" not in str(bad.value)
    assert not (tmp_path / "out").exists()


def test_a_shape_that_no_group_divides_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """The way out works."""
    shapes = {"img_in": (8, 37), "transformer_blocks.0.attn.to_q": (8, 37), "transformer_blocks.0.attn.to_k": (8, 64)}
    tensors: dict[str, tiny.Array] = {f"{module}.weight": matrix(shape=shape) for module, shape in shapes.items()}
    for name in ("gguf_q8_0", "int8_convrot"):
        folder = tmp_path / name
        tiny.write_component(folder, tensors)
        (folder / "config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
        checkpoint = open_checkpoint(folder)
        with pytest.raises(BadCheckpoint, match=r"to_q.weight'.*37 columns.*add .*to_q' to export\.keep"):
            one_export(checkpoint, tmp_path / "out", name)
        assert not (tmp_path / "out").exists()
        assert one_export(checkpoint, tmp_path / "out", name, ExportOptions(keep=("*.to_q",))).exists()
        shutil.rmtree(tmp_path / "out")


def test_a_base_that_was_one_file_of_a_whole_pipeline_stays_one(tmp_path: Path) -> None:
    """A fuse writes it: every tensor that is no target and the header's own entries are carried along."""
    kept = {
        "first_stage_model.encoder.conv_in.weight": torch.randn(4, 3, 3, 3).half(),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": torch.randn(8).half(),
        "model.diffusion_model.out.0.weight": torch.randn(8).half(),
    }
    layer = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    own = {"format": "pt", "modelspec.architecture": "stable-diffusion-xl-v1-base"}
    save_file({**kept, layer: torch.randn(16, 8).half()}, tmp_path / "base.safetensors", metadata=own)
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    factors = {f"{key}.lora_down.weight": torch.randn(2, 8), f"{key}.lora_up.weight": torch.randn(16, 2)}
    save_file({**factors, f"{key}.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    lora = LoraInput("l", tmp_path / "lora.safetensors", 1.0)
    fuse(make_plan(open_checkpoint(tmp_path / "base.safetensors"), [lora]), tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    assert {name for name, tensor in made.items() if name in kept and torch.equal(tensor, kept[name])} == kept.keys()
    assert not torch.equal(made[layer], load_file(tmp_path / "base.safetensors")[layer])
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata().items() >= own.items()


def test_an_export_of_an_export_is_refused(tmp_path: Path) -> None:
    path = one_export(qwen(tmp_path / "t"), tmp_path / "out", "int8_convrot")
    folder = tmp_path / "again"
    folder.mkdir()
    path.rename(folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
    for name in ("single_file", "gguf_q8_0"):
        with pytest.raises(BadCheckpoint, match="quantised already"):
            one_export(open_checkpoint(folder), tmp_path / "out2", name)
    assert not (tmp_path / "out2").exists()


def test_the_base_s_own_metadata_goes_along_but_for_what_is_a_shard_s(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    qwen(folder)
    for at, path in enumerate(sorted(folder.glob("*.safetensors"))):
        own = {"format": "pt", "config": '{"a": 1}', "part": str(at), "lora_fuse": "{}"}
        save_file(load_file(path), path, metadata=own)
    path = one_export(open_checkpoint(folder), tmp_path / "out", "single_file")
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt", "config": '{"a": 1}', **METADATA}


def test_k_types_need_a_program_and_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"no program 'no-such-cli'.*gguf_q8_0"):
        one_export(qwen(tmp_path / "t"), tmp_path / "out", "gguf_q4_k", ExportOptions(sd_cli="no-such-cli"))


@pytest.mark.skipif(shutil.which("sd-cli") is None, reason="needs stable-diffusion.cpp's sd-cli on PATH")
@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_k_types_by_the_program_are_in_our_own_container(tmp_path: Path, kind: str) -> None:
    path = one_export(qwen(tmp_path / "t", zero_cond_t=True), tmp_path / "out", f"gguf_{kind}")
    read = dict(read_export(path))
    name = "transformer_blocks.0.attn.to_q.weight"
    merged = as_merged(open_checkpoint(tmp_path / "t"))(name)
    assert 1e-3 < np.linalg.norm(read[name] - merged) / np.linalg.norm(merged) < 0.1
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == "qwen_image"


def test_quantised_from_the_exact_sum_is_nearer_than_from_what_was_rounded(tmp_path: Path) -> None:
    """Of normal weights, bf16's own error adds 10 % to the energy of Q8_0's, and 4 % to that of int8's."""
    exact = matrix(shape=(64, 1024)) + matrix(shape=(64, 1024), seed=9) * np.float32(0.01)
    rounded = exact.astype(tiny.BF16).astype(np.float32)
    for name, more in (("q8_0", 0.10), ("int8_convrot", 0.04), ("fp8_scaled", 0.01)):
        energies = [
            float(
                np.square(
                    (CODECS[name].decode(CODECS[name].encode(values, Fp8Options()), values.shape) - exact).astype(float)
                ).sum()
            )
            for values in (exact, rounded)
        ]
        assert energies[1] / energies[0] - 1 == pytest.approx(more, rel=0.4), name


def test_a_path_that_a_format_gives_is_an_export_and_no_other() -> None:
    assert all(is_export(one.place.format("x-1.0")) for one in FORMATS.values())
    others = ("diffusion_models/a/b.safetensors", "diffusion_models/x.py", "x.safetensors", "vae/x.safetensors")
    assert not any(map(is_export, others))


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pocket is downloaded and fused."""
    from stages.download import download
    from stages.fuse import fuse as fuse_stage

    folder = tmp_path_factory.mktemp("pocket")
    recipe = recipe_of()
    (folder / "pocket").symlink_to(ROOT / "pocket")
    with contextlib.chdir(folder):
        assert (download(recipe), fuse_stage(recipe)) == (0, 0)
    return folder


def exported(pocket: Path, *settings: str) -> Path:
    """The folder that the stage writes, by a recipe with some settings."""
    from stages.export import export_formats

    recipe = recipe_of(*settings)
    with contextlib.chdir(pocket):
        assert export_formats(recipe) == 0
        record = from_json(Exports, Path("artifacts/export.json").read_text(), "export.json")
    folder = pocket / "artifacts/export"
    assert all(hash_file(folder / name) == file for name, file in record.files.items())
    return folder


def test_the_stage_quantises_exact_sums_and_copies_the_merge(pocket: Path) -> None:
    """What is quantised is not the merge: that is rounded to float16 already."""
    folder = exported(pocket, "export.formats=[single_file,int8_convrot,fp8_rows]")
    whole = load_file(folder / "diffusion_models/pocket.safetensors")
    merged = open_checkpoint(pocket / "artifacts/merged", "transformer")
    stored = {name: tensor for shard in merged.shards for name, tensor in load_file(shard.path).items()}
    assert whole.keys() == stored.keys()
    assert all(torch.equal(whole[name], stored[name]) for name in stored)
    codes = load_file(folder / "diffusion_models/pocket-int8_convrot.safetensors")
    name = "transformer_blocks.0.attn.to_q"
    lora = ROOT / "pocket/lora/pocket-lightning-4steps-v2.safetensors"
    plan = make_plan(open_checkpoint(ROOT / "pocket/model", "transformer"), [LoraInput("lightning", lora, 1.0)])
    of_exact, of_merged = (
        CODECS["int8_convrot"].encode(matrix(f"{name}.weight"), Fp8Options())["weight"]
        for matrix in (exact_sums(plan).matrix, as_merged(merged))
    )
    np.testing.assert_array_equal(codes[f"{name}.weight"].numpy(), of_exact)
    assert (of_exact != of_merged).any()
    assert codes[f"{name}.weight_scale"].shape == (120, 1)


def test_a_merge_of_another_scale_is_not_exported(pocket: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r'"scale": 1\.0.*"scale": 0\.9') as refused:
        exported(pocket, "export.formats=[int8_convrot]", "fuse.scale=0.9")
    assert refused.value.rerun is not None
    exported(pocket, "export.formats=[single_file]", "fuse.scale=0.9")  # it is of the merge as it is
