"""Laws of what a picture says of itself, on pictures whose damage is known."""

import numpy as np
import pytest

from lora_fuse.pictures.damage import clipped_share, detail_levels, is_flat, noise_levels, own_comb_db
from lora_fuse.pictures.picture import Levels
from tests.support.judgements import smooth


def noisy(sigma: float, channels: int = 3) -> Levels:
    """Noise of its own in each of three channels, or one for all."""
    noise = np.random.default_rng(0).normal(0, sigma, (128, 128, channels))
    return np.clip(smooth() + noise, 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [2, 5, 10])
def test_noise_is_the_deviation_of_a_value_whether_or_not_channels_share_it(sigma: float, channels: int) -> None:
    """The estimate on the mean of the channels would say 2.9 where 5 levels are independent in each."""
    assert noise_levels(noisy(sigma, channels)) == pytest.approx(sigma, rel=0.06)


def test_noise_of_colour_alone_is_noise() -> None:
    """The mean of the channels has none."""
    picture = smooth().astype(np.float64)
    noise = np.random.default_rng(0).normal(0, 5, (128, 128))
    picture[..., 0] += noise
    picture[..., 1] -= noise
    assert noise_levels(picture.clip(0, 255).round().astype(np.uint8)) == pytest.approx(5 * 2 / 3, rel=0.1)


def test_a_ramp_and_straight_edges_are_no_noise() -> None:
    ramp = np.repeat(np.arange(128, dtype=np.uint8)[None, :, None], 128, axis=0).repeat(3, axis=2) + 60
    edges = ramp.copy()
    edges[:, 64:] = 200
    assert noise_levels(ramp) == noise_levels(edges) == 0
    assert noise_levels(smooth()) < 1


def test_what_is_too_small_for_the_estimate_is_refused_with_its_size() -> None:
    with pytest.raises(ValueError, match="2x2"):
        noise_levels(smooth()[:2, :2])


def test_clipped_values_are_counted_at_both_ends() -> None:
    assert clipped_share(smooth()) == 0
    burnt = smooth()
    burnt[:64] = 255
    assert clipped_share(burnt) == 0.5
    assert clipped_share(np.array([[[0, 255, 7]]], np.uint8)) == pytest.approx(2 / 3)


def test_a_grid_and_lost_detail_show_on_the_picture_alone() -> None:
    grid = noisy(1)
    grid[::16] += 8
    assert own_comb_db(grid) > own_comb_db(noisy(1)) + 3
    assert detail_levels(smooth()) > 5 * detail_levels((smooth() // 16 + 100).astype(np.uint8))


def test_a_single_colour_is_flat_also_when_its_channels_differ_and_with_faint_noise() -> None:
    colour = np.zeros((32, 32, 3), np.uint8) + np.array([90, 20, 200], dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 5, colour.shape, dtype=np.uint8)
    assert is_flat(colour)
    assert is_flat(colour + noise)


def test_contrast_in_one_channel_is_not_flat() -> None:
    picture = np.full((4, 6, 3), 100, np.uint8)
    picture[:2, :, 1] = 120
    assert not is_flat(picture)
