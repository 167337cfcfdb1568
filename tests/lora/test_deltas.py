"""Laws of the updates: every algorithm is its formula, every way to write one gives the same bytes."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lora_fuse.errors import BadLora
from lora_fuse.lora.key_formats import FLAT_PREFIXES, FORMATS, PREFIXES, component_of
from tests.support import tiny
from tests.support.key_styles import ALGORITHMS, STYLES, Tensors, X, convolutions, merged, restyled, same, update_of


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_its_formula(tmp_path: Path, name: str, dtype: type, scale: float) -> None:
    target, parts, formula = update_of(name)
    base: Tensors = {key: tensor.astype(dtype) for key, tensor in convolutions().items()}
    module = target.rpartition(".")[0]
    ours = merged(tmp_path, {f"{module}.{end}": np.asarray(part) for end, part in parts.items()}, scale, base)
    wide = {end: np.asarray(part).astype(np.float64) for end, part in parts.items()}
    expected = formula(wide, base[target].astype(np.float64), scale)
    unit = float(ml_dtypes.finfo(dtype).eps) / 2
    np.testing.assert_allclose(ours[target].astype(np.float64), expected, rtol=unit * 1.001, atol=1e-7)
    changed = {key for key in base if ours[key].tobytes() != base[key].tobytes()}
    assert changed == ({target} if name != "lora_B.bias" else {f"{X}.weight", target})


def test_the_styles_cover_every_format_and_prefix() -> None:
    loras = {row.name for row in FORMATS if row.algorithm == "LoRA"}
    assert loras == {format_of(style) for style in STYLES}
    starts = {down.partition("{")[0] for down, _ in STYLES.values()}
    assert starts == {prefix for prefix in (*PREFIXES, *FLAT_PREFIXES) if component_of(prefix) is None}


def format_of(style: str) -> str:
    from lora_fuse.lora.key_formats import read_key

    read = read_key(STYLES[style][0].replace("{_}", "x").replace("{}", "x"))
    assert read is not None
    assert read[1] is not None
    return read[1].name


@pytest.mark.parametrize("alpha", [None, 2.0], ids=["no alpha", "alpha"])
@pytest.mark.parametrize("style", STYLES)
def test_every_key_style_merges_to_the_same_bytes(tmp_path: Path, style: str, alpha: float | None) -> None:
    ours = merged(tmp_path / "a", restyled(style, alpha))
    assert same(ours, merged(tmp_path / "b", tiny.lora_tensors(alpha=alpha)))
    assert not same(ours, tiny.weights())


def test_a_flattened_name_that_two_modules_share_is_refused(tmp_path: Path) -> None:
    base = tiny.weights() | {"transformer_blocks.0.attn_to.q.weight": np.zeros((24, 16), tiny.BF16)}
    with pytest.raises(
        BadLora, match=r"could mean 'transformer_blocks\.0\.attn\.to_q' or 'transformer_blocks\.0\.attn_to\.q'"
    ):
        merged(tmp_path, restyled("kohya", None), base=base)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    both = restyled("named adapter", None) | restyled("diffsynth, transformer", None)
    with pytest.raises(BadLora, match="one adapter only"):
        merged(tmp_path, both)
