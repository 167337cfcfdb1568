"""`conf/` composed by Hydra into a plain tree of parameters; everything else asks here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_fuse.errors import BadConfig
from lora_fuse.machine import files, text

CONF = Path("conf")
REFERENCES = 16  # in one composition; three that each name the last one, five times over, make 243 of one value
# Functions that a value may call, of OmegaConf and Hydra: all are off. A recipe of a pull request would read the
# environment of the machine that validates it.
RESOLVERS = (
    *("oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.env", "oc.select"),
    *("hydra", "now", "python_version"),
)


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose `conf/` with Hydra overrides (``recipe=…``, ``fuse.scale=0.8``) into a plain tree.

    Raises:
        BadConfig: a recipe, group or key is unknown, or a value is missing.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    _check_bounds()
    try:
        with initialize_config_dir(str(CONF.absolute()), version_base=None):
            for resolver in RESOLVERS:
                OmegaConf.clear_resolver(resolver)
            composed = hydra_compose("config", overrides=list(overrides))
        _check_references(OmegaConf.to_container(composed, resolve=False))
        tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except Exception as error:  # of a header or a value that is wrong, Hydra lets any error through
        raise BadConfig(f"conf/ with {' '.join(overrides) or 'no overrides'}: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise BadConfig(f"conf/config.yaml is a {type(tree).__name__}, not a mapping")
    return {str(key): value for key, value in tree.items()}


def _check_bounds() -> None:
    """Refuse what Hydra would read of `conf/` without a bound; of a pull request, it is anybody's."""
    for path in sorted(CONF.rglob("*.yaml")):
        try:
            files.check_yaml(files.read_text(path))
        except (OSError, ValueError) as error:
            raise BadConfig(f"{path} is not YAML, or out of bounds ({error})") from error


def _check_references(tree: Any) -> None:
    """Refuse more references (``${base.path}``) than values can be made of: of each other, they double at each."""
    found = str(tree).count("${")
    if found > REFERENCES:
        raise BadConfig(f"conf/ has {found} references, ${{…}}, in one recipe, at most {REFERENCES}; write values out")


def split_sweep(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, ...]]] | None:
    """Overrides in Hydra's sweep grammar: those of all points, and those of each; None if nothing is swept.

    Raises:
        BadConfig: Hydra cannot read them, or a sweep is of no single values.
    """
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        with initialize_config_dir(str(CONF.absolute()), version_base=None):
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # glob(*) reads the groups
            parsed = list(zip(arguments, parser.parse_overrides(list(arguments)), strict=True))
            swept = [override for _, override in parsed if override.is_sweep_override()]
            (points,) = BasicSweeper.split_arguments(swept, max_batch_size=None)
    except Exception as error:  # as in `compose`
        raise BadConfig(f"{' '.join(arguments)}: {one_line(error)}; list the values: fuse.scale=0.6,0.8") from error
    fixed = [argument for argument, override in parsed if not override.is_sweep_override()]
    return (fixed, [tuple(point) for point in points]) if swept else None


def recipes() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))


def one_line(error: Exception) -> str:
    """A library's error about a configuration, on one line."""
    return text.one_line(error).partition(" Config search path")[0]
