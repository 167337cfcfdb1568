"""The variants that a team publishes: the entries of `conf/variants.yaml`, compiled for `variants/dvc.yaml`.

An entry is a recipe with a scale, Hydra overrides and a place on the Hub. Its name is a folder of `artifacts/variants`,
part of DVC's stage names, and the golden set's name; only an entry that is a recipe, by name and parameters, shares
that recipe's goldens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from lora_fuse.errors import BadConfig
from lora_fuse.machine import files, text
from lora_fuse.recipe import Recipe, sections
from stages.config.composition import CONF, compose, recipes

ENTRIES = CONF / "variants.yaml"
COMPILED = Path("variants/params.yaml")
KEYS = "the keys are in docs/variants.md"
NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
OWN = {  # what an entry's own keys set, so that no override says it a second time
    "recipe": "recipe",
    "name": "its name",
    "fuse.scale": "scale",
    "publish.enabled": "repo_id",
    "publish.repo_id": "repo_id",
    "publish.tag": "tag",
    "publish.private": "private",
    "publish.weights": "weights",
}


class Variant(sections.Section):
    """One entry; what it leaves out is as its recipe has it, and without a `repo_id` it is not published."""

    recipe: sections.Text
    scale: sections.Finite | None = None
    overrides: list[sections.Text] = Field(default_factory=list)
    repo_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")] | None = None
    tag: sections.Tag | None = None
    private: bool | None = None
    weights: sections.Weights | None = None

    @field_validator("overrides")
    @classmethod
    def _say_nothing_twice(cls, overrides: list[str]) -> list[str]:
        for override in overrides:
            key = override.lstrip("+~").partition("=")[0]
            for own, said_by in OWN.items():
                if own == key or own.startswith(f"{key}."):
                    raise ValueError(f"{override!r} sets {own}, which {said_by} says")
        return overrides

    def arguments(self, name: str) -> list[str]:
        """The entry as Hydra overrides."""
        own: dict[str, object] = {"fuse.scale": self.scale, "publish.private": self.private}
        own |= {"publish.repo_id": self.repo_id, "publish.tag": self.tag, "publish.enabled": self.repo_id is not None}
        own["publish.weights"] = self.weights
        settings = [f"{key}={_hydra(value)}" for key, value in own.items() if value is not None]
        return [f"recipe={self.recipe}", f"name='{name}'", *self.overrides, *settings]


class Build(sections.Section):
    """A variant in `variants/dvc.yaml`: the key of its base's lock; `recipe` is for people."""

    base: sections.Text
    recipe: sections.Text


class Compiled(sections.Section):
    """The content of `variants/params.yaml`."""

    bases: dict[str, str]  # for each distinct base, by the key of its lock, a variant that is built from it
    builds: dict[sections.Name, Build]  # all variants
    published: list[sections.Name]  # those that have a repository
    variants: dict[sections.Name, dict[str, Any]]  # each one's parameters, as `lora_fuse.recipe.Recipe` has them

    def params(self, name: str) -> Recipe:
        """The parameters of a variant.

        Raises:
            BadConfig: there is none of this name, or its parameters are not right.
        """
        refuse_unknown("variant", name, self.variants, ENTRIES)
        return Recipe.parse(self.variants[name], f"{COMPILED}: {name}")


def read_entries() -> dict[str, Variant]:
    """The entries of `conf/variants.yaml`, each checked, and all of them against each other.

    Raises:
        BadConfig: the file, a name or an entry is not right; two of them would be published as the same.
    """
    tree = _read_yaml(ENTRIES, "list the variants there, or write {} if there are none")
    if tree is None:
        raise BadConfig(f"{ENTRIES} is empty; list the variants, or write {{}} if there are none")
    if not isinstance(tree, dict):
        raise BadConfig(f"{ENTRIES} is a {type(tree).__name__}, not a mapping of names to variants; {KEYS}")
    entries = {}
    for name, entry in tree.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise BadConfig(
                f"{ENTRIES}: {name!r} cannot name a folder and a DVC stage; "
                "take up to 64 of a-z, 0-9, _ and -, a letter first"
            )
        entries[name] = sections.parse_section(Variant, entry, f"{ENTRIES}: {name}", KEYS)
        refuse_unknown("recipe", entries[name].recipe, recipes(), f"{ENTRIES}: {name}")
    _refuse_one_place_for_two(entries)
    return entries


