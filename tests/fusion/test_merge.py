"""Laws of a merge: only targets change, the result is whole or absent, the same input gives the same bytes."""

import fcntl
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_fuse.checkpoint.shards import open_checkpoint, read_header
from lora_fuse.errors import BadCheckpoint, BadLora, BadScale, Busy, NoSpace
from lora_fuse.fusion import adder as sums
from lora_fuse.fusion import cpu_adder as lowrank
from lora_fuse.fusion import pieces
from lora_fuse.fusion import torch_sums as fusion
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import make_plan
from lora_fuse.fusion.stream import Share
from lora_fuse.lora.inputs import LoraInput
from lora_fuse.machine import direct_io
from lora_fuse.machine.files import Untouched
from lora_fuse.recipe.records import MergedFile
from tests.support import tiny


def fuse(
    base: Path,
    out: Path,
    *loras: LoraInput,
    generated: dict[str, bytes] | None = None,
    untouched: Untouched = "hardlink",
) -> dict[str, MergedFile]:
    return write_merged(
        make_plan(open_checkpoint(base), loras),
        out,
        device="cpu",
        generated=generated or {},
        known={},
        progress=lambda _: None,
        untouched=untouched,
    )


@pytest.fixture
def lora(tmp_path: Path) -> LoraInput:
    return LoraInput("l", tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors()), 1.0)


