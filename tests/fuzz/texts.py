"""Parsers of what people write: parameters in YAML, and what a folder says of its licence."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from lora_fuse.recipe import stated_licence
from stages.config import load
from stages.config.variants import read_compiled, read_entries
from tests.fuzz import formats
from tests.fuzz.bounds import ROOT
from tests.fuzz.parsers import Parser, these, write

LICENCES = (
    b"---\nlicense: apache-2.0\nlicense_name: x\nlicense_link: LICENSE\ntags:\n- a\n- b\n---\n# A card\n",
    b"---\nlicense:\n- mit\n- other\nlanguage: en\n---\n",
)
VARIANTS = b"""
pastel:
  recipe: pocket
  scale: 0.8
  overrides: [sampling.steps=8]
  repo_id: a/b
  tag: v1
other: {recipe: pocket_text}
"""


def licence(name: str) -> Callable[[Path, bytes], object]:
    def parse(folder: Path, content: bytes) -> None:
        (folder / name).write_bytes(content)
        stated = stated_licence.read_license(folder)
        str(stated and stated.label)

    return parse


def params(folder: Path, content: bytes) -> None:
    """The file of parameters; the folder is the current one."""
    (folder / "params.yaml").write_bytes(content)
    load()


def entries(folder: Path, content: bytes) -> None:
    write(folder, {"conf/variants.yaml": content})
    read_entries()


def with_recipes(folder: Path) -> None:
    write(folder, {f"conf/recipe/{name}.yaml": b"{}" for name in ("pocket", "pocket_text")})


def compiled(folder: Path, content: bytes) -> None:
    write(folder, {"variants/params.yaml": content})
    whole = read_compiled()
    for name in whole.builds:
        whole.params(name)


def composed(folder: Path, content: bytes) -> None:
    """A recipe's file, composed by Hydra with all others."""
    write(folder, {"conf/recipe/pocket.yaml": content})
    load(["recipe=pocket"])


def with_conf(folder: Path) -> None:
    shutil.copytree(ROOT / "conf", folder / "conf")


def some_variants() -> list[bytes]:
    with contextlib.chdir(ROOT):
        whole = yaml.safe_load(Path("variants/params.yaml").read_text())
    name = next(iter(whole["variants"]))
    only = {key: {name: value[name]} for key, value in whole.items() if key in ("builds", "variants")}
    return [yaml.safe_dump(whole | only | {"published": [name]}).encode()]


def rows() -> Iterator[Parser]:
    yield Parser("README.md", licence("README.md"), formats.FRONT_MATTER, these(*LICENCES))
    yield Parser("LICENSE", licence("LICENSE"), formats.raw, these((ROOT / "LICENSE").read_bytes()))
    yield Parser("params.yaml", params, formats.YAML_FILE, these((ROOT / "params.yaml").read_bytes()))
    yield Parser("conf/variants.yaml", entries, formats.YAML_FILE, these(VARIANTS), with_recipes)
    yield Parser(
        "variants/params.yaml",
        compiled,
        formats.YAML_FILE,
        some_variants,
    )
    pocket = ROOT / "conf/recipe/pocket.yaml"
    yield Parser("conf/recipe", composed, formats.YAML_FILE, these(pocket.read_bytes()), with_conf, examples=3)
