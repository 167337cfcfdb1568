"""`conf/` composed by Hydra into a plain tree of parameters; everything else asks here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_fuse.errors import BadConfig

CONF = Path("conf")


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose `conf/` with Hydra overrides (``recipe=…``, ``fuse.scale=0.8``) into a plain tree.

    Raises:
        BadConfig: a recipe, group or key is unknown, or a value is missing.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONF.absolute()), version_base=None):
            composed = hydra_compose("config", overrides=list(overrides))
        tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise BadConfig(f"conf/ with {' '.join(overrides) or 'no overrides'}: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise BadConfig(f"conf/config.yaml is a {type(tree).__name__}, not a mapping")
    return {str(key): value for key, value in tree.items()}


def recipes() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))


def one_line(error: Exception) -> str:
    """What a library says of a configuration, on one line."""
    return " ".join(str(error).split()).partition(" Config search path")[0]
