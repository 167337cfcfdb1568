"""The benchmark's checkpoint has the real names and shapes, and loads like a real one."""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.make_checkpoint import (
    ITEM,
    Noise,
    Shapes,
    lora_shapes,
    main,
    make_base,
    make_lora,
    plan_shards,
    qwen_image_edit_config,
    tensor_shapes,
)

TINY = {
    **qwen_image_edit_config(2),
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": [2, 2, 4],
    "in_channels": 16,
    "out_channels": 4,
}


@pytest.fixture(scope="module")
def real() -> Shapes:
    """The shapes of the whole 60-block model; no weight is made."""
    return tensor_shapes(qwen_image_edit_config())


def parameters(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def test_60_blocks_are_the_published_model(real: Shapes) -> None:
    assert len(real) == 1933
    assert round(parameters(real) / 1e9, 2) == 20.43
    assert max(math.prod(shape) for shape in real.values()) * ITEM == 113_246_208  # 113 MB, img_mod and txt_mod
    assert len(plan_shards(real)) == 9


def test_8_blocks_are_five_and_a_half_gigabytes() -> None:
    shapes = tensor_shapes(qwen_image_edit_config(8))
    assert round(parameters(shapes) * ITEM / 1e9, 1) == 5.5
    assert list(plan_shards(shapes)) == [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    ]


def test_a_lora_has_twelve_targets_a_block(real: Shapes) -> None:
    keys = lora_shapes(real, rank=64)
    assert len(keys) == 60 * 12 * 3
    assert keys["transformer_blocks.59.img_mlp.net.0.proj.lora_down.weight"] == (64, 3072)
    assert keys["transformer_blocks.59.img_mlp.net.0.proj.lora_up.weight"] == (12288, 64)
    assert keys["transformer_blocks.59.img_mlp.net.0.proj.alpha"] == ()


def test_no_shard_passes_the_limit_and_none_is_lost(real: Shapes) -> None:
    shards = plan_shards(real, limit=1_000_000_000)
    assert max(parameters(shard) * ITEM for shard in shards.values()) <= 1_000_000_000
    assert [name for shard in shards.values() for name in shard] == list(real)


@pytest.mark.parametrize("limit", [10_000, 10**9], ids=["sharded", "one file"])
def test_diffusers_loads_every_weight(tmp_path: Path, limit: int) -> None:
    shapes = make_base(tmp_path / "transformer", TINY, Noise(0, length=1009), limit)
    model, info = QwenImageTransformer2DModel.from_pretrained(
        tmp_path / "transformer", torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    loaded: dict[str, Any] = {}
    for file in (tmp_path / "transformer").glob("*.safetensors"):
        loaded |= load_file(file)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == shapes
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, loaded[name])
        assert bool(tensor.isfinite().all())


def test_the_index_names_every_tensor_in_its_own_shard(tmp_path: Path) -> None:
    shapes = make_base(tmp_path / "transformer", TINY, Noise(0, length=1009), limit=10_000)
    index = json.loads((tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == parameters(shapes) * ITEM
    for filename in set(index["weight_map"].values()):
        with safe_open(tmp_path / "transformer" / filename, "pt") as shard:
            assert set(shard.keys()) == {key for key, value in index["weight_map"].items() if value == filename}
    assert set(index["weight_map"]) == set(shapes)


def test_a_lora_holds_its_alpha_and_finite_factors(tmp_path: Path) -> None:
    shapes = tensor_shapes(TINY)
    make_lora(tmp_path / "lora.safetensors", shapes, rank=4, alpha=8.0, noise=Noise(0, length=1009))
    lora = load_file(tmp_path / "lora.safetensors")
    assert set(lora) == set(lora_shapes(shapes, 4))
    assert all(bool(tensor.isfinite().all()) and tensor.dtype == torch.bfloat16 for tensor in lora.values())
    assert {tensor.item() for name, tensor in lora.items() if name.endswith(".alpha")} == {8.0}


def test_noise_is_weight_like_and_goes_on_where_it_stopped() -> None:
    whole = b"".join(Noise(0).take(4_000_000))
    noise = Noise(0)
    assert b"".join(noise.take(1_500_000)) + b"".join(noise.take(2_500_000)) == whole
    values = np.frombuffer(whole, dtype=ml_dtypes.bfloat16).astype(np.float32)
    assert np.isfinite(values).all()
    assert abs(float(values.std()) - Noise.STD) < 1e-4


def test_a_seed_decides_the_bytes(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_base(tmp_path / folder, TINY, Noise(seed, length=1009))
    a, b, c = ((tmp_path / folder / "diffusion_pytorch_model.safetensors").read_bytes() for folder in "abc")
    assert a == b
    assert a != c


def test_an_existing_checkpoint_is_not_written_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "transformer").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--blocks", "1"])
    assert stopped.value.code == 2
    assert "transformer exists" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "transformer"]
