"""Train the pocket model from nothing: ``python -m pocket.train [--out DIR] [--work DIR] [--set KEY=VALUE ...]``.

Each phase leaves a file in the work folder and is skipped where that file is there, so a run that was stopped goes on
at the phase it was in. At the end the repository and the LoRAs are written.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file

from pocket.bench import POCKET
from pocket.train import autoencoder, examples, flow, lightning, pictures, style
from pocket.train.export import export
from pocket.train.pipelines import encoders
from pocket.train.recipe import Recipe
from pocket.train.runtime import DEVICE, log

if TYPE_CHECKING:
    from collections.abc import Sequence

Tensors = dict[str, torch.Tensor]


class Run:
    """The phases. What one hands to the next are the files of `work`."""

    PHASES = ("pictures", "vae", "latents", "decoder", "embeds", "base", "teacher", "v1", "v2", "pastel")

    def __init__(self, recipe: Recipe, work: Path) -> None:
        self.recipe, self.work = recipe, work

    def go(self, out: Path) -> None:
        """Run every phase that has not run yet, and write the model to `out`."""
        started = time.time()
        for name in self.PHASES:
            if self._path(name).exists():
                log(f"{name}: done before")
                continue
            begun = time.time()
            self._save(name, getattr(self, name)())
            log(f"{name}: {time.time() - begun:.0f} s")
        export(out, {name: self.load(name) for name in ("decoder", "base", "latents", "v1", "v2", "pastel")})
        log(f"{time.time() - started:.0f} s on {DEVICE}; written to {out}")

    def _path(self, name: str) -> Path:
        return self.work / f"{name}.safetensors"

    def load(self, name: str) -> Tensors:
        """What a phase left."""
        tensors: Tensors = load_file(self._path(name))
        return tensors

    def _save(self, name: str, tensors: Tensors) -> None:
        partial = self.work / f".{name}.partial"
        save_file(tensors, partial)
        partial.replace(self._path(name))

    @cached_property
    def chosen(self) -> pictures.Curriculum:
        """Scenes and examples, chosen anew by each process: a second's work."""
        return pictures.curriculum(self.recipe)

    @cached_property
    def drawn(self) -> Tensors:
        """The drawings, plain and pastel."""
        return self.load("pictures")

    @property
    def all_drawn(self) -> torch.Tensor:
        """Both styles, which the VAE must know."""
        return torch.cat([self.drawn["plain"], self.drawn["pastel"]])

    def by_kind(self) -> dict[str, examples.Examples]:
        """Examples on the device, by kind."""
        return self._examples(*self.chosen.kinds())

    def edits(self) -> examples.Examples:
        """Edits of one picture."""
        return self._examples("edits")["edits"]

    def _examples(self, *kinds: str) -> dict[str, examples.Examples]:
        tokens, data, chosen = self.load("latents")["tokens"].to(DEVICE), self.load("embeds"), self.chosen.kinds()
        return {kind: examples.Examples(kind, chosen[kind], tokens, data) for kind in kinds}

    def pictures(self) -> Tensors:
        """Draw every scene, an eighth of them in pastel, too."""
        records = self.chosen.records
        log(f"{len(records)} scenes: " + ", ".join(f"{len(e)} {kind}" for kind, e in self.chosen.kinds().items()))
        return {
            "plain": pictures.draw_all(records),
            "pastel": pictures.draw_all(records[: len(records) // 8], "pastel"),
        }

    def vae(self) -> Tensors:
        """Train encoder and decoder."""
        return autoencoder.train_vae(self.recipe, self.all_drawn)

    def latents(self) -> Tensors:
        """Encode every picture."""
        return examples.latents(self.load("vae"), self.drawn["plain"])

    def decoder(self) -> Tensors:
        """Train the decoder on; the whole VAE."""
        return autoencoder.train_decoder(self.recipe, self.load("vae"), self.all_drawn)

    def embeds(self) -> Tensors:
        """Encode every prompt as the pipelines do."""
        return examples.embed(encoders(self.work / "frame"), self.chosen, self.drawn["plain"])

    def base(self) -> Tensors:
        """Train the transformer."""
        return flow.train_base(self.recipe, self.by_kind())

    def teacher(self) -> Tensors:
        """Let the base show what many steps give."""
        return lightning.teach(self.recipe, self.load("base"), self.edits())

    def v1(self) -> Tensors:
        """Distil: the first version of the Lightning LoRA."""
        return lightning.train_v1(self.recipe, self.load("base"), self.edits(), self.load("teacher"))

    def v2(self) -> Tensors:
        """Distil on: the second version."""
        first = self.load("v1")
        return lightning.train_v2(self.recipe, self.load("base"), self.edits(), self.load("teacher"), first)

    def pastel(self) -> Tensors:
        """Train the style LoRA."""
        tokens = examples.normalized(self.load("vae"), self.drawn["pastel"], self.load("latents"))
        return style.train_style(self.recipe, self.load("base"), self.edits(), tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(prog="python -m pocket.train", description="train the pocket model from nothing")
    parser.add_argument("--out", type=Path, default=POCKET, help="gets model/ and lora/; default: the package itself")
    parser.add_argument("--work", type=Path, default=Path(".pocket"), help="gets a file a phase; default: .pocket")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another value of the recipe")
    options = parser.parse_args(arguments)
    try:
        recipe = _recipe(options.set)
        _same_recipe(recipe, options.work)
    except ValueError as error:
        parser.error(str(error))
    Run(recipe, options.work).go(options.out)


def _recipe(changes: Sequence[str]) -> Recipe:
    """The recipe with changes of the form ``key=value``."""
    types, values = get_type_hints(Recipe), {}
    for key, _, text in (change.partition("=") for change in changes):
        if key not in types:
            raise ValueError(f"--set {key}: the recipe has {', '.join(field.name for field in fields(Recipe))}")
        adapter: TypeAdapter[Any] = TypeAdapter(types[key])
        try:
            values[key] = adapter.validate_strings(text)
        except ValidationError as error:
            raise ValueError(f"--set {key}={text}: {error.errors()[0]['msg']}") from error
    return replace(Recipe(), **values)


def _same_recipe(recipe: Recipe, work: Path) -> None:
    """Refuse a work folder whose files another recipe left."""
    path, mine = work / "recipe.json", asdict(recipe)
    theirs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else mine
    for key, value in mine.items():
        if theirs.get(key) != value:
            raise ValueError(f"{work} was begun with {key}={theirs.get(key)}, not {value}: give another --work")
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
