"""docs/models.md, made from what happens: ``python -m tests.support.model_table`` writes it.

Every cell is a merge of a tiny model that verification follows row by row, or the refusal of one.
"""

import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import lora_fuse
from lora_fuse import LoraInput, Selection
from lora_fuse.errors import Refused
from tests.support import tiny
from tests.support.model_cases import TITLES, Case, cases, roles, spellings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
NONE = "no"
INTRO = """# Models

Families of models, and what of their LoRAs goes into them. Made by `python -m tests.support.model_table` from merges of
tiny models in diffusers' own classes, one a cell, each verified row by row; a test makes the page again and compares.
*fuses*: the values are those that the names mean; *warns*: it fuses, with a sentence on what may be a mistake;
*refused*: exit 2, nothing is written, and the reason has the number of a line at the end. *no*: the family has none.

Recipes are in `conf/recipe/`. A new family is a file in `lora_fuse/models/families/`.
"""
PARTS = (
    (
        "Names",
        """`NAME` is a module by its name in diffusers, `ORIGINAL` in the checkpoint as its makers published it, such as
`double_blocks.0.img_attn.qkv`; after a prefix that ends in an underscore with underscores for dots. The base is in the
names of diffusers but in the last two rows, where it is one file that has `model.diffusion_model.` before each.""",
    ),
    (
        "Roles",
        """Kinds of change, in original names where a family has some, on a module that the two spellings cut in
other ways where there is one.""",
    ),
    ("Files that people met", "Cases of single families."),
)


class Notes:
    """Refusals and warnings, numbered as they come; the same one has one number."""

    def __init__(self) -> None:
        """Start without any."""
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        """The number of a text."""
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def outcome(case: Case, folder: Path, notes: Notes) -> str:
    """Merge and verify: *fuses*, *warns* or *refused*, with a number of a note."""
    folder.mkdir(parents=True)
    base, out = _write(case, folder), folder / "out"
    lora = LoraInput("lora", folder / "lora.safetensors", 1.0)
    save_file({key: np.ascontiguousarray(values, np.float32) for key, values in case.lora.items()}, lora.path)
    chosen = Selection(leave_out=case.leave_out)
    try:
        plan = lora_fuse.plan(base, [lora], selection=chosen)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            lora_fuse.fuse(plan, out, device="cpu")
    except Refused as refusal:
        return f"refused [{notes.number(_reason(str(refusal), folder))}](#why)"
    found = lora_fuse.verify(out, base, [lora], rows="all", selection=chosen)
    assert found.passed, found
    if warned := [text for text in map(str, (one.message for one in said)) if "no alpha" not in text]:
        return f"warns [{notes.number(_reason(warned[0], folder))}](#why)"
    return "fuses"


def _write(case: Case, folder: Path) -> Path:
    """The base of a case: one file, a component's folder, or a pipeline's with text encoders."""
    if case.as_file:
        save_file(case.base, folder / "base.safetensors")
        return folder / "base.safetensors"
    if not case.encoders:
        return tiny.write_component(folder / "base", case.base, shards=1)
    kinds = {"unet": ["diffusers", "UNet2DConditionModel"]}
    kinds |= {part: ["transformers", "CLIPTextModel"] for part in case.encoders}
    for part, tensors in {"unet": case.base, **case.encoders}.items():
        tiny.write_component(folder / "base" / part, tensors, shards=1)
    index = {"_class_name": "StableDiffusionXLPipeline", **kinds}
    (folder / "base" / "model_index.json").write_text(json.dumps(index))
    return folder / "base"


def _reason(text: str, folder: Path) -> str:
    """A message without its place, the first names of many, and the way out that all have."""
    words = text.replace(f"{folder}/", "").removeprefix("lora.safetensors: ").replace("|", "\\|")
    words = re.sub(r" \(first .*?\)(?=[;,])", "", words.partition("; or leave them out on purpose")[0])
    return re.sub(r"^\d+ of \d+ (?=keys)|^'\S+' (?=has a length)", "", words)


def _table(rows: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    columns = list(next(iter(rows.values())))
    yield f"| | {' | '.join(columns)} |"
    yield f"|---{'|---' * len(columns)}|"
    for name, cells in rows.items():
        yield f"| {name} | {' | '.join(cells[column] for column in columns)} |"


def page(folder: Path) -> str:
    """The text of the page; `folder` is for the merges."""
    notes = Notes()
    names: dict[str, dict[str, str]] = {}
    kinds: dict[str, dict[str, str]] = {}
    for model in TITLES:
        for part, (made, table) in enumerate(((spellings(model), names), (roles(model), kinds))):
            table[TITLES[model]] = {
                column: NONE if case is None else outcome(case, folder / f"{model}-{part}-{at}", notes)
                for at, (column, case) in enumerate(made.items())
            }
    met = {
        f"{TITLES[model]}: {words}": {"": outcome(case, folder / f"met-{at}", notes)}
        for at, (model, words, case) in enumerate(cases())
    }
    lines = [INTRO]
    for (title, words), table in zip(PARTS, (_turned(names), _turned(kinds), met), strict=True):
        lines += [f"## {title}\n", f"{words}\n", *_table(table), ""]
    lines += ["## Why\n", *(f"{at}. {text}" for at, text in enumerate(notes.texts, 1))]
    return "\n".join(lines) + "\n"


def _turned(table: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The same with rows for columns."""
    columns = list(next(iter(table.values())))
    return {column: {row: cells[column] for row, cells in table.items()} for column in columns}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        PAGE.write_text(page(Path(place)), encoding="utf-8")
