"""Train the pocket model from nothing: ``python -m pocket.train [--out DIR] [--work DIR] [--set KEY=VALUE ...]``.

Each phase leaves a file in the work folder and is skipped where that file is there, so a run that was stopped goes on
at the phase it was in. At the end the repository and the LoRAs are written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file

from lora_fuse.machine import interrupts
from pocket import POCKET
from pocket.train import autoencoder, examples, flow, loras
from pocket.train.export import export
from pocket.train.recipe import Recipe
from pocket.train.runtime import DEVICE, Tensors, log


class Run:
    """The phases of a training, by `PHASES`. Each hands on to the next a file of `work`."""

    def __init__(self, recipe: Recipe, work: Path) -> None:
        self.recipe = recipe
        self.work = work

    def go(self, out: Path) -> None:
        """Run every phase that has not run yet, and write the model to `out`."""
        started = time.time()
        for name, phase in PHASES.items():
            if self._path(name).exists():
                log(f"{name}: done before")
                continue
            begun = time.time()
            self._save(name, phase(self))
            log(f"{name}: {time.time() - begun:.0f} s")
        export(out, {name: self.load(name) for name in ("decoder", "base", "latents", "v1", "v2", "pastel")})
        log(f"{time.time() - started:.0f} s on {DEVICE}; written to {out}")

    def _path(self, name: str) -> Path:
        return self.work / f"{name}.safetensors"

    def load(self, name: str) -> Tensors:
        """The tensors that a phase left."""
        tensors: Tensors = load_file(self._path(name))
        return tensors

    def _save(self, name: str, tensors: Tensors) -> None:
        partial = self.work / f".{name}.partial"
        save_file(tensors, partial)
        partial.replace(self._path(name))

    @cached_property
    def chosen(self) -> examples.Curriculum:
        """Scenes and examples, chosen anew by each process: a second's work."""
        return examples.curriculum(self.recipe)

    @cached_property
    def drawn(self) -> Tensors:
        """The drawings, plain and pastel."""
        return self.load("pictures")

    @property
    def all_drawn(self) -> torch.Tensor:
        """Both styles, which the VAE must know."""
        return torch.cat([self.drawn["plain"], self.drawn["pastel"]])

    @property
    def edits(self) -> examples.Examples:
        """Edits of one picture, on the device."""
        return self.examples_of("edits")["edits"]

    def examples_of(self, *kinds: str) -> dict[str, examples.Examples]:
        """Examples on the device, by kind."""
        tokens = self.load("latents")["tokens"].to(DEVICE)
        embeds = self.load("embeds")
        return {kind: examples.Examples(kind, self.chosen.kinds[kind], tokens, embeds) for kind in kinds}


def _draw(run: Run) -> Tensors:
    """Every scene, and an eighth of them in pastel, too."""
    scenes = run.chosen.records
    log(f"{len(scenes)} scenes: " + ", ".join(f"{len(e)} {kind}" for kind, e in run.chosen.kinds.items()))
    return {"plain": examples.draw_all(scenes), "pastel": examples.draw_all(scenes[: len(scenes) // 8], "pastel")}


def _style(run: Run) -> Tensors:
    tokens = examples.normalized(run.load("vae"), run.drawn["pastel"], run.load("latents"))
    return loras.train_style(run.recipe, run.load("base"), run.edits, tokens)


PHASES: dict[str, Callable[[Run], Tensors]] = {
    "pictures": _draw,
    "vae": lambda run: autoencoder.train_vae(run.recipe, run.all_drawn),
    "latents": lambda run: examples.latents(run.load("vae"), run.drawn["plain"]),
    "decoder": lambda run: autoencoder.train_decoder(run.recipe, run.load("vae"), run.all_drawn),
    "embeds": lambda run: examples.embed(examples.encoders(run.work / "frame"), run.chosen, run.drawn["plain"]),
    "base": lambda run: flow.train_base(run.recipe, run.examples_of(*run.chosen.kinds)),
    "teacher": lambda run: loras.teach(run.recipe, run.load("base"), run.edits),
    "v1": lambda run: loras.train_v1(run.recipe, run.load("base"), run.edits, run.load("teacher")),
    "v2": lambda run: loras.train_v2(run.recipe, run.load("base"), run.edits, run.load("teacher"), run.load("v1")),
    "pastel": _style,
}


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
    values = dict(change.partition("=")[::2] for change in changes)
    known = [field.name for field in fields(Recipe)]
    for key in values.keys() - known:
        raise ValueError(f"--set {key}: the recipe has {', '.join(known)}")
    try:
        return TypeAdapter(Recipe).validate_strings(values)
    except ValidationError as error:
        raise ValueError(f"--set {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from error


def _same_recipe(recipe: Recipe, work: Path) -> None:
    """Refuse a work folder whose files another recipe left."""
    path = work / "recipe.json"
    mine = asdict(recipe)
    theirs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else mine
    for key, value in mine.items():
        if theirs.get(key) != value:
            raise ValueError(f"{work} was begun with {key}={theirs.get(key)}, not {value}: give another --work")
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
