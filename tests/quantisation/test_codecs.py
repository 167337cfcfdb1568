"""Laws of the formats: codes are those of the libraries that readers use, values come back within a format's step."""

import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers.quantizers.bfl import utils as diffusers_fp8
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fuse.checkpoint import dtypes
from lora_fuse.errors import Unquantisable
from lora_fuse.quantisation import FORMATS, Fp8Options, decode
from lora_fuse.quantisation.swizzle import swizzled, unswizzled
from tests.support.matrices import SHAPE, Float32s, matrix

# What comfy-kitchen 0.2.40 makes of `matrix(...)`, by its eager code on float32: printed by
# `python -m benchmarks.kitchen_codes`, which needs it.
KITCHEN = json.loads((Path(__file__).parent / "kitchen_codes.json").read_text())


def encoded(name: str, values: Float32s, options: Fp8Options | None = None) -> dict[str, npt.NDArray[np.generic]]:
    return FORMATS[name].encode(values, options or Fp8Options())


def octets(array: npt.NDArray[np.generic]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [SHAPE, (40, 1024)])
def test_what_is_stored_has_the_layout_that_was_said_before(name: str, shape: tuple[int, int]) -> None:
    stored = encoded(name, matrix(shape=shape))
    said = {
        suffix: (dtypes.DTYPES[dtype].numpy, place) for suffix, (dtype, place) in FORMATS[name].layout(shape).items()
    }
    assert {suffix: (array.dtype, array.shape) for suffix, array in stored.items()} == said


@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("name", ["fp8_scaled", "mxfp8", "nvfp4", "int8_convrot"])
def test_codes_are_comfy_kitchen_s(name: str, kind: str) -> None:
    """But for what lies on the boundary between two: int8's rotation is summed in another order there."""
    stored = encoded(name, matrix(kind))
    theirs = KITCHEN[f"{name} {kind}"]
    if name == "int8_convrot":
        codes = np.frombuffer(bytes.fromhex(theirs["first rows"]), np.int8).reshape(2, -1)
        assert np.count_nonzero(codes != stored["weight"][:2]) <= 2
        np.testing.assert_allclose(stored["weight_scale"].astype(np.float32).ravel(), theirs["weight_scale"], rtol=1e-6)
        return
    assert {suffix: sha256(octets(stored[suffix])).hexdigest() for suffix in theirs} == theirs


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_q8_0_is_gguf_py_s_both_ways(kind: str) -> None:
    values = matrix(kind)
    blocks = encoded("q8_0", values)["weight"]
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(blocks, theirs)
    back = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(FORMATS["q8_0"].decode({"weight": blocks}, SHAPE), back)


def test_fp8_by_rows_is_diffusers_both_ways() -> None:
    values = matrix("outliers")
    stored = encoded("fp8_rows", values)
    codes, scales = diffusers_fp8.quantize_fp8r(torch.from_numpy(values))
    np.testing.assert_array_equal(stored["weight"].view(np.uint8), codes.view(torch.uint8).numpy())
    np.testing.assert_array_equal(stored["weight_scale"], scales.numpy())
    np.testing.assert_array_equal(decode(stored), diffusers_fp8.dequantize_fp8r(codes, scales).numpy())


# The largest error of a value, in units of the largest of its matrix, row or block, of itself, and of nothing.
STEPS = {"int8_convrot": 0.51 / 127, "q8_0": 0.501 / 127, "fp8_scaled": 2.0**-4, "fp8_rows": 2.0**-4, "mxfp8": 2.0**-4}


@pytest.mark.parametrize("name", STEPS)
@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([4, 64, 256, 512]), st.integers(-8, 12), st.booleans()
)
def test_a_value_comes_back_within_half_a_step(
    name: str, seed: int, rows: int, columns: int, exponent: int, outliers: bool
) -> None:
    """Of int8 a row's error is bounded as a whole: the rotation back spreads each."""
    if name == "q8_0" and columns < 32:
        columns = 32
    values = matrix("outliers" if outliers else "normal", (rows, columns), seed) * np.float32(2.0**exponent)
    back = FORMATS[name].decode(encoded(name, values), values.shape)
    error = np.abs(back - values)
    if name == "int8_convrot":
        norms = np.sqrt((error.astype(np.float64) ** 2).sum(1))
        largest = STEPS[name] * np.sqrt(columns) * np.sqrt((values.astype(np.float64) ** 2).sum(1))
        assert (norms <= largest).all()
    elif name == "q8_0":
        blocks = np.abs(values).reshape(rows, -1, 32).max(-1, keepdims=True)
        assert (error.reshape(rows, -1, 32) <= STEPS[name] * blocks * 1.13 + 127 * 2.0**-25).all()
    else:
        top = np.abs(values).max() if name != "fp8_rows" else np.abs(values).max(1, keepdims=True)
        assert (error <= np.maximum(STEPS[name] * np.abs(values) * 1.001, top * 2.0**-17)).all()


def test_nvfp4_comes_back_within_a_sixth_of_its_block() -> None:
    values = matrix("outliers")
    back = FORMATS["nvfp4"].decode(encoded("nvfp4", values), SHAPE)
    blocks = np.abs(values).reshape(len(values), -1, 16).max(-1, keepdims=True)
    assert (np.abs(back - values).reshape(len(values), -1, 16) <= blocks * (1.07 / 6)).all()