def shards(folder: Path) -> dict[str, tiny.Array]:
    tensors: dict[str, tiny.Array] = {}
    for file in sorted((folder / "transformer").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_targets_change_and_they_change_by_the_formula(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    fuse(base, tmp_path / "out", lora)
    before, after, factors = shards(base), shards(tmp_path / "out"), tiny.lora_tensors()
    for name, old in before.items():
        module = name.removesuffix(".weight")
        new = after[name].astype(np.float64)
        if f"{module}.alpha" not in factors:
            assert after[name].tobytes() == old.tobytes()
            continue
        up, down = factors[f"{module}.lora_up.weight"], factors[f"{module}.lora_down.weight"]
        exact = old.astype(np.float64) + 0.5 * up.astype(np.float64) @ down.astype(np.float64)
        assert np.abs(new - exact).max() <= np.abs(exact).max() * 2.0**-8
        assert after[name].tobytes() != old.tobytes()


def test_a_merged_shard_keeps_the_name_and_the_layout_of_the_base_shard(
    tmp_path: Path, base: Path, lora: LoraInput
) -> None:
    fuse(base, tmp_path / "out", lora)
    for shard in open_checkpoint(base).shards:
        merged = read_header(tmp_path / "out" / shard.relative)
        moved = len(merged.raw) - len(shard.header.raw)
        expected = [(t.name, t.dtype, t.shape, t.start + moved) for t in shard.header.tensors.values()]
        assert [(t.name, t.dtype, t.shape, t.start) for t in merged.tensors.values()] == expected
        assert len(merged.raw) % 8 == 0
        assert shard.header.metadata.items() < merged.metadata.items()


def test_every_file_of_the_result_is_listed_with_its_true_hash(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    files = fuse(base, tmp_path / "out", lora, generated={"model_index.json": b"{}\n"})
    held = snapshot(tmp_path / "out")
    assert files.keys() == held.keys()
    for name, content in held.items():
        assert files[name].sha256 == hashlib.sha256(content).hexdigest()
        assert files[name].size == len(content)
    assert {name: file.origin for name, file in files.items() if file.origin != "base"} == {
        "model_index.json": "generated",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": "fused",
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": "fused",
    }


def test_a_pickle_and_the_card_of_the_base_stay_behind(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    files = fuse(base, tmp_path / "out", lora)
    assert not [name for name in files if name.endswith((".bin", ".md"))]


def test_out_is_of_the_same_kind_as_base(tmp_path: Path, lora: LoraInput) -> None:
    component = tiny.write_component(tmp_path / "component", tiny.weights(), shards=1)
    assert "config.json" in fuse(component, tmp_path / "out", lora)
    single = component / "diffusion_pytorch_model.safetensors"
    assert fuse(single, tmp_path / "one.safetensors", lora).keys() == {"one.safetensors"}
    merged = tmp_path / "out" / single.name
    assert (tmp_path / "one.safetensors").read_bytes() == merged.read_bytes()


def test_the_bytes_do_not_depend_on_threads_chunks_or_the_order_of_loras(
    tmp_path: Path, base: Path, lora: LoraInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = LoraInput("m", tiny.write_lora(tmp_path / "m.safetensors", tiny.lora_tensors("diffusers", seed=8)), 0.3)
    first = fuse(base, tmp_path / "a", lora, second)
    assert fuse(base, tmp_path / "b", second, lora) == first
    monkeypatch.setattr(lowrank, "BLOCK", 40)
    monkeypatch.setattr(pieces, "PIECE", 200)
    monkeypatch.setattr(direct_io, "WINDOW", direct_io.BLOCK)
    assert fuse(base, tmp_path / "c", lora, second) == first
    for cores, memory in ((1, 1 << 40), (64, 1 << 40), (64, 0)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(direct_io, "available_memory", lambda memory=memory: memory)
        assert fuse(base, tmp_path / f"of {cores} cores and {memory} bytes", lora, second) == first
    monkeypatch.setattr(sums, "stackable", lambda *_: None)
    assert fuse(base, tmp_path / "by torch", lora, second) == first
    monkeypatch.setattr(fusion, "BLOCK", (3, 5))
    assert fuse(base, tmp_path / "in small blocks", lora, second) == first


@pytest.mark.parametrize(
    ("shards", "device", "cores", "gigabytes", "expected"),
    [
        (9, "cpu", 32, 250, (9, 4, 32)),
        (40, "cpu", 64, 250, (32, 2, 64)),
        (9, "cpu", 32, 0.5, (4, 2, 32)),
        (9, "cuda", 16, 100, (8, 4, 8)),
        (9, "cpu", 1, 0, (1, 2, 1)),
    ],
)
def test_shards_are_as_many_as_there_are_cores_and_memory_for(
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
    device: str,
    cores: int,
    gigabytes: float,
    expected: tuple[int, int, int],
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(direct_io, "available_memory", lambda: int(gigabytes * 2**30))
    share = Share.of_machine(shards, device)
    assert (share.shards, share.windows, share.adders) == expected
    assert share.shards * share.windows * direct_io.WINDOW <= 2**30


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_other_dtypes_keep_theirs(tmp_path: Path, lora: LoraInput, dtype: type) -> None:
    base = tiny.write_pipeline(tmp_path / "other", tiny.weights(dtype))
    fuse(base, tmp_path / "out", lora)
    assert {tensor.dtype for tensor in shards(tmp_path / "out").values()} == {np.dtype(dtype)}


def test_a_base_with_a_name_that_no_manifest_can_hold_is_refused(base: Path, lora: LoraInput) -> None:
    (base / "vae" / os.fsdecode(b"\x83.json")).write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"the name of vae/\\x83\.json is not UTF-8, .*; rename it"):
        make_plan(open_checkpoint(base), [lora])


def test_a_base_without_a_matrix_lacks_the_modules_and_is_no_quantised_one(tmp_path: Path, lora: LoraInput) -> None:
    tiny.write_component(tmp_path / "base", {"w": np.ones(6, np.float32)}, shards=1)
    with pytest.raises(BadLora, match="6 of 6 modules are not in the base"):
        make_plan(open_checkpoint(tmp_path / "base"), [lora])


def test_a_base_in_a_dtype_that_cannot_be_rounded_to_is_refused(tmp_path: Path, lora: LoraInput) -> None:
    base = tiny.write_pipeline(tmp_path / "int", tiny.weights(np.int8))
    with pytest.raises(BadCheckpoint, match="I8"):
        make_plan(open_checkpoint(base), [lora])


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(base: Path, lora: LoraInput, scale: float) -> None:
    with pytest.raises(BadScale, match=str(scale)):
        make_plan(open_checkpoint(base), [LoraInput("l", lora.path, scale)])


def test_a_factor_that_is_not_finite_leaves_the_last_result(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    fuse(base, tmp_path / "out", lora)
    before = snapshot(tmp_path / "out")
    tensors = tiny.lora_tensors()
    tensors["transformer_blocks.1.attn.to_q.lora_up.weight"][3, 1] = np.inf
    broken = LoraInput("l", tiny.write_lora(tmp_path / "broken.safetensors", tensors), 1.0)
    with pytest.raises(BadLora, match="NaN or infinity"):
        fuse(base, tmp_path / "out", broken)
    assert snapshot(tmp_path / "out") == before
    assert not list(tmp_path.glob(".out.partial*"))


@pytest.mark.parametrize("cores", [1, 64])
def test_a_shard_that_shrinks_under_way_is_refused(
    tmp_path: Path, base: Path, lora: LoraInput, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether shards are fused one by one or side by side: the error is that of the shard that failed."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    plan = make_plan(open_checkpoint(base), [lora])
    with plan.checkpoint.shards[1].path.open("r+b") as file:
        file.truncate(plan.checkpoint.shards[1].path.stat().st_size - 10)
    with pytest.raises(BadCheckpoint, match="ended 10 bytes early"):
        write_merged(plan, tmp_path / "out", device="cpu", generated={}, known={}, progress=lambda _: None)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.partial*"))


def test_a_failed_shard_stops_the_others(tmp_path: Path, lora: LoraInput, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six shards, three at a time, of 200 pieces each; the first is broken in its first piece."""
    tensors = {f"filler.{i}": np.ones((1000,), tiny.BF16) for i in range(60)} | tiny.weights()
    tensors["transformer_blocks.0.attn.to_out.0.bias"][:] = np.nan  # no target: may stay
    tensors["transformer_blocks.0.attn.to_q.weight"][:] = np.nan
    base = tiny.write_component(tmp_path / "base", tensors, shards=6)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    with pytest.raises(BadCheckpoint, match=r"to_q.weight': the base holds NaN"):
        fuse(base, tmp_path / "out", lora)
    assert not list(tmp_path.glob("out*")) + list(tmp_path.glob(".out.partial*"))


def test_a_full_disk_is_refused_before_the_first_write(tmp_path: Path, lora: LoraInput) -> None:
    """A shard with 8 TB of (sparse) other tensors: the file is real, the disk has no room for a second one."""
    huge, filler = tmp_path / "huge.safetensors", 8_000_000_000_000
    entries = {
        "transformer_blocks.0.attn.to_q.weight": {"dtype": "BF16", "shape": [24, 16], "data_offsets": [0, 768]},
        "filler": {"dtype": "U8", "shape": [filler], "data_offsets": [768, 768 + filler]},
    }
    body = json.dumps(entries).encode()
    with huge.open("wb") as file:
        file.write(struct.pack("<Q", len(body)) + body)
        file.truncate(8 + len(body) + 768 + filler)
    part = {key: value for key, value in tiny.lora_tensors().items() if "blocks.0.attn.to_q" in key}
    small = LoraInput("l", tiny.write_lora(tmp_path / "small.safetensors", part), 1.0)
    with pytest.raises(NoSpace, match=r"the merged checkpoint needs 8\.00TB \(8000\d+ bytes\), .* free; make room"):
        fuse(huge, tmp_path / "out.safetensors", small)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "huge.safetensors",
        "l.safetensors",
        "small.safetensors",
    ]


def test_a_second_run_says_that_one_is_at_work(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    with (tmp_path / ".out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="another run"):
            fuse(base, tmp_path / "out", lora)


def test_a_swap_that_was_killed_half_way_is_undone(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    files = fuse(base, tmp_path / "out", lora)
    staged = tmp_path / f".out.partial-{'0' * 16}"
    staged.mkdir()
    (tmp_path / "out").rename(staged / "previous")
    assert fuse(base, tmp_path / "out", lora) == files
    assert not staged.exists()


def test_linked_files_of_the_base_survive_a_new_merge(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    before = snapshot(base)
    fuse(base, tmp_path / "out", lora)
    fuse(base, tmp_path / "out", LoraInput("l", lora.path, 0.5))
    assert snapshot(base) == before
