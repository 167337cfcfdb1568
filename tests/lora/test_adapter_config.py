"""Laws of a LoRA's configuration: it scales as PEFT does, and is refused where the file denies it."""

import json
from pathlib import Path

import pytest

from lora_fuse.errors import BadLora, ShapeMismatch
from lora_fuse.lora.lora_file import open_lora
from tests.support import tiny
from tests.support.key_styles import merged, same


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
    "content", [b"\xff\xfe", b"[" * 100_000, b"7", b'{"r": "x"}'], ids=["binary", "deep", "7", "text"]
)
def test_a_broken_peft_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    tiny.write_lora(tmp_path / "adapter_model.safetensors", tiny.lora_tensors("peft", alpha=None))
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(BadLora, match=r"adapter_config\.json (is not a PEFT configuration|cannot be read): "):
        open_lora(tmp_path)


def test_an_alpha_in_the_file_is_not_multiplied_by_the_headers(tmp_path: Path) -> None:
    plain = merged(tmp_path / "a", tiny.lora_tensors(alpha=2.0))
    header = json.dumps({"transformer.lora_alpha": 12, "transformer.r": 4})
    assert same(plain, merged(tmp_path / "b", tiny.lora_tensors(alpha=2.0), lora_adapter_metadata=header))
    assert not same(plain, merged(tmp_path / "c", tiny.lora_tensors(alpha=None), lora_adapter_metadata=header))
