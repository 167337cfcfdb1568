"""Two checkpoints side by side: the same rows of both, under whatever names, or a refusal."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_fuse.differences import open_pair
from lora_fuse.errors import BadCheckpoint
from tests.support import tiny


def moved(tensors: dict[str, tiny.Array]) -> dict[str, tiny.Array]:
    return {name: (values.astype(np.float32) + 1).astype(values.dtype) for name, values in tensors.items()}


def test_rows_of_both_are_those_of_the_files_in_pieces_and_one_by_one(tmp_path: Path) -> None:
    base = tiny.weights()
    other = moved(base)
    pair = open_pair(
        tiny.write_pipeline(tmp_path / "other", other, shards=3), tiny.write_component(tmp_path / "base", base)
    )
    assert {tensor.name for tensor in pair.tensors} == set(base)
    assert (pair.only_base, pair.only_other) == ((), ())
    for tensor in pair.tensors:
        pieces = list(tensor.pieces(nbytes=4 * 3 * tensor.columns))
        rows = [piece.first for piece in pieces]
        assert rows == list(range(0, tensor.rows, 3))
        for side, tensors in (("base", base), ("other", other)):
            read = np.concatenate([getattr(piece, side) for piece in pieces])
            assert np.array_equal(read, tensors[tensor.name].astype(np.float32).reshape(read.shape))
        wanted = np.array([0, tensor.rows - 1])
        few = tensor.read(wanted)
        assert np.array_equal(few.other, other[tensor.name].astype(np.float32).reshape(tensor.rows, -1)[wanted])


def test_a_weight_that_is_rows_of_another_file_s_weights_is_found_by_the_family_s_names(tmp_path: Path) -> None:
    """Z-Image's original checkpoint keeps query, key and value in one weight."""
    rng = np.random.default_rng(3)
    base = {
        f"layers.{block}.attention.to_{kind}.weight": rng.standard_normal((8, 8)).astype(np.float32)
        for block in range(2)
        for kind in "qkv"
    }
    joined = {
        f"layers.{block}.attention.qkv.weight": np.concatenate(
            [base[f"layers.{block}.attention.to_{kind}.weight"] for kind in "qkv"]
        )
        for block in range(2)
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(joined, tmp_path / "other.safetensors")
    save_file({"other": np.zeros(2, np.float32)}, tmp_path / "third.safetensors")
    for first, second in (("other", "base"), ("base", "other")):
        pair = open_pair(tmp_path / f"{first}.safetensors", tmp_path / f"{second}.safetensors")
        assert len(pair.tensors) == (6 if second == "base" else 2)
        for tensor in pair.tensors:
            for piece in tensor.pieces(nbytes=4 * 8 * 3):
                assert np.array_equal(piece.base, piece.other)


def test_a_weight_of_a_single_file_is_one_although_it_has_two_names(tmp_path: Path) -> None:
    tensors = tiny.weights()
    for name, values in (("base", tensors), ("other", moved(tensors))):
        save_file({f"model.diffusion_model.{key}": one for key, one in values.items()}, tmp_path / name)
    pair = open_pair(tmp_path / "other", tmp_path / "base")
    assert sorted(tensor.name for tensor in pair.tensors) == sorted(tensors)


def test_another_architecture_or_the_same_place_is_refused_with_both_and_a_way_out(tmp_path: Path) -> None:
    base = tiny.write_component(tmp_path / "base", tiny.weights())
    name = "transformer_blocks.0.attn.to_q.weight"
    wide = tiny.weights() | {name: np.zeros((24, 32), tiny.BF16)}
    strange = {f"encoder.{one}": values for one, values in tiny.weights().items()}
    for tensors, words in ((wide, f"'{name}' is 24x32, and in .* 24x16: two arch"), (strange, "has not 13 of the 13")):
        other = tiny.write_component(tmp_path / words[:3].strip(), tensors)
        with pytest.raises(BadCheckpoint, match=words):
            open_pair(other, base)
    for other, words in ((base, "are one place"), (tmp_path / "none", "no such file")):
        with pytest.raises(BadCheckpoint, match=words):
            open_pair(other, base)
    cut = tiny.write_component(tmp_path / "cut", tiny.weights(), shards=1)
    tensor = open_pair(cut, base).tensors[0]
    (cut / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    with pytest.raises(BadCheckpoint, match=r"ended .* early"):
        list(tensor.pieces())
