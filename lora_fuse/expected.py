"""What LoRA files should add to which weights, read and matched independently of the engine, for verification.

safetensors reads the files, numpy holds the factors, and a module means the weight whose dotted name is the longest
tail of its key. Nothing is refused here: what does not add up is listed, and fails the verification.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from lora_fuse.lora import LoraInput

Array = npt.NDArray[Any]

KEY = re.compile(r"(?P<module>.+?)\.(?P<part>lora_down|lora_up|lora_A|lora_B|alpha)(\.weight)?")
PARTS = {"lora_down": "down", "lora_A": "down", "lora_up": "up", "lora_B": "up", "alpha": "alpha"}


class Weights:
    """The tensors of the safetensors files in one place, by name, opened through safetensors."""

    def __init__(self, files: Sequence[Path], stack: ExitStack) -> None:
        self._handles: dict[str, Any] = {}
        for file in files:
            handle = stack.enter_context(safe_open(file, framework="np"))
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Array:
        """The whole tensor in its own dtype."""
        return np.asarray(self._handles[name].get_tensor(name))

    def rows(self, name: str, rows: npt.NDArray[np.int64]) -> Array:
        """Some rows of a matrix in its own dtype."""
        part = self._handles[name].get_slice(name)
        return np.concatenate([np.asarray(part[int(row) : int(row) + 1]) for row in rows])


@dataclass(frozen=True, slots=True)
class Delta:
    """One LoRA's part in one weight: ``coefficient * up @ down``."""

    up: Array  # B: (out_features, rank)
    down: Array  # A: (rank, in_features)
    coefficient: float


@dataclass(slots=True)
class Expected:
    """All deltas by the name of the base weight, the number of modules in the files, and what did not add up."""

    deltas: dict[str, list[Delta]] = field(default_factory=dict)
    modules: int = 0
    problems: list[str] = field(default_factory=list)


def read_expected(loras: Sequence[LoraInput], base: Weights) -> Expected:
    """Work out what every LoRA should add at its scale.

    Args:
        loras: what was fused, with the scales that were applied.
        base: the weights that they were fused into; only names are looked at.
    """
    found = Expected()
    for given in loras:
        groups = _grouped_keys(given, found)
        found.modules += len(groups)
        for module, parts in groups.items():
            name = _longest_match(module, base.names())
            if name is None or "up" not in parts or "down" not in parts:
                found.problems.append(
                    f"{given.name}: {module} of the file has no weight in the base, or lacks a factor"
                )
                continue
            up, down = parts["up"].astype(np.float64), parts["down"].astype(np.float64)
            alpha = float(parts["alpha"].reshape(-1)[0]) if "alpha" in parts else _outer_alpha(given.path, len(down))
            found.deltas.setdefault(name, []).append(Delta(up, down, given.scale * alpha / len(down)))
    return found


def _grouped_keys(given: LoraInput, found: Expected) -> dict[str, dict[str, Array]]:
    file = given.path / "adapter_model.safetensors" if given.path.is_dir() else given.path
    groups: dict[str, dict[str, Array]] = {}
    with safe_open(file, framework="np") as handle:
        for key in handle.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
            match = KEY.fullmatch(key)
            if match is None:
                found.problems.append(f"{given.name}: the key {key} is of no known kind")
                continue
            groups.setdefault(match["module"], {})[PARTS[match["part"]]] = np.asarray(handle.get_tensor(key))
    return groups


def _longest_match(module: str, names: set[str]) -> str | None:
    """The base weight whose dotted name is the longest tail of `module`."""
    parts = module.split(".")
    tails = (".".join([*parts[start:], "weight"]) for start in range(len(parts)))
    return next((tail for tail in tails if tail in names), None)


def _outer_alpha(path: Path, rank: int) -> float:
    """The alpha of a module without one in its keys: PEFT's configuration beside or inside the file, else the rank."""
    if path.is_dir():
        text = (path / "adapter_config.json").read_text(encoding="utf-8")
    else:
        with safe_open(path, framework="np") as handle:
            text = (handle.metadata() or {}).get("lora_adapter_metadata", "{}")
    alphas = [value for key, value in json.loads(text).items() if key.split(".")[-1] == "lora_alpha"]
    return float(alphas[0]) if alphas and alphas[0] is not None else float(rank)
