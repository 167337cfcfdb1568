"""The components of a pipeline that LoRAs should be in, told apart by their keys in other lines than the engine's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_fuse.errors import BadCheckpoint, BadLora
from lora_fuse.lora import LoraInput, Selection
from lora_fuse.machine import files
from lora_fuse.verification.expectation import Expected, is_left_out, read_expected
from lora_fuse.verification.strength import configuration_of
from lora_fuse.verification.weights import Weights
from lora_fuse.verification.whole_files import INDEX

KOHYA = re.compile(r"lora_te(\d?)_")
FOLDER = re.compile(r"(text_encoder(?:_\d+)?|transformer_\d+|vae)\.")
ENCODER = ("text_model.", "conditioner.", "text_encoder", "lora_text_encoder", "lora_te")


@dataclass(frozen=True, slots=True)
class Components:
    """The components of a build and what is fused into them; a base that is no pipeline is one without a name.

    `main` is for keys that name none, of LoRAs that name none. `left_out` is the number of keys that were left out on
    purpose, of all LoRAs.
    """

    loras: Sequence[LoraInput]
    selection: Selection
    main: str
    names: tuple[str, ...]
    left_out: int
    problems: tuple[str, ...] = ()

    def expected(self, component: str, stored: Weights) -> Expected:
        """Work out what LoRAs should add to the weights of a component.

        Raises:
            BadLora: see `read_expected`.
        """
        return read_expected(self.loras, stored, self.selection, partial(self._has, component))

    def _has(self, component: str, given: LoraInput, key: str) -> bool:
        return not component or (_said(key) or given.component or self.main) == component


def find_components(base: Path, loras: Sequence[LoraInput], selection: Selection) -> Components:
    """Find the components that LoRAs are for.

    Raises:
        BadCheckpoint, BadLora: the index of the pipeline, or a LoRA, cannot be read.
    """
    keys_of = [(given, Weights([configuration_of(given.path)[0]], BadLora).names()) for given in loras]
    left_out = sum(is_left_out(key, selection.leave_out) for _, keys in keys_of for key in keys)
    if not (base / INDEX).is_file():
        return Components(loras, selection, "", ("",), left_out)
    index = files.read_json(base / INDEX, dict, BadCheckpoint)
    main = "unet" if "unet" in index and not (base / "transformer").is_dir() else "transformer"
    found: set[str] = set()
    problems = []
    for given, every in keys_of:
        keys = [key for key in every if not is_left_out(key, selection.leave_out)]
        said = {_said(key) or given.component or main for key in keys}
        if given.component is not None:
            others = sorted(said - {given.component})
            problems += [f"{given.name} is for {given.component}, and holds keys of {name}" for name in others]
        found |= said
    names = tuple(sorted(found, key=lambda name: (name != main, name)))
    return Components(loras, selection, main, names or (main,), left_out, tuple(problems))


def _said(key: str) -> str | None:
    """The folder that a key itself names."""
    if match := KOHYA.match(key):
        return f"text_encoder_{match[1]}" if match[1] > "1" else "text_encoder"
    if match := FOLDER.match(key):
        return match[1]
    return "text_encoder" if key.startswith(ENCODER) else None
