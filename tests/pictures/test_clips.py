"""Laws of clips: steady change does not flicker, what jumps does, and all frames are played."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from lora_fuse.pictures import damage, encode, metrics
from lora_fuse.pictures.calls import clip
from lora_fuse.pictures.cases import Case
from lora_fuse.pictures.picture import Levels, Picture
from lora_fuse.recipe import records
from lora_fuse.regression.case_judgement import examine
from lora_fuse.regression.review import flat_metrics
from lora_fuse.regression.verdicts import Facts, Golden, Limits, Rules, Verdict, compare

CASE = Case("clip", "a", 0, (), 16, 24, 9)


def frames_of(levels: list[int], seed: int = 3) -> Levels:
    """A clip of 24 x 16 pixels, one texture as bright as each of these levels says."""
    texture = np.random.default_rng(seed).integers(0, 60, (16, 24, 3))
    return np.stack([texture + level for level in levels]).astype(np.uint8)


def picture_of(frames: Levels) -> Picture:
    return Picture(clip.shown_frames(frames), frames=frames, clip=clip.measured(frames))


STEADY = frames_of(list(range(0, 90, 10)))
JUMPING = frames_of([40 + 10 * (number % 2) for number in range(9)])


def test_steady_change_is_motion_and_jumps_are_both() -> None:
    assert clip.measured(STEADY) == {"flicker": 0, "motion": 10}
    assert clip.measured(JUMPING) == {"flicker": 10, "motion": 10}
    assert clip.measured(frames_of([50] * 9)) == {"flicker": 0, "motion": 0}
    noise = clip.measured(np.random.default_rng(1).integers(0, 256, (7, 9, 11, 3), dtype=np.uint8))
    assert noise == {name: records.rounded(value) for name, value in noise.items()}  # as a record has them
    assert clip.measured(STEADY[:1]) == {"flicker": 0, "motion": 0}


def test_the_first_the_middle_and_the_last_frame_are_shown_side_by_side() -> None:
    shown = clip.shown_frames(STEADY)
    assert shown.shape == (16, 72, 3)
    assert all((shown[:, 24 * at : 24 * at + 24] == STEADY[frame]).all() for at, frame in enumerate((0, 4, 8)))
    assert clip.shown_frames(STEADY[:2]).shape == (16, 48, 3)
    assert CASE.size == (72, 16)


def test_a_clip_is_flat_only_where_every_frame_is() -> None:
    fading = np.concatenate([np.zeros_like(STEADY[:3]), STEADY[3:]])
    grey = np.stack([np.full_like(STEADY[0], 20 * number) for number in range(9)])
    assert not Facts.of(picture_of(fading)).flat
    assert Facts.of(picture_of(grey)).flat
    assert not damage.is_flat(clip.shown_frames(grey))  # which alone would not see it


def test_a_page_plays_every_frame_at_its_rate() -> None:
    played = encode.playing(STEADY, 16)
    assert played == encode.playing(STEADY, 16)
    with Image.open(io.BytesIO(base64.b64decode(played.data_uri.partition(",")[2]))) as image:
        assert (getattr(image, "n_frames", 1), image.size, image.info["loop"]) == (9, (24, 16), 0)


def test_a_clip_that_flickers_between_the_frames_that_are_shown_is_a_regression() -> None:
    """Its first, middle and last frame are those of the golden."""
    right = picture_of(frames_of([50] * 9))
    wrong = picture_of(frames_of([50, 58, 42, 58, 50, 42, 58, 42, 50]))
    assert compare(right, wrong).identical
    golden = Golden(right.levels, name="clip.png", clip=right.clip)
    limits = Limits({"psnr_db": 54.0, "flicker": 0.5, "motion": 0.5})
    result = examine(CASE, wrong, wrong, [golden], Rules(limits, limits))
    assert result.verdict == Verdict.REGRESSION
    assert "Difference in flicker to the golden is 11.4 levels, above 0.5" in result.reasons[0]
    assert examine(CASE, right, right, [golden], Rules(limits, limits)).verdict == Verdict.EXACT
    numbers = flat_metrics([result])
    assert numbers["clip.golden.flicker"] == pytest.approx(10, abs=3)
    assert {f"clip.{pair}.{name}" for pair in ("golden", "unfused") for name in metrics.OF_CLIPS} <= numbers.keys()
    still = flat_metrics([examine(Case("a", "b", 0), right, right, [], Rules(limits, limits))])
    assert not any(key.endswith(("flicker", "motion")) for key in still)
