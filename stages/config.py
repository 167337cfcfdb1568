"""Where parameters come from: no arguments, `params.yaml`; arguments, composed from `conf/` with them.

``python -m stages.config [overrides]`` writes params.yaml; ``--check`` compares it with what `conf/` gives. DVC never
composes by itself in ``dvc repro``, so params.yaml is committed and this check keeps it true.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from lora_fuse.cli import guarded
from lora_fuse.errors import BadConfig, CheckFailed
from lora_fuse.files import replace_text
from lora_fuse.launched import this_process
from lora_fuse.workplace import holding
from stages.artifacts import HERE
from stages.console import Console
from stages.params import Params, parse_params

PARAMS = Path("params.yaml")
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
        raise BadConfig(f"conf/ with {' '.join(overrides) or 'no overrides'}: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise BadConfig(f"conf/config.yaml is a {type(tree).__name__}, not a mapping")
    return {str(key): value for key, value in tree.items()}


def load(overrides: Sequence[str] = ()) -> Params:
    """The parameters of a stage: from params.yaml, or composed if there are overrides.

    Raises:
        BadConfig: see `compose` and `parse_params`.
    """
    if overrides:
        return parse_params(compose(overrides), " ".join(overrides))
    try:
        tree = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadConfig(f"{PARAMS} is not in {Path.cwd()}; run stages from the project's folder") from error
    except yaml.YAMLError as error:
        raise BadConfig(f"{PARAMS} is not YAML ({_one_line(error)}); write it anew: python -m stages.config") from error
    return parse_params(tree, str(PARAMS))


def run_stage(stage: Callable[..., int], *flags: str, spread: bool = False, writes: bool = True) -> None:
    """Run a stage as a program: its parameters by the rule above, its errors as one line, its result as exit code.

    Args:
        stage: gets the parameters, where its results go, how it says things, and by keyword whether a flag is given.
        flags: names of arguments (``dry-run`` for ``--dry-run``, keyword `dry_run`) that are no overrides and do not
            count for the rule; every stage also knows ``--quiet`` and ``--json``.
        spread: whether a launcher may start it as several processes; the first of them writes.
        writes: whether it holds the build's folder, so that no other does anything to it meanwhile.
    """
    known = ("quiet", "json", *flags)
    given = {flag: f"--{flag}" in sys.argv[1:] for flag in known}
    overrides = [argument for argument in sys.argv[1:] if argument.removeprefix("--") not in known]
    here = this_process()
    console = Console(given["quiet"] or not here.is_first, given["json"])
    chosen = {flag.replace("-", "_"): given[flag] for flag in flags}

    def run() -> int:
        if not (spread or here.is_alone):
            raise BadConfig(f"{stage.__name__} runs as one process, and a launcher started {here.count}")
        with holding(HERE.root) if writes and here.is_first else nullcontext():
            return stage(load(overrides), HERE, console, **chosen)

    sys.exit(guarded(run))


def main(arguments: Sequence[str]) -> int:
    """Write params.yaml, or compare it (``--check``)."""
    overrides = [argument for argument in arguments if argument != "--check"]
    tree = compose(overrides)
    parse_params(tree, " ".join(overrides) or "conf/")
    wanted = yaml.safe_dump(tree, sort_keys=True, allow_unicode=True, width=110)
    if "--check" in arguments:
        return _check(wanted)
    replace_text(PARAMS, wanted)
    print(f"{PARAMS} written: recipe {tree['name']}")
    return 0


def _check(wanted: str) -> int:
    held = PARAMS.read_text(encoding="utf-8") if PARAMS.exists() else ""
    if yaml.safe_load(held) == yaml.safe_load(wanted):
        print(f"{PARAMS} is what conf/ composes to")
        return 0
    diff = difflib.unified_diff(held.splitlines(), wanted.splitlines(), str(PARAMS), "conf/", lineterm="", n=0)
    print("\n".join(diff))
    raise CheckFailed(f"{PARAMS} is not what conf/ composes to; write it anew: python -m stages.config")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).partition(" Config search path")[0]


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
