"""Parameters of a stage: without arguments those of `params.yaml`, with them composed from `conf/`.

``python -m stages.config [overrides]`` writes params.yaml, and variants/params.yaml of conf/variants.yaml; ``--check``
compares both with what `conf/` gives. DVC never composes by itself in ``dvc repro``, so they are committed and this
check keeps them true. ``--variant NAME`` is the same rule for a variant: its parameters, or those with the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_fuse.errors import BadConfig, CheckFailed
from lora_fuse.machine import files
from lora_fuse.recipe import Recipe
from stages.config.composition import compose
from stages.config.variants import COMPILED, compose_variant, load_variant

__all__ = ["PARAMS", "check_declared", "compose", "load"]

PARAMS = Path("params.yaml")


def load(overrides: Sequence[str] = (), variant: str | None = None) -> Recipe:
    """The parameters of a stage: from params.yaml, or composed if there are overrides; or those of a variant.

    Raises:
        BadConfig: they are not there, or not right.
    """
    if variant is not None:
        return load_variant(variant, overrides)
    if overrides:
        return Recipe.parse(compose(overrides), " ".join(overrides))
    try:
        tree = files.parse_yaml(files.read_text(PARAMS))
    except FileNotFoundError as error:
        raise BadConfig(f"{PARAMS} is not in {Path.cwd()}; run stages from the project's folder") from error
    except (OSError, ValueError) as error:
        raise BadConfig(f"{PARAMS} is not YAML ({error}); write it anew: python -m stages.config") from error
    return Recipe.parse(tree, str(PARAMS))


def check_declared(recipe: str, variant: str | None = None) -> Recipe:
    """The compiled parameters, to approve under; refused if they are not what `conf/` says of a recipe or variant."""
    declared = load(variant=variant)
    if variant is None and declared != load([f"recipe={recipe}"]):
        raise CheckFailed(
            f"params.yaml is not what recipe {recipe} composes to: make a recipe of these overrides, commit "
            "it and run it; nothing was approved"
        )
    if variant is not None and (recipe != variant or declared != compose_variant(variant)):
        raise CheckFailed(
            f"{COMPILED} is not what variant {variant} composes to, or its pictures are of {recipe}: run python -m "
            "stages.config, commit, run dvc repro; nothing was approved"
        )
    return declared
