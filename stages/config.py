"""Where parameters come from: no arguments, `params.yaml`; arguments, composed from `conf/` with them.

``python -m stages.config [overrides]`` writes params.yaml, and variants/params.yaml of conf/variants.yaml; ``--check``
compares both with what `conf/` gives. DVC never composes by itself in ``dvc repro``, so they are committed and this
check keeps them true. ``--variant NAME`` is the same rule for a variant: its parameters, or those with the arguments.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import yaml

from lora_fuse.cli import guarded
from lora_fuse.errors import BadConfig, CheckFailed
from lora_fuse.files import replace_text
from lora_fuse.launched import this_process
from lora_fuse.workplace import holding
from stages.artifacts import HERE, Artifacts
from stages.compose import compose, one_line
from stages.console import KEPT, Console, run
from stages.params import Params, parse_params
from stages.variants import COMPILED, compile_entries, compose_variant, load_variant

__all__ = ["check_declared", "compose", "load", "main", "run_stage"]

PARAMS = Path("params.yaml")


def load(overrides: Sequence[str] = (), variant: str | None = None) -> Params:
    """The parameters of a stage: from params.yaml, or composed if there are overrides; or those of a variant.

    Raises:
        BadConfig: see `compose`, `parse_params` and `load_variant`.
    """
    if variant is not None:
        return load_variant(variant, overrides)
    if overrides:
        return parse_params(compose(overrides), " ".join(overrides))
    try:
        tree = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadConfig(f"{PARAMS} is not in {Path.cwd()}; run stages from the project's folder") from error
    except yaml.YAMLError as error:
        raise BadConfig(f"{PARAMS} is not YAML ({one_line(error)}); write it anew: python -m stages.config") from error
    return parse_params(tree, str(PARAMS))


def check_declared(recipe: str, variant: str | None = None) -> Params:
    """The compiled parameters, to approve under, if they are what `conf/` says of a recipe, or of a variant.

    Raises:
        CheckFailed: they are not.
    """
    params = load(variant=variant)
    if variant is None and params != load([f"recipe={recipe}"]):
        raise CheckFailed(
            f"params.yaml is not what recipe {recipe} composes to: make a recipe of these overrides, commit "
            "it and run it; nothing was approved"
        )
    if variant is not None and (recipe != variant or params != compose_variant(variant)):
        raise CheckFailed(
            f"{COMPILED} is not what variant {variant} composes to, or its pictures are of {recipe}: run python -m "
            "stages.config, commit, run dvc repro; nothing was approved"
        )
    return params


def run_stage(
    stage: Callable[..., int],
    *flags: str,
    kept: str = KEPT,
    read: Callable[[Sequence[str]], object] | None = None,
    at: Artifacts = HERE,
    spread: bool = False,
    writes: bool = True,
) -> None:
    """Run a stage as a program: its parameters by the rule above, its errors as one line, its result as exit code.

    Args:
        stage: gets the parameters, where its results go, how it says things, and by keyword whether a flag is given.
        flags: names of arguments (``dry-run`` for ``--dry-run``, keyword `dry_run`) that are no overrides and do not
            count for the rule; every stage also knows ``--quiet``, ``--json`` and ``--variant NAME``.
        kept: what an interrupted run leaves, and how to go on.
        read: makes something else than parameters from the overrides; there is no ``--variant`` then.
        at: where its results go.
        spread: whether a launcher may start it as several processes; the first of them writes.
        writes: whether it holds the build's folder, so that no other does anything to it meanwhile.
    """
    known = ("quiet", "json", *flags)
    given = {flag: f"--{flag}" in sys.argv[1:] for flag in known}
    rest = [argument for argument in sys.argv[1:] if argument.removeprefix("--") not in known]
    here = this_process()
    console = Console(given["quiet"] or not here.is_first, given["json"] and here.is_first)
    chosen = {flag.replace("-", "_"): given[flag] for flag in flags}
    name = Path(sys.argv[0]).stem

    def work() -> int:
        if not (spread or here.is_alone):
            raise BadConfig(f"{name} runs as one process, and a launcher started {here.count}")
        variant, overrides = _variant(rest) if read is None else (None, rest)
        params = load(overrides, variant) if read is None else read(overrides)
        where = at if variant is None else Artifacts.of_variant(variant, load(variant=variant))
        holds = holding(where.root) if writes and here.is_first else nullcontext()
        with where.own_commands(), holds:
            return stage(params, where, replace(console, variant=variant), **chosen)

    sys.exit(run(name, console, work, kept))


def _variant(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The variant that the arguments name, if any, and the overrides among them."""
    rest, variant = list(arguments), None
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--variant":
            value = value if equals else "".join(arguments[at + 1 : at + 2])
            if variant is not None or not value:
                raise BadConfig("--variant takes one name: python -m stages.fuse --variant NAME")
            variant = value
            del rest[at : at + (1 if equals else 2)]
    return variant, rest


def main(arguments: Sequence[str]) -> int:
    """Write params.yaml and variants/params.yaml, or compare them (``--check``)."""
    overrides = [argument for argument in arguments if argument != "--check"]
    tree = compose(overrides)
    parse_params(tree, " ".join(overrides) or "conf/")
    variants = compile_entries()
    wanted = {PARAMS: tree, COMPILED: variants}
    texts = {
        path: yaml.safe_dump(content, sort_keys=True, allow_unicode=True, width=110) for path, content in wanted.items()
    }
    if "--check" in arguments:
        for path, text in texts.items():
            _check(path, text)
        return 0
    for path, text in texts.items():
        replace_text(path, text)
    print(f"{PARAMS} written: recipe {tree['name']}")
    print(f"{COMPILED} written: {', '.join(variants['variants']) or 'no variants'}")
    return 0


def _check(path: Path, wanted: str) -> None:
    held = path.read_text(encoding="utf-8") if path.exists() else ""
    if yaml.safe_load(held) == yaml.safe_load(wanted):
        print(f"{path} is what conf/ composes to")
        return
    diff = difflib.unified_diff(held.splitlines(), wanted.splitlines(), str(path), "conf/", lineterm="", n=0)
    print("\n".join(diff))
    raise CheckFailed(f"{path} is not what conf/ composes to; write it anew: python -m stages.config")


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
