"""Laws of the metrics, on arrays small enough to check by hand and on random ones."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageFilter

from lora_fuse.pictures import encode
from lora_fuse.pictures.metrics import (
    HEAT_TOP,
    METRICS,
    changed_share,
    distances,
    heat_map,
    latents_l2,
    max_abs,
    mean_abs,
    psnr_db,
    ssimulacra2,
)
from lora_fuse.pictures.picture import Latents, Levels, Picture, levels_of

PHOTOGRAPH = Path(__file__).parents[2] / "inputs/pictures/astronaut.png"


def plain(level: int, height: int = 4, width: int = 6) -> Levels:
    return np.full((height, width, 3), level, dtype=np.uint8)


OF_PIXELS = ("psnr_db", "max_abs", "mean_abs", "changed_share")  # of pictures of any size
OF_EYES = {"ssim": 1.0, "ssimulacra2": 100.0, "flip": 0.0, "flip_worst": 0.0, "comb_db": 0.0}  # and their best values

shapes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3))
pairs = shapes.flatmap(lambda shape: st.tuples(arrays.arrays(np.uint8, shape), arrays.arrays(np.uint8, shape)))


@given(pairs)
def test_every_metric_is_symmetric(pair: tuple[Levels, Levels]) -> None:
    a, b = pair
    for name in OF_PIXELS:
        assert METRICS[name].measure(a, b) == METRICS[name].measure(b, a)


@given(pairs)
def test_identical_pictures_get_the_best_value_and_no_others_do(pair: tuple[Levels, Levels]) -> None:
    a, b = pair
    for metric in (METRICS[name] for name in OF_PIXELS):
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


def photograph(size: int = 128) -> Image.Image:
    return Image.open("pocket/inputs/chelsea.png").convert("RGB").resize((size, size))


def noisy(picture: Levels, levels: int) -> Levels:
    noise = np.random.default_rng(0).integers(-levels, levels + 1, picture.shape)
    changed: Levels = np.clip(picture + noise, 0, 255).astype(np.uint8)
    return changed


def test_the_metrics_are_those_of_pixels_and_those_of_eyes() -> None:
    assert set(METRICS) == {*OF_PIXELS, *OF_EYES, "latents_l2"}
    assert [name for name, metric in METRICS.items() if metric.of_latents] == ["latents_l2"]


@pytest.mark.parametrize("name", OF_EYES)
def test_a_metric_of_eyes_is_best_for_identical_pictures_and_worse_the_more_they_differ(name: str) -> None:
    metric, picture = METRICS[name], levels_of(photograph())
    found = [metric.measure(noisy(picture, levels), picture) for levels in (0, 2, 8, 32)]
    assert found[0] == OF_EYES[name]
    if name != "comb_db":  # noise is no comb, however much there is
        assert found == sorted(found, reverse=metric.higher_is_nearer)
        assert len(set(found)) == 4
    if name != "ssimulacra2":
        assert metric.measure(picture, noisy(picture, 8)) == pytest.approx(found[2])


def test_a_patch_is_seen_in_the_worst_block() -> None:
    picture = levels_of(photograph(512))
    patched = picture.copy()
    patched[100:148, 64:96] = np.roll(patched[100:148, 64:96], 9, axis=0)
    assert METRICS["flip"].measure(patched, picture) < 0.01
    assert METRICS["flip_worst"].measure(patched, picture) > 0.1
    one_by_one = {name: METRICS[name].measure(patched, picture) for name in (*OF_PIXELS, *OF_EYES)}
    assert distances(patched, picture) == one_by_one


BENIGN = {
    "noise": lambda image: noisy(levels_of(image), 1),
    "blur": lambda image: levels_of(image.filter(ImageFilter.GaussianBlur(0.7))),
    "shift": lambda image: np.roll(levels_of(image), 1, axis=1),
    "jpeg": lambda image: levels_of(Image.open(as_jpeg(image))),
}


def as_jpeg(image: Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file


@pytest.mark.parametrize("size", [128, 500, 1024])
@pytest.mark.parametrize("change", BENIGN)
def test_what_is_no_grid_is_no_comb(change: str, size: int) -> None:
    image = photograph(size)
    assert METRICS["comb_db"].measure(BENIGN[change](image), levels_of(image)) < 1.5


@pytest.mark.parametrize("size", [128, 500, 1024])
@pytest.mark.parametrize("period", [8, 16])
def test_a_grid_of_one_level_is_a_comb_though_all_else_calls_it_drift(period: int, size: int) -> None:
    picture = levels_of(photograph(size))
    drift = noisy(picture, 1)
    grid = np.zeros_like(picture)
    grid[::period] = grid[:, ::period] = 1
    gridded = np.minimum(drift.astype(int) + grid, 255).astype(np.uint8)
    assert METRICS["comb_db"].measure(gridded, picture) > 3
    assert METRICS["psnr_db"].measure(gridded, picture) > 45
    assert METRICS["flip_worst"].measure(gridded, picture) < 0.03
    assert METRICS["ssimulacra2"].measure(gridded, picture) > 90


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


@pytest.mark.parametrize("metric", [*OF_PIXELS, *OF_EYES])
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


def of(*values: float) -> Latents:
    return np.array(values, dtype=np.float32)


def test_the_distance_of_latents_is_that_of_the_formula() -> None:
    assert latents_l2(of(3, 4), of(0, 4)) == pytest.approx(3 / 4)
    assert latents_l2(of(1, 2, 2), of(1, 2, 2)) == 0
    assert latents_l2(of(0, 0), of(3, 4)) == 1
    assert latents_l2(of(3, 4), of(0, 2)) != latents_l2(of(0, 2), of(3, 4))  # the second is the reference


def test_the_distance_of_latents_is_one_of_float64() -> None:
    """Squares of 1e25 are beyond float32."""
    assert latents_l2(of(1.1e25, 0), of(1e25, 0)) == pytest.approx(0.1)


@given(arrays.arrays(np.float32, 6, elements=st.floats(0.5, 100, width=32)), st.floats(0.25, 4))
def test_the_distance_of_latents_does_not_depend_on_their_scale(b: Latents, factor: float) -> None:
    a = b + of(1, 0, -1, 0, 2, 0)
    scaled = [(side.astype(np.float64) * factor).astype(np.float32) for side in (a, b)]
    assert latents_l2(scaled[0], scaled[1]) == pytest.approx(latents_l2(a, b), rel=1e-4)


@pytest.mark.parametrize("side", [0, 1])
def test_one_nan_makes_the_distance_of_latents_one(side: int) -> None:
    sides = [of(1, 2), of(1, 2)]
    sides[side][0] = math.nan
    assert math.isnan(latents_l2(*sides))


def test_latents_of_different_shapes_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        latents_l2(of(1, 2), of(1, 2, 3))


def light(picture: Levels) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """How bright an eye sees it (Rec. 709)."""
    weighed: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = picture @ np.array([0.2126, 0.7152, 0.0722])
    return weighed


def test_a_heat_map_is_black_where_nothing_differs_and_shows_a_single_level() -> None:
    changed = plain(100)
    changed[1, 2, 0] += 1
    heat = heat_map(plain(100), changed)
    black = tuple(heat[0, 0])
    assert max(black) <= 4
    assert (heat.reshape(-1, 3) == black).all(axis=1).sum() == 23
    assert light(heat)[1, 2] > light(heat)[0, 0] + 10


def test_a_heat_map_is_never_darker_where_more_differs_and_brightest_from_the_top_on() -> None:
    ramp = np.zeros((1, 256, 3), dtype=np.uint8)
    ramp[0, :, 1] = np.arange(256)
    heat = heat_map(ramp, np.zeros_like(ramp))
    assert (np.diff(light(heat)[0, : HEAT_TOP + 1]) > 0).all()
    assert (heat[0, HEAT_TOP:] == heat[0, -1]).all()
    assert light(heat)[0, -1] > 240


@given(pairs)
def test_a_heat_map_is_symmetric_and_of_the_size_of_the_pictures(pair: tuple[Levels, Levels]) -> None:
    a, b = pair
    assert heat_map(a, b).shape == a.shape
    assert (heat_map(a, b) == heat_map(b, a)).all()


def test_a_heat_map_of_a_large_picture_shows_the_hottest_of_each_few_pixels() -> None:
    changed = plain(100, 5, 9)
    changed[4, 8] += 3
    changed[1, 2] += 7
    heat = heat_map(plain(100, 5, 9), changed, most=5)  # squares of two
    assert heat.shape == (3, 5, 3)
    whole = heat_map(plain(100, 5, 9), changed)
    assert (heat[0, 1] == whole[1, 2]).all()
    assert (heat[2, 4] == whole[4, 8]).all()
    assert (heat.reshape(-1, 3) == whole[0, 0]).all(axis=1).sum() == 13


def test_a_large_picture_looks_the_same_as_large_as_a_page_shows_it() -> None:
    """SSIMULACRA 2 is 90 where no eye sees a difference; a page's slider is the largest, 421 pixels wide."""

    def score(quality: int) -> float:
        page = encode.encoded(Picture(levels), quality=quality)
        sides = (Image.open(io.BytesIO(page.data)), Image.fromarray(levels))
        shown, right = (np.asarray(side.resize((421, 421), Image.Resampling.LANCZOS)) for side in sides)
        return ssimulacra2(shown, right)

    photograph = Image.open(PHOTOGRAPH).convert("RGB")
    levels = np.asarray(photograph.resize((1024, 1024), Image.Resampling.LANCZOS))
    assert score(encode.QUALITY) >= 90
    assert score(85) < 90


def test_a_heat_map_of_different_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="6x4 and 4x6"):
        heat_map(plain(0, 4, 6), plain(0, 6, 4))


def test_a_png_keeps_every_level_and_the_same_levels_give_the_same_bytes() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (levels_of(Image.open(io.BytesIO(encode.png(picture)))) == picture).all()
    assert encode.png(picture) == encode.png(picture.copy())
