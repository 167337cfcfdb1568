"""This project's `conf/`, composed once by each process whatever the current folder is; Hydra takes its time."""

import contextlib
from copy import deepcopy
from functools import cache
from typing import Any

from lora_fuse.recipe.recipe import Recipe
from stages.config import compose
from tests.support.machine import ROOT


def tree_of(*overrides: str) -> dict[str, Any]:
    """The tree that overrides compose to; a copy, to be changed."""
    return deepcopy(_tree_of(overrides))


@cache
def recipe_of(*overrides: str) -> Recipe:
    """The recipe that they compose to."""
    return Recipe.parse(tree_of(*overrides), " ".join(overrides) or "conf/")


@cache
def _tree_of(overrides: tuple[str, ...]) -> dict[str, Any]:
    with contextlib.chdir(ROOT):
        return compose(list(overrides))
