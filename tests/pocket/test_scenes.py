"""Laws of the scenes: drawings are a function of the record, answers are right, held-out combinations stay out."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocket import scenes

SEEDS = st.integers(0, 10_000)
OPEN = {"any coat", "any back", "any hat"}


def pixels(scene: scenes.Scene, side: int = 64) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(scenes.draw(scene, side))


@given(SEEDS)
@settings(max_examples=20)
def test_a_drawing_is_a_function_of_its_scene_and_an_edit_shows(seed: int) -> None:
    scene = scenes.random_scene(random.Random(seed))
    assert np.array_equal(pixels(scene), pixels(scene))
    for asked in scenes.instructions(scene):
        for answer in scenes.answers(scene, asked):
            assert answer != scene
            assert not np.array_equal(pixels(answer), pixels(scene)), asked


@given(SEEDS)
def test_an_instruction_is_open_exactly_if_it_leaves_something_to_choose(seed: int) -> None:
    scene = scenes.random_scene(random.Random(seed))
    for asked in scenes.instructions(scene):
        answers = scenes.answers(scene, asked)
        assert len(set(answers)) == len(answers)
        assert (len(answers) > 1) == (asked.kind in OPEN)


@given(SEEDS)
def test_an_answer_changes_what_was_asked_and_nothing_else(seed: int) -> None:
    scene = scenes.random_scene(random.Random(seed))
    changes = {
        "coat": "coat", "any coat": "coat", "back": "back", "any back": "back", "night": "night",
        "animal": "animal", "hat": "hat", "any hat": "hat", "no hat": "hat",
    }  # fmt: skip
    for asked in scenes.instructions(scene):
        field = changes[asked.kind]
        for answer in scenes.answers(scene, asked):
            assert replace(answer, **{field: getattr(scene, field)}) == scene


@given(SEEDS)
def test_training_never_shows_a_held_out_combination(seed: int) -> None:
    rng = random.Random(seed)
    assert all(scenes.is_seen(scene) for scene in scenes.family(rng, 6))
    assert not scenes.is_seen(scenes.random_scene(rng, seen=False))


def test_a_family_has_no_picture_twice() -> None:
    members = scenes.family(random.Random(3), 8)
    assert len(set(members)) == 8


def test_every_prompt_of_the_grammar_is_listed_once() -> None:
    prompts = scenes.prompts()
    assert "Change the rabbit's color to purple" in prompts
    assert "Give the rabbit a hat" in prompts
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("side", [32, 128, 512])
def test_a_scene_can_be_drawn_at_any_size(side: int) -> None:
    scene = scenes.random_scene(random.Random(1))
    assert scenes.draw(scene, side).size == (side, side)
    small = np.asarray(scenes.draw(scene, 32), dtype=float)
    reduced = np.asarray(scenes.draw(scene, side).resize((32, 32)), dtype=float)
    assert np.abs(small - reduced).mean() < 12
