"""Laws of keep-lists: every line means a layer that there is, and has a source."""

from pathlib import Path

import pytest

from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.errors import BadConfig
from lora_fuse.models import kept_layers
from lora_fuse.models.keep import keep_list

ROOT = Path(__file__).resolve().parents[2]
KIND = "QwenImageTransformer2DModel"
TENSORS = open_checkpoint(ROOT / "pocket/model", "transformer").tensors()
MODULES = [name.removesuffix(".weight") for name, tensor in TENSORS.items() if len(tensor.shape) == 2]


def test_every_pattern_means_a_layer_of_the_class() -> None:
    """Pocket has the real names."""
    assert keep_list(KIND)
    for row in keep_list(KIND):
        for pattern in row.patterns:
            assert kept_layers("another", MODULES, [pattern], coarse=True), pattern
        assert row.source


def test_what_is_left_are_the_linears_of_the_blocks_without_modulation() -> None:
    fine = set(MODULES) - kept_layers(KIND, MODULES, coarse=False)
    coarse = set(MODULES) - kept_layers(KIND, MODULES, coarse=True)
    attention = {f"to_{name}" for name in ("q", "k", "v", "add_out", "out.0")} | {f"add_{name}_proj" for name in "qkv"}
    linears = {f"attn.{name}" for name in attention}
    linears |= {f"{stream}_mlp.net.{name}" for stream in ("img", "txt") for name in ("0.proj", "2")}
    assert fine == {f"transformer_blocks.{block}.{name}" for block in range(5) for name in linears}
    assert (len(fine), fine - coarse) == (60, {f"transformer_blocks.{block}.img_mlp.net.2" for block in range(5)})


def test_a_pattern_of_a_user_adds_and_one_that_means_nothing_is_refused() -> None:
    kept = kept_layers(KIND, MODULES, ["transformer_blocks.4.*"], coarse=False)
    assert {name for name in MODULES if name.startswith("transformer_blocks.4.")} <= kept
    with pytest.raises(BadConfig, match=r"'transformer_blocks\.60\.\*' matches none of the 76 layers"):
        kept_layers(KIND, MODULES, ["transformer_blocks.60.*"], coarse=False)