def test_a_padded_matrix_comes_back_in_its_own_shape() -> None:
    values = matrix(shape=(20, 40))
    for name in ("mxfp8", "nvfp4"):
        stored = encoded(name, values)
        assert stored["weight"].shape[0] == 32
        assert FORMATS[name].decode(stored, (20, 40)).shape == (20, 40)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_do_not_depend_on_threads(name: str, seed: int | None) -> None:
    values = matrix("outliers")
    options = Fp8Options(seed=seed)
    alone = {suffix: octets(array) for suffix, array in encoded(name, values, options).items()}
    with ThreadPoolExecutor(4) as threads:
        for stored in threads.map(lambda _: encoded(name, values, options), range(8)):
            assert {suffix: octets(array) for suffix, array in stored.items()} == alone


def test_rounding_by_chance_is_right_on_average_and_a_seed_s_own() -> None:
    """Of a value that lies a quarter of the way from one code to the next, a quarter is rounded up."""
    values = np.full((64, 1024), 1 + 0.125 / 4, np.float32)
    values[:, 0] = 448  # a scale of 1
    one, two = (decode(encoded("fp8_scaled", values, Fp8Options(seed=seed)))[:, 1:] for seed in (1, 2))
    assert set(np.unique(one)) == {1.0, 1.125}
    assert abs((one > 1).mean() - 0.25) < 0.01
    assert 0.3 < ((one > 1) != (two > 1)).mean() < 0.45  # 2 * 1/4 * 3/4, as of two that know nothing of each other
    small = np.full((64, 1024), 2.0**-9 / 4, np.float32)
    small[:, 0] = 448
    assert abs((decode(encoded("fp8_scaled", small, Fp8Options(seed=1)))[:, 1:] > 0).mean() - 0.25) < 0.01


def test_a_scale_of_a_matrix_is_a_power_of_two_that_holds_its_largest() -> None:
    for top in (448.0, 448.001, 1e-3, 3.0):
        values = np.full((2, 4), top, np.float32)
        scale = float(encoded("fp8_scaled", values)["weight_scale"])
        assert np.log2(scale) % 1 == 0
        assert top / 448 <= scale < top / 224
    other = encoded("fp8_scaled", np.full((2, 4), 3, np.float32), Fp8Options(power_of_two=False))["weight_scale"]
    assert other == np.float32(3) / np.float32(448)


def test_scales_in_tiles_come_back() -> None:
    scales = np.random.default_rng(3).integers(0, 256, (200, 9)).astype(np.uint8)
    tiles = swizzled(scales)
    assert tiles.shape == (256, 12)
    assert tiles.reshape(-1)[(33 % 32) * 16 + (33 // 32) * 4 + 2] == scales[33, 2]
    np.testing.assert_array_equal(unswizzled(tiles, 200, 9), scales)


def bad(kind: str) -> Float32s:
    values = matrix()
    if kind == "zero":
        values[7] = 0
    elif kind == "three":
        values = values[:, :3]
    else:
        values[7, 9] = float(kind)
    return values


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "zero"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_weight_is_refused_with_its_row(name: str, kind: str) -> None:
    with pytest.raises(Unquantisable, match=r"row 7 .*\(1 of 48 rows\)"):
        encoded(name, bad(kind))


@pytest.mark.parametrize("name", ["int8_convrot", "q8_0"])
def test_a_shape_that_no_group_divides_is_refused_before_there_are_values(name: str) -> None:
    with pytest.raises(Unquantisable, match="3 columns"):
        FORMATS[name].layout((48, 3))
    with pytest.raises(Unquantisable, match="3 columns"):
        encoded(name, bad("three"))


def test_a_value_that_a_scale_cannot_hold_is_refused() -> None:
    with pytest.raises(Unquantisable, match="float16"):
        encoded("q8_0", matrix() * np.float32(1e9))
    with pytest.raises(Unquantisable, match="rotated"):
        encoded("int8_convrot", np.full((4, 256), 3e38, np.float32))


def mark(**settings: object) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(settings).encode(), np.uint8)


def test_what_does_not_belong_together_is_refused() -> None:
    codes = np.zeros((4, 32), np.int8)
    scale = np.ones((4, 1), np.float32)
    cases: list[tuple[dict[str, npt.NDArray[Any]], str | None]] = [
        ({"weight": codes}, "no scale"),
        ({"weight": codes, "weight_scale": scale}, None),
        ({"weight": codes, "weight_scale": np.ones(3, np.float32)}, "3 scales for 4 rows"),
        ({"weight": codes, "weight_scale": scale, "comfy_quant": mark(format="int3")}, "'int3'"),
        ({"weight": codes, "weight_scale": scale, "comfy_quant": np.frombuffer(b"{", np.uint8)}, "no JSON"),
        (
            {
                "weight": codes,
                "weight_scale": scale,
                "comfy_quant": mark(format="int8_tensorwise", params={"convrot": True, "convrot_groupsize": 24}),
            },
            "groups of 24",
        ),
    ]
    for stored, message in cases:
        if message is None:
            assert decode(stored).shape == (4, 32)
            continue
        with pytest.raises(Unquantisable, match=message):
            decode(stored)
    assert decode({"weight": np.ones((2, 4), ml_dtypes.float8_e5m2)}).sum() == 8  # plain fp8 has no scale
