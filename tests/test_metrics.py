"""Laws of the metrics, on arrays small enough to check by hand and on random ones."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from lora_fuse.metrics import (
    METRICS,
    Levels,
    amplified_difference,
    changed_share,
    is_finite,
    is_flat,
    max_abs,
    mean_abs,
    psnr_db,
    to_levels,
    to_png,
)


def plain(level: int, height: int = 4, width: int = 6) -> Levels:
    return np.full((height, width, 3), level, dtype=np.uint8)


shapes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3))
pairs = shapes.flatmap(lambda shape: st.tuples(arrays.arrays(np.uint8, shape), arrays.arrays(np.uint8, shape)))


@given(pairs)
def test_every_metric_is_symmetric(pair: tuple[Levels, Levels]) -> None:
    a, b = pair
    for metric in METRICS.values():
        assert metric.measure(a, b) == metric.measure(b, a)


@given(pairs)
def test_identical_pictures_get_the_best_value_and_no_others_do(pair: tuple[Levels, Levels]) -> None:
    a, b = pair
    for metric in METRICS.values():
        best = math.inf if metric.higher_is_nearer else 0
        assert metric.measure(a, a.copy()) == best
        assert (metric.measure(a, b) == best) == bool((a == b).all())


@given(pairs)
def test_the_metrics_bound_each_other(pair: tuple[Levels, Levels]) -> None:
    a, b = pair
    assert mean_abs(a, b) <= max_abs(a, b) <= 255
    assert mean_abs(a, b) <= max_abs(a, b) * changed_share(a, b) + 1e-9
    if max_abs(a, b):
        assert psnr_db(a, b) >= 20 * math.log10(255 / max_abs(a, b)) - 1e-9


def test_psnr_of_a_uniform_difference_is_that_of_the_formula() -> None:
    assert psnr_db(plain(100), plain(110)) == pytest.approx(20 * math.log10(25.5))
    assert psnr_db(plain(0), plain(255)) == 0


def test_differences_do_not_wrap_around() -> None:
    assert max_abs(plain(0), plain(255)) == 255
    assert mean_abs(plain(255), plain(0)) == 255


def test_one_channel_of_one_pixel_is_one_changed_pixel() -> None:
    changed = plain(10)
    changed[1, 2, 0] = 13
    assert changed_share(plain(10), changed) == 1 / 24
    assert max_abs(plain(10), changed) == 3
    assert mean_abs(plain(10), changed) == 3 / 72


@pytest.mark.parametrize("metric", METRICS)
def test_pictures_of_different_sizes_are_refused_with_both_sizes(metric: str) -> None:
    with pytest.raises(ValueError, match="6x4 and 4x6"):
        METRICS[metric].measure(plain(0, 4, 6), plain(0, 6, 4))


@pytest.mark.parametrize(
    "other",
    [np.zeros((4, 6, 3), np.float32), np.zeros((4, 6), np.uint8), np.zeros((4, 6, 4), np.uint8), plain(0, 0, 6)],
    ids=["float", "grey", "alpha", "empty"],
)
def test_what_is_no_picture_is_refused(other: Levels) -> None:
    with pytest.raises(ValueError, match=r"a picture is uint8 \(height, width, 3\)"):
        psnr_db(other, other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_enough(value: float) -> None:
    values = np.zeros((4, 4))
    assert is_finite(values)
    values[2, 3] = value
    assert not is_finite(values)


def test_a_single_colour_is_flat_also_when_its_channels_differ_and_with_faint_noise() -> None:
    colour = plain(0, 32, 32) + np.array([90, 20, 200], dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 5, colour.shape, dtype=np.uint8)
    assert is_flat(colour)
    assert is_flat(colour + noise)


def test_contrast_in_one_channel_is_not_flat() -> None:
    picture = plain(100)
    picture[:2, :, 1] = 120
    assert not is_flat(picture)


def test_the_amplified_difference_is_cut_off_at_white() -> None:
    assert (amplified_difference(plain(10), plain(13), 16) == 48).all()
    assert (amplified_difference(plain(10), plain(200), 16) == 255).all()


def test_a_png_keeps_every_level_and_the_same_levels_give_the_same_bytes() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (to_levels(Image.open(io.BytesIO(to_png(picture)))) == picture).all()
    assert to_png(picture) == to_png(picture.copy())
