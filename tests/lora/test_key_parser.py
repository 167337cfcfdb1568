"""Laws of LoRA files: every key is consumed or the file is refused, alpha is never lost, PEFT's settings count."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lora_fuse.checkpoint.header import TensorInfo
from lora_fuse.errors import BadLora, ShapeMismatch, UnmatchedTargets, WrongPrefix
from lora_fuse.lora import lora_file
from lora_fuse.lora.lora_file import LoraFile, open_lora
from lora_fuse.lora.matcher import match_targets
from tests.support import tiny


def base_names() -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, "BF16", tensor.shape, 0, 0) for name, tensor in tiny.weights().items()}


def opened(tmp_path: Path, tensors: dict[str, tiny.Array], metadata: dict[str, str] | None = None) -> LoraFile:
    return open_lora(tiny.write_lora(tmp_path / "lora.safetensors", tensors, metadata))


@pytest.mark.parametrize("style", ["lightning", "diffusers", "peft"])
def test_every_style_finds_the_same_targets(tmp_path: Path, style: str) -> None:
    lora = opened(tmp_path, tiny.lora_tensors(style))
    targets = match_targets(lora.deltas, base_names(), "f")
    assert len(targets) == tiny.BLOCKS * len(tiny.LINEARS)
    assert {placed.delta.factor for (placed,) in targets.values()} == {0.5}


def test_alpha_absent_means_alpha_is_rank(tmp_path: Path) -> None:
    assert {update.alpha for update in opened(tmp_path, tiny.lora_tensors(alpha=None)).deltas} == {4.0}


def test_alpha_may_have_one_element_or_no_dimension(tmp_path: Path) -> None:
    tensors = tiny.lora_tensors()
    key = next(key for key in tensors if key.endswith(".alpha"))
    tensors[key] = np.array([3.0], dtype=np.float16)
    assert {update.alpha for update in opened(tmp_path, tensors).deltas} == {2.0, 3.0}


def test_a_peft_folder_gives_its_alpha(tmp_path: Path) -> None:
    tiny.write_lora(tmp_path / "adapter_model.safetensors", tiny.lora_tensors("peft", alpha=None))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6}))
    assert {update.alpha for update in open_lora(tmp_path).deltas} == {6.0}


@pytest.mark.parametrize(
    ("stray", "said"),
    [
        ("x.lora_sideways.weight", r"1 of 19 keys belong to no known format \(first 'x.lora_sideways.weight'\)"),
        ("x.oft_blocks", r"1 of 19 keys belong to no known format \(first 'x.oft_blocks'\); it has OFT or BOFT, which"),
        ("x.a1.weight", "it has GLoRA"),
        ("bundle_emb.my name.clip_l", "it has an embedding beside the LoRA"),
        ("base_model.model.proj_out.weight", "it has whole parameters"),
        ("x.processor.to_q_lora.down.weight", "it has an attention processor's"),
        ("x.hada_w1_a", r"1 of 19 keys have no partner \(first 'x.hada_w1_a'\)"),
        ("x.alpha", r"1 of 19 keys have no partner"),
    ],
)
def test_a_key_that_nothing_takes_is_refused(tmp_path: Path, stray: str, said: str) -> None:
    with pytest.raises(BadLora, match=said):
        opened(tmp_path, {**tiny.lora_tensors(), stray: np.ones((1,), np.float32)})


def test_a_lone_factor_is_refused(tmp_path: Path) -> None:
    tensors = tiny.lora_tensors()
    del tensors["transformer_blocks.0.attn.to_q.lora_up.weight"]
    with pytest.raises(BadLora, match=r"2 of 17 keys have no partner"):
        opened(tmp_path, tensors)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadLora, match="empty"):
        opened(tmp_path, {})


def test_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    (tmp_path / "lora.pt").write_bytes(b"\x80\x04")
    with pytest.raises(BadLora, match="pickle"):
        open_lora(tmp_path / "lora.pt")


def test_a_module_that_the_base_lacks_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    tensors = {key.replace("blocks.1.", "blocks.7."): tensor for key, tensor in tiny.lora_tensors().items()}
    lora = opened(tmp_path, tensors)
    with pytest.raises(
        UnmatchedTargets, match=r"3 of 6 modules .*'transformer_blocks\.7\..*nearest.*'transformer_blocks\.1\."
    ):
        match_targets(lora.deltas, base_names(), "f")


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ("net.unet.", "", "without 'net.unet.' at the beginning of the names: take it off"),
        ("", "model.core.", "with 'model.core.' at the beginning of the names: put it before"),
        ("transformer.", "model.core.", "with 'model.core.' at the beginning of the names: put it before"),
    ],
)
def test_a_lora_whose_only_fault_is_a_prefix_is_told_which(tmp_path: Path, ours: str, theirs: str, said: str) -> None:
    lora = opened(tmp_path, {f"{ours}{key}": tensor for key, tensor in tiny.lora_tensors().items()})
    with pytest.raises(WrongPrefix, match=f"none of 6 modules is in the base as it is named; all are, {said}"):
        match_targets(lora.deltas, {f"{theirs}{name}": tensor for name, tensor in base_names().items()}, "f")


def test_one_weight_named_twice_is_refused(tmp_path: Path) -> None:
    both = {**tiny.lora_tensors(), **tiny.lora_tensors("diffusers")}
    with pytest.raises(BadLora, match="both mean"):
        match_targets(opened(tmp_path, both).deltas, base_names(), "f")


def test_factors_that_do_not_fit_are_refused_with_both_shapes(tmp_path: Path) -> None:
    key = "transformer_blocks.0.attn.to_q"
    tensors = {**tiny.lora_tensors(), f"{key}.lora_up.weight": np.ones((25, 4), np.float32)}
    lora = opened(tmp_path, tensors)
    with pytest.raises(ShapeMismatch, match=r"25x16 .* is 24x16"):
        match_targets(lora.deltas, base_names(), "f")
    tensors[f"{key}.lora_up.weight"] = np.ones((24, 3), np.float32)
    with pytest.raises(ShapeMismatch, match=r"do not fit: down \[4, 16\], up \[24, 3\]"):
        opened(tmp_path, tensors)


@pytest.mark.parametrize("style", ["lora", "hada"])
def test_a_rank_that_is_of_no_use_is_refused_with_both_sizes(tmp_path: Path, style: str) -> None:
    """By its shapes alone: the factors of such a file may be larger than the memory."""
    down, up = np.zeros((1025, 3), np.float16), np.zeros((2, 1025), np.float16)
    keys = {"lora": {"lora_down.weight": down, "lora_up.weight": up}}
    keys["hada"] = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down}
    with pytest.raises(BadLora, match=r"'x' has rank 1025 for a delta of 2x3, and no more than 1024 is of use"):
        opened(tmp_path, {f"x.{key}": tensor for key, tensor in keys[style].items()})
    wide = np.zeros((2, 1024), np.float16)
    assert opened(tmp_path, {"x.lora_down.weight": down[:1024], "x.lora_up.weight": wide}).deltas[0].rank == 1024


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0)])
def test_a_weight_without_rows_or_columns_is_no_target(tmp_path: Path, shape: tuple[int, ...]) -> None:
    lora = opened(tmp_path, {"x.diff": np.zeros(shape or (1,), np.float32)})
    base = {"x.weight": TensorInfo("x.weight", "F32", shape, 0, 0)}
    with pytest.raises(ShapeMismatch, match=r"f: 'x' is for the base's 'x\.weight', of the shape \["):
        match_targets(lora.deltas, base, "f")


def test_a_file_larger_than_any_lora_is_refused_unread(tmp_path: Path) -> None:
    """A hole of a disk: such a file is there in a moment, and read in hours."""
    header = json.dumps({"x.diff": {"dtype": "U8", "shape": [1 << 39, 1], "data_offsets": [0, 1 << 39]}}).encode()
    with (tmp_path / "l.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 39))
    with pytest.raises(BadLora, match=r"has 5497558139\d\d bytes, and at most 274877906944 are read"):
        open_lora(tmp_path / "l.safetensors")


def test_nan_is_found_in_any_block_of_a_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_file, "BLOCK", 64)
    for at in (0, 15, 16, 79):
        bad = np.zeros((80, 1), np.float32)
        bad[at] = np.nan
        with pytest.raises(BadLora, match=r"'x\.diff' holds NaN"):
            opened(tmp_path, {"x.diff": bad})
    opened(tmp_path, {"x.diff": np.zeros((80, 1), np.float32)})


def test_an_alpha_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = tiny.lora_tensors(alpha=float("nan"))
    with pytest.raises(BadLora, match=r"alpha .* nan"):
        opened(tmp_path, tensors)


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"alpha_pattern": {"attn.to_q": 12}}])
def test_a_peft_configuration_scales_as_peft_does(tmp_path: Path, extra: dict[str, object]) -> None:
    folder = tmp_path / "peft"
    tiny.write_lora(folder / "adapter_model.safetensors", tiny.lora_tensors("peft", alpha=None))
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, **extra}))
    factors = {
        u.module.removeprefix("base_model.model.transformer_blocks.0."): u.factor for u in open_lora(folder).deltas
    }
    usual = 6 / 2 if extra.get("use_rslora") else 6 / 4
    assert factors["img_mlp.net.0.proj"] == usual
    assert factors["attn.to_q"] == (3.0 if "alpha_pattern" in extra else usual)


def test_a_rank_that_the_configuration_denies_is_refused(tmp_path: Path) -> None:
    tiny.write_lora(tmp_path / "adapter_model.safetensors", tiny.lora_tensors("peft", alpha=None))
    config: dict[str, object] = {"r": 8, "lora_alpha": 6}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ShapeMismatch, match=r"have rank 4, and .* says 8"):
        open_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"attn.to_q|to_out.0|proj": 4}}))
    assert {update.rank for update in open_lora(tmp_path).deltas} == {4}


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"[" * 100_000, b"7", b'{"r": "x"}', b'{"r": Infinity}'],
    ids=["binary", "deep", "7", "text", "infinite"],
)
def test_a_broken_peft_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    tiny.write_lora(tmp_path / "adapter_model.safetensors", tiny.lora_tensors("peft", alpha=None))
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(BadLora, match=r"adapter_config\.json (is not a PEFT configuration|cannot be read): "):
        open_lora(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_what_is_no_file_of_a_peft_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    weights = tiny.write_lora(folder / "adapter_model.safetensors", tiny.lora_tensors("peft", alpha=None))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 2}')
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadLora, match=f"adapter/{name} cannot be read: a link leads to .*elsewhere, out of"):
        open_lora(folder)
    assert open_lora(weights).deltas  # a file that is named itself may be a link
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for given in (folder, weights):
        with pytest.raises(BadLora, match="it is a named pipe, not a regular file"):
            open_lora(given)