def compile_entries() -> dict[str, Any]:
    """All entries composed and checked: the content of `variants/params.yaml`, see `Compiled`.

    Raises:
        BadConfig: an entry is not right, or has a recipe's name and is another model.
    """
    entries = read_entries()
    trees = {name: compose(entry.arguments(name)) for name, entry in entries.items()}
    params = {name: Recipe.parse(tree, f"{ENTRIES}: {name}") for name, tree in trees.items()}
    for name in sorted(params.keys() & set(recipes())):
        _refuse_foreign_goldens(name, params[name])
    bases: dict[str, str] = {}
    for name, one in params.items():
        bases.setdefault(one.base.key, name)
    return {
        "bases": bases,
        "builds": {name: {"base": one.base.key, "recipe": entries[name].recipe} for name, one in params.items()},
        "published": [name for name, one in params.items() if one.publish.enabled],
        "variants": trees,
    }


def read_compiled() -> Compiled:
    """`variants/params.yaml`.

    Raises:
        BadConfig: it is not there, or not what `python -m stages.config` writes.
    """
    remedy = "write it anew: python -m stages.config"
    return sections.parse_section(Compiled, _read_yaml(COMPILED, remedy), str(COMPILED), remedy)


def load_variant(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The parameters of a variant: from `variants/params.yaml`, or composed if there are overrides."""
    return compose_variant(name, overrides) if overrides else read_compiled().params(name)


def compose_variant(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The parameters that an entry and overrides compose to."""
    entries = read_entries()
    refuse_unknown("variant", name, entries, ENTRIES)
    arguments = [*entries[name].arguments(name), *overrides]
    return Recipe.parse(compose(arguments), " ".join(arguments))


def refuse_unknown(kind: str, name: str, known: Iterable[str], where: object) -> None:
    """Refuse a name that is not there, and say which are."""
    names = sorted(known)
    if name not in names:
        near = text.nearest(name, names, least=0.6)
        meant = f"did you mean {near[0]}? " if near else ""
        raise BadConfig(f"{where}: there is no {kind} {name!r}; {meant}there are {', '.join(names) or 'none'}")


def _refuse_one_place_for_two(entries: Mapping[str, Variant]) -> None:
    """Two variants of one repository take turns on its main: each needs a tag by which it can be had."""
    published = [(name, entry, entry.repo_id.lower()) for name, entry in entries.items() if entry.repo_id]
    for number, (name, entry, place) in enumerate(published):
        for earlier, other, taken in published[:number]:
            if place == taken and (other.tag is None or entry.tag in (None, other.tag)):
                raise BadConfig(
                    f"{ENTRIES}: {earlier} and {name} would be the same on the Hub: {entry.repo_id}, tags "
                    f"{other.tag} and {entry.tag}; give each a tag of its own, or another repo_id"
                )


def _refuse_foreign_goldens(name: str, params: Recipe) -> None:
    recipe = Recipe.parse(compose([f"recipe={name}"]), f"recipe={name}")
    mine, theirs = (one.model_dump(exclude={"publish"}) for one in (params, recipe))
    if mine != theirs:
        key = min(key for key in mine if mine[key] != theirs[key])
        raise BadConfig(
            f"{ENTRIES}: {name} has the name of a recipe, so its golden pictures too (artifacts/golden/{name}), and "
            f"another {key} than the recipe; take another name"
        )


def _hydra(value: object) -> str:
    """A value in Hydra's grammar; text in quotes, so that ``1.0`` stays one."""
    return f"'{value}'" if isinstance(value, str) else str(value)


def _read_yaml(path: Path, remedy: str) -> Any:
    try:
        return files.parse_yaml(files.read_text(path))
    except FileNotFoundError as error:
        raise BadConfig(f"{path} is not in {Path.cwd()}; {remedy}") from error
    except (OSError, ValueError) as error:
        raise BadConfig(f"{path} is not YAML ({error}); {remedy}") from error
