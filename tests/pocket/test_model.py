"""The embedded model: its files are what its makers write, and what the pipelines expect."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_fuse.lora.lora_file import open_lora
from lora_fuse.pictures.render import Pipeline, load_pipeline, shared_components
from pocket import LORA_TARGETS, LORAS, POCKET, scenes
from pocket.train import loras, model
from pocket.train.export import without_versions

TRANSFORMER = POCKET / "model/transformer"
BLOCKS = 5


@pytest.fixture(scope="module")
def edit() -> Pipeline:
    return load_pipeline(POCKET / "model", "QwenImageEditPipeline", dtype="float32")


def test_what_is_not_trained_is_what_the_code_writes(tmp_path: Path) -> None:
    """Tokenizer, text encoder, processor, scheduler and index: the same bytes on every machine."""
    model.save_frame(tmp_path)
    without_versions(tmp_path)
    written = {path.relative_to(tmp_path): digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(written) >= 10
    assert written == {name: digest(POCKET / "model" / name) for name in written}
    trained = {path.relative_to(POCKET / "model") for path in (POCKET / "model").rglob("*") if path.is_file()}
    assert {name.parts[0] for name in trained - set(written)} == {"README.md", "transformer", "vae"}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", scenes.INPUTS)
def test_the_drawn_inputs_are_what_the_code_draws(name: str, tmp_path: Path) -> None:
    scenes.draw_inputs(tmp_path)
    with Image.open(tmp_path / name) as drawn, Image.open(POCKET / "inputs" / name) as kept:
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(kept))


def test_values_depend_on_the_name_alone() -> None:
    """These very values: a change of them is a change of every weight of the text encoder."""
    expected = torch.tensor([0.12, 0.8579, -1.5827])
    assert torch.allclose(model.uniform("a", (3,), 1.0), expected, atol=1e-4)
    assert not torch.equal(model.uniform("a", (3,), 1.0), model.uniform("b", (3,), 1.0))


def test_files_name_no_version_and_no_path() -> None:
    for path in (POCKET / "model").rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "_version" not in text, path
        assert "_name_or_path" not in text, path


def test_it_is_at_most_ten_megabytes() -> None:
    files = [path for part in ("model", "lora") for path in (POCKET / part).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000


def test_the_transformer_is_two_float16_shards_and_their_index_is_complete() -> None:
    index = json.loads((TRANSFORMER / "diffusion_pytorch_model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) == 2
    for shard in set(index["weight_map"].values()):
        tensors = load_file(TRANSFORMER / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(tensors)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("name", ["QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_the_tokenizer_splits_each_system_prefix_as_the_pipeline_expects(name: str, edit: Pipeline) -> None:
    pipe = load_pipeline(POCKET / "model", name, dtype="float32", shared=shared_components(edit))
    prefix = pipe.prompt_template_encode.partition("user\n")
    tokens = pipe.tokenizer(prefix[0] + prefix[1])["input_ids"]
    assert len(tokens) == pipe.prompt_template_encode_start_idx


@pytest.mark.parametrize("text", ["Change the rabbit's color to purple", "naïve 日本 \u00a0\t x=1\r\n"])
def test_the_tokenizer_gives_back_any_text(text: str, edit: Pipeline) -> None:
    assert edit.tokenizer.decode(edit.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_key_of_a_lightning_lora_belongs_to_a_target_and_alpha_is_half_the_rank(
    version: str, edit: Pipeline
) -> None:
    state, weights = load_file(POCKET / "lora" / LORAS[version]), dict(edit.transformer.named_parameters())
    names = [f"transformer_blocks.{block}.{target}" for block in range(BLOCKS) for target in LORA_TARGETS]
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(state) == {f"{name}.{part}" for name in names for part in parts}
    for name in names:
        down, up, alpha = (state[f"{name}.{part}"] for part in parts)
        rows, columns = weights[f"{name}.weight"].shape
        assert (tuple(down.shape), tuple(up.shape), alpha.item()) == ((8, columns), (rows, 8), 4.0)
        assert {down.dtype, up.dtype, alpha.dtype} == {torch.bfloat16}


def test_the_style_lora_has_the_keys_and_the_scaling_of_diffusers() -> None:
    lora = open_lora(POCKET / "lora" / LORAS["pastel"])
    names = {
        f"transformer.transformer_blocks.{block}.{target}" for block in range(BLOCKS) for target in loras.STYLE_TARGETS
    }
    assert {update.module for update in lora.deltas} == names
    assert {(update.rank, update.alpha) for update in lora.deltas} == {(4, 8.0)}
    assert all(update.keys["down"].endswith(".lora_A.weight") for update in lora.deltas)


def test_only_the_targets_that_nobody_reads_have_no_delta() -> None:
    """The last block's text output goes nowhere, so its text side is never trained."""
    state = load_file(POCKET / "lora" / LORAS["v2"])
    still = {
        key.removesuffix(".lora_up.weight") for key, value in state.items() if "lora_up" in key and not value.any()
    }
    unread = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    assert still == {f"transformer_blocks.{BLOCKS - 1}.{target}" for target in unread}


def test_the_second_version_is_another_one() -> None:
    first, second = (load_file(POCKET / "lora" / LORAS[version]) for version in ("v1", "v2"))
    assert first.keys() == second.keys()
    assert sum(not torch.equal(first[key], second[key]) for key in first) > len(first) / 2
