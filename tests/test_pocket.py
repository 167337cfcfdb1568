"""The embedded model is what its builder writes, and what the pipelines expect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_fuse.render import PICTURES, Pipeline, load_pipeline, shared_components
from pocket import build
from pocket.weights import uniform

POCKET = Path(build.__file__).parent
TRANSFORMER = POCKET / "model/transformer"


@pytest.fixture(scope="module")
def edit() -> Pipeline:
    return load_pipeline(POCKET / "model", "QwenImageEditPipeline", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pocket")
    build.build(folder)
    return folder


def test_a_rebuild_gives_the_committed_files(rebuilt: Path) -> None:
    assert build.first_difference(rebuilt, POCKET) is None


def test_check_accepts_what_build_wrote_and_writes_nothing(rebuilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(rebuilt.rglob("*"))
    assert build.main(["--check", str(rebuilt)]) == 0
    assert sorted(rebuilt.rglob("*")) == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["model/vae/config.json", "lora/pocket-lightning-4steps.safetensors"])
def test_a_flipped_byte_is_named(name: str, rebuilt: Path, tmp_path: Path) -> None:
    shutil.copytree(rebuilt, tmp_path, dirs_exist_ok=True)
    content = bytearray((tmp_path / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / name).write_bytes(content)
    assert build.first_difference(rebuilt, tmp_path) == name


def test_a_missing_file_and_one_too_many_are_named(rebuilt: Path, tmp_path: Path) -> None:
    shutil.copytree(rebuilt, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model/model_index.json").unlink()
    assert build.first_difference(rebuilt, tmp_path) == "model/model_index.json"
    assert build.first_difference(tmp_path, rebuilt) == "model/model_index.json"


def test_a_pixel_drawn_otherwise_is_named(rebuilt: Path, tmp_path: Path) -> None:
    shutil.copytree(rebuilt, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "inputs/hat.png", tmp_path / "inputs/rabbit.png")
    assert build.first_difference(rebuilt, tmp_path) == "inputs/rabbit.png"


def test_values_depend_on_the_name_alone() -> None:
    """These very values: a change of them is a change of every weight."""
    expected = torch.tensor([0.12, 0.8579, -1.5827])
    assert torch.allclose(uniform("a", (3,), 1.0), expected, atol=1e-4)
    assert not torch.equal(uniform("a", (3,), 1.0), uniform("b", (3,), 1.0))


def test_files_name_no_version_and_no_path(rebuilt: Path) -> None:
    for path in (POCKET / "model").rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "_version" not in text, path
        assert "_name_or_path" not in text, path
        assert str(rebuilt) not in text, path


def test_it_is_small() -> None:
    files = [path for part in ("model", "lora", "inputs") for path in (POCKET / part).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000


def test_the_transformer_is_two_bfloat16_shards_and_their_index_is_complete() -> None:
    index = json.loads((TRANSFORMER / "diffusion_pytorch_model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) == 2
    for shard in set(index["weight_map"].values()):
        tensors = load_file(TRANSFORMER / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(tensors)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", PICTURES)
def test_the_tokenizer_splits_each_system_prefix_as_the_pipeline_expects(name: str, edit: Pipeline) -> None:
    pipe = load_pipeline(POCKET / "model", name, device="cpu", dtype="float32", shared=shared_components(edit))
    prefix = pipe.prompt_template_encode.partition("user\n")
    tokens = pipe.tokenizer(prefix[0] + prefix[1])["input_ids"]
    assert len(tokens) == pipe.prompt_template_encode_start_idx


@pytest.mark.parametrize("text", ["Change the rabbit's color to purple", "naïve 日本 \u00a0\t x=1\r\n"])
def test_the_tokenizer_gives_back_any_text(text: str, edit: Pipeline) -> None:
    assert edit.tokenizer.decode(edit.tokenizer(text)["input_ids"]) == text


def test_every_lora_key_belongs_to_one_of_the_twelve_targets_of_a_block(edit: Pipeline) -> None:
    state = load_file(POCKET / build.LORA)
    linears = {
        name: module
        for name, module in edit.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks.") and "_mod." not in name
    }
    assert len(linears) == 24
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(state) == {f"{name}.{part}" for name in linears for part in parts}
    for name, module in linears.items():
        rows, columns = module.weight.shape
        assert state[f"{name}.lora_down.weight"].shape == (8, columns)
        assert state[f"{name}.lora_up.weight"].shape == (rows, 8)
        assert state[f"{name}.alpha"].item() == 4.0


def test_the_lora_is_about_as_large_as_the_weights(edit: Pipeline) -> None:
    state, weights = load_file(POCKET / build.LORA), dict(edit.transformer.named_parameters())
    for name in (key.removesuffix(".alpha") for key in state if key.endswith(".alpha")):
        delta = 4.0 / 8 * state[f"{name}.lora_up.weight"] @ state[f"{name}.lora_down.weight"]
        ratio = delta.norm() / weights[f"{name}.weight"].norm()
        assert 0.7 < ratio < 1.4, name
