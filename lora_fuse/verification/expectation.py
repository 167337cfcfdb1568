"""The deltas that LoRA files should add to weights, read and matched independently of the engine.

safetensors reads the files, numpy holds the factors, and a module means the weight whose dotted name is the longest
tail of its key. Nothing is refused here: what does not add up is listed, and fails the verification.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from lora_fuse.checkpoint import dtypes
from lora_fuse.lora import LoraInput, Selection

Array = npt.NDArray[Any]
Wide = npt.NDArray[np.float64]

KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_down|lora_up|lora_mid|lora_A|lora_B|lora\.down|lora\.up|lora_linear_layer\.down|"
    r"lora_linear_layer\.up|(?:hada|lokr)_\w+|diff_b|diff|alpha|dora_scale|lora_magnitude_vector)"
    r"(?:\.(?!bias$)[^.]+)??(?:\.weight|(?P<bias>\.bias))?"
)
BLOCK = 4 << 20  # bytes of a tensor that are compared at a time, so that they stay in a cache
DOWN = {"lora_down", "lora_A", "lora.down", "lora_linear_layer.down"}
UP = {"lora_up", "lora_B", "lora.up", "lora_linear_layer.up"}


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

    def nbytes(self, name: str) -> int:
        """Size of a tensor's data in bytes."""
        part = self._handles[name].get_slice(name)
        dtype = dtypes.DTYPES.get(part.get_dtype())
        return math.prod(map(int, part.get_shape())) * (dtype.bits if dtype else 8) // 8

    def same(self, other: Weights, name: str) -> bool:
        """True where a tensor has the same dtype, shape and bytes in both; read in blocks."""
        ours, theirs = (side._handles[name].get_slice(name) for side in (self, other))
        if (ours.get_dtype(), ours.get_shape()) != (theirs.get_dtype(), theirs.get_shape()):
            return False
        shape = ours.get_shape()
        if not shape:
            return self.tensor(name).tobytes() == other.tensor(name).tobytes()
        rows = max(1, BLOCK // max(1, 8 * math.prod(shape[1:])))
        blocks = (slice(row, min(row + rows, shape[0])) for row in range(0, shape[0], rows))
        return all(np.array_equal(_bytes(ours[block]), _bytes(theirs[block])) for block in blocks)

    def tensor(self, name: str) -> Array:
        """The whole tensor in its own dtype."""
        return np.asarray(self._handles[name].get_tensor(name))

    def rows(self, name: str, rows: npt.NDArray[np.int64]) -> Array:
        """Some rows of a matrix in its own dtype."""
        part = self._handles[name].get_slice(name)
        return np.concatenate([np.asarray(part[int(row) : int(row) + 1]) for row in rows])


def _bytes(values: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


@dataclass(frozen=True, slots=True)
class ExpectedDelta:
    """One file's part in one parameter: tensors by role, the file's factor and the user's scale."""

    parts: Mapping[str, Array]
    factor: float
    scale: float

    def rows(self, block: npt.NDArray[np.int64], base: Callable[[], Array]) -> Wide:
        """The delta of some rows, float64 (n, columns); `base` gives the whole parameter where it is needed."""
        if "dora" not in self.parts:
            return self._plain(block) * (self.factor * self.scale)
        weight = np.asarray(base()).astype(np.float64)
        weight = weight.reshape(len(weight), -1)
        inside = self.scale if self.parts["peft"] else 1.0
        moved = weight + self._plain(np.arange(len(weight))) * (self.factor * inside)
        lengths = self.parts["dora"].astype(np.float64)
        if lengths.size == len(weight):
            moved *= lengths.reshape(-1, 1) / np.linalg.norm(moved, axis=1, keepdims=True)
        else:
            by_input = moved.reshape(len(moved), lengths.size, -1)
            by_input *= lengths.reshape(1, -1, 1) / np.linalg.norm(by_input, axis=(0, 2)).reshape(1, -1, 1)
        outside = 1.0 if self.parts["peft"] else self.scale
        return np.asarray((moved - weight)[block] * outside)

    def _plain(self, block: npt.NDArray[np.int64]) -> Wide:
        wide = {name: part.astype(np.float64) for name, part in self.parts.items() if isinstance(part, np.ndarray)}
        if "diff" in wide:
            return _matrix(wide["diff"])[block]
        if "up" in wide:
            down = _matrix(wide["down"])
            if "lora_mid" in wide:
                down = np.tensordot(wide["lora_mid"], down, (1, 0)).transpose(0, 3, 1, 2)
            return np.asarray(_matrix(wide["up"])[block] @ _matrix(down))
        if "hada_w1_a" in wide:
            return np.asarray(np.multiply(*(_two(wide, "hada", n)[block] for n in (1, 2))))
        first, second = (_two(wide, "lokr", n) for n in (1, 2))
        return np.stack([np.kron(first[row // len(second)], second[row % len(second)]) for row in block])


def _matrix(part: Array) -> Array:
    return part.reshape(len(part), -1)


def _two(parts: Mapping[str, Wide], kind: str, n: int) -> Wide:
    """One of the two matrices that LoHa and LoKr are made of."""
    if f"{kind}_w{n}" in parts:
        return _matrix(parts[f"{kind}_w{n}"])
    a = parts[f"{kind}_w{n}_a"]
    b = parts[f"{kind}_w{n}_b"]
    if f"{kind}_t{n}" in parts:
        core = np.tensordot(a, parts[f"{kind}_t{n}"], (0, 0))  # out, rank, height, width
        return _matrix(np.tensordot(core, b, (1, 0)).transpose(0, 3, 1, 2))
    return np.asarray(a @ _matrix(b))


@dataclass(slots=True)
class Expected:
    """All deltas by the name of the base parameter, the number of updates in the files, and what did not add up."""

    deltas: dict[str, list[ExpectedDelta]] = field(default_factory=dict)
    modules: int = 0
    problems: list[str] = field(default_factory=list)


def read_expected(loras: Sequence[LoraInput], base: Weights, selection: Selection) -> Expected:
    """Work out what every LoRA should add at its scale; of `base`, only names are looked at."""
    found = Expected()
    flat = {name.rpartition(".")[0].replace(".", "_"): name.rpartition(".")[0] for name in base.names()}
    for given in loras:
        config = _configuration(given.path)
        for (module, kind), parts in _grouped_keys(given, found).items():
            found.modules += 1
            name = _longest_match(module, kind, base.names(), flat)
            if name is None or not _complete(parts):
                found.problems.append(f"{given.name}: {module} of the file has no {kind} in the base, or lacks a part")
                continue
            if (share := selection.share(name)) is not None:
                delta = ExpectedDelta(parts, _factor(module, parts, config), given.scale * share)
                found.deltas.setdefault(name, []).append(delta)
    return found


def _grouped_keys(given: LoraInput, found: Expected) -> dict[tuple[str, str], dict[str, Array]]:
    file = given.path / "adapter_model.safetensors" if given.path.is_dir() else given.path
    groups: dict[tuple[str, str], dict[str, Array]] = {}
    with safe_open(file, framework="np") as handle:
        for key in handle.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
            match = KEY.fullmatch(key)
            if match is None:
                found.problems.append(f"{given.name}: the key {key} is of no known kind")
                continue
            part = match["part"]
            value = np.asarray(handle.get_tensor(key))
            if match["bias"] or part == "diff_b":
                groups.setdefault((match["module"], "bias"), {})["diff"] = value
                continue
            parts = groups.setdefault((match["module"], "weight"), {})
            part = "down" if part in DOWN else "up" if part in UP else part
            if part in {"dora_scale", "lora_magnitude_vector"}:
                parts["peft"] = np.array(part != "dora_scale")
                part = "dora"
            parts[part] = value
    for (module, kind), parts in groups.items():
        weight = groups.get((module, "weight"), {})
        if kind == "bias" and "up" in weight:  # a LoRA's own bias is scaled as its product is
            parts.update({"of": weight["down"]} | {name: weight[name] for name in ("alpha",) if name in weight})
    return {place: parts for place, parts in groups.items() if set(parts) != {"alpha"} or place[1] == "weight"}


def _complete(parts: Mapping[str, Array]) -> bool:
    whole = [{"diff"}, {"up", "down"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}]
    sides = [{f"lokr_w{n}"} <= set(parts) or {f"lokr_w{n}_a", f"lokr_w{n}_b"} <= set(parts) for n in (1, 2)]
    return all(sides) or any(needed <= set(parts) for needed in whole)


def _factor(module: str, parts: Mapping[str, Array], config: Mapping[str, Any]) -> float:
    """The file's own factor of its product: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
    rows_are_rank = ("down", "of", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    rank = next((len(parts[name]) for name in rows_are_rank if name in parts), None)
    if rank is None:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    alphas = [value for pattern, value in patterns.items() if re.search(rf"(^|\.){pattern}$", module)]
    alpha: Any = [*alphas, config.get("lora_alpha")][0]
    if "alpha" in parts:
        alpha = parts["alpha"].reshape(-1)[0]
    return (rank if alpha is None else float(alpha)) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _longest_match(module: str, kind: str, names: set[str], flat: Mapping[str, str]) -> str | None:
    """The base's parameter whose dotted name, or its name with underscores, is the longest tail of `module`."""
    modules = _tails(module, ".")
    if "." not in module:
        modules += [flat[tail] for tail in _tails(module, "_") if tail in flat][:1]
    return next((f"{name}.{kind}" for name in modules if f"{name}.{kind}" in names), None)


def _tails(name: str, separator: str) -> list[str]:
    parts = name.split(separator)
    return [separator.join(parts[start:]) for start in range(len(parts))]


def _configuration(path: Path) -> dict[str, Any]:
    """PEFT's configuration beside or inside the file; empty without one."""
    if path.is_dir():
        text = (path / "adapter_config.json").read_text(encoding="utf-8")
    else:
        with safe_open(path, framework="np") as handle:
            text = (handle.metadata() or {}).get("lora_adapter_metadata", "{}")
    return {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
