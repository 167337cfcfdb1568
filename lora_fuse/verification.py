"""An independent re-derivation of a merge: other code, other libraries, another way to judge rounding.

The engine streams bytes by its own header reader and computes in torch. Here safetensors itself reads, numpy computes,
modules are found by the longest base name that a key ends in, and a value is right if it is *nearest*: no neighbour in
the weight's dtype lies closer to the float64 sum. A mistake in one is not repeated in the other.
"""

from __future__ import annotations

import filecmp
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from lora_fuse.errors import BadCheckpoint
from lora_fuse.lora import LoraInput

Array = npt.NDArray[Any]

KEY = re.compile(r"(?P<module>.+?)\.(?P<part>lora_down|lora_up|lora_A|lora_B|alpha)(\.weight)?")
PARTS = {"lora_down": "down", "lora_A": "down", "lora_up": "up", "lora_B": "up", "alpha": "alpha"}
SLACK = 1 + 1e-9  # float64 sums taken in another order differ by about 1e-16 of the value
SHOWN = 20  # problems that are spelled out; the rest is counted


@dataclass(slots=True)
class Verification:
    """What was checked and what was wrong. `problems` empty means that the merge is right as far as was looked."""

    modules: int = 0
    targets: int = 0
    rows_checked: int = 0
    rows_total: int = 0
    tensors_untouched: int = 0
    files_untouched: int = 0
    problem_count: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problem_count

    def problem(self, text: str) -> None:
        """Count a problem, and keep its text if it is one of the first."""
        self.problem_count += 1
        if len(self.problems) < SHOWN:
            self.problems.append(text)


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the merged repository's generated files should say; None or empty is not looked at."""

    pipeline: str | None = None
    scheduler: Mapping[str, object] = field(default_factory=dict)


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


def verify_merge(
    merged: Path,
    base: Path,
    loras: Sequence[LoraInput],
    *,
    component: str,
    rows: int | None,
    expected: Expectation,
) -> Verification:
    """Compare a merged checkpoint with what the base and the LoRAs should have given.

    Args:
        merged: the result, of the same kind as `base`.
        base: a pipeline folder, a component folder or one safetensors file.
        loras: what was fused, with the scales that were applied.
        component: the pipeline's component that was fused.
        rows: rows of each target to re-derive; None for all of them.
        expected: what the generated files should say.

    Raises:
        BadCheckpoint: one side has nothing to compare.
    """
    found = Verification()
    with ExitStack() as stack:
        base_files, merged_files = _weight_files(base, component), _weight_files(merged, component)
        if [file.name for file in base_files] != [file.name for file in merged_files] and base.is_dir():
            found.problem(f"shards differ: base {_names(base_files)}, merged {_names(merged_files)}")
        ours, theirs = Weights(merged_files, stack), Weights(base_files, stack)
        deltas = _all_deltas(loras, theirs, found)
        _check_tensors(ours, theirs, deltas, rows, found)
    if base.is_dir():
        _check_files(merged, base, {*base_files, *merged_files}, expected, found)
    return found


def _weight_files(root: Path, component: str) -> list[Path]:
    if root.is_file():
        return [root]
    folder = root / component if (root / "model_index.json").is_file() else root
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadCheckpoint(f"{folder} has no safetensors files to verify; is it a checkpoint?")
    return files


def _names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)


def _all_deltas(loras: Sequence[LoraInput], base: Weights, found: Verification) -> dict[str, list[Delta]]:
    deltas: dict[str, list[Delta]] = {}
    for given in loras:
        groups = _grouped_keys(given, found)
        found.modules += len(groups)
        for module, parts in groups.items():
            name = _longest_match(module, base.names())
            if name is None or "up" not in parts or "down" not in parts:
                found.problem(f"{given.name}: {module} of the file has no weight in the base, or lacks a factor")
                continue
            up, down = parts["up"].astype(np.float64), parts["down"].astype(np.float64)
            alpha = float(parts["alpha"].reshape(-1)[0]) if "alpha" in parts else _outer_alpha(given.path, len(down))
            deltas.setdefault(name, []).append(Delta(up, down, given.scale * alpha / len(down)))
    found.targets = len(deltas)
    return deltas


def _grouped_keys(given: LoraInput, found: Verification) -> dict[str, dict[str, Array]]:
    file = given.path / "adapter_model.safetensors" if given.path.is_dir() else given.path
    groups: dict[str, dict[str, Array]] = {}
    with safe_open(file, framework="np") as handle:
        for key in handle.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
            match = KEY.fullmatch(key)
            if match is None:
                found.problem(f"{given.name}: the key {key} is of no known kind")
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


def _check_tensors(
    merged: Weights, base: Weights, deltas: Mapping[str, list[Delta]], rows: int | None, found: Verification
) -> None:
    for name in sorted(base.names() ^ merged.names()):
        found.problem(f"{name} is only in the {'base' if name in base.names() else 'merged'} checkpoint")
    for name in sorted(base.names() & merged.names()):
        if name in deltas:
            _check_target(name, merged, base, deltas[name], rows, found)
        else:
            found.tensors_untouched += 1
            if merged.tensor(name).tobytes() != base.tensor(name).tobytes():
                found.problem(f"{name} is no target of any LoRA and differs from the base")


def _check_target(
    name: str, merged: Weights, base: Weights, deltas: Sequence[Delta], rows: int | None, found: Verification
) -> None:
    total = base.shape(name)[0]
    if merged.shape(name) != base.shape(name):
        found.problem(f"{name} has the shape {merged.shape(name)}, the base has {base.shape(name)}")
        return
    found.rows_total += total
    for block in _row_blocks(name, total, rows):
        exact = base.rows(name, block).astype(np.float64)
        for delta in deltas:
            exact += (delta.up[block] * delta.coefficient) @ delta.down
        wrong = ~is_nearest(merged.rows(name, block), exact)
        found.rows_checked += len(block)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            found.problem(
                f"{name}: {int(wrong.sum())} of {wrong.size} values looked at are not base + delta rounded once, "
                f"first [{block[row]}, {column}]: {merged.rows(name, block)[row, column]!s}, "
                f"expected {exact[row, column]:.9g}"
            )
            return


def _row_blocks(name: str, total: int, rows: int | None) -> Iterator[npt.NDArray[np.int64]]:
    """Row numbers to look at: all of them in blocks, or the first, the last and some drawn by the tensor's name."""
    if rows is None or rows >= total:
        yield from np.array_split(np.arange(total), math.ceil(total / 256))
        return
    drawn = np.random.default_rng(zlib.crc32(name.encode())).choice(total, size=rows, replace=False)
    yield np.unique(np.concatenate([drawn[: max(rows - 2, 0)], [0, total - 1]]))


def is_nearest(values: Array, exact: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether each value is the one of its dtype nearest to `exact`: no further than half-way to either neighbour."""
    wide = values.astype(np.float64)
    infinity = np.array(np.inf, dtype=values.dtype)
    up = np.nextafter(values, infinity).astype(np.float64)
    down = np.nextafter(values, -infinity).astype(np.float64)
    off = exact - wide
    return np.asarray((off <= (up - wide) / 2 * SLACK) & (-off <= (wide - down) / 2 * SLACK))


def _check_files(merged: Path, base: Path, weights: set[Path], expected: Expectation, found: Verification) -> None:
    generated = set()
    if expected.scheduler:
        generated.add(merged / "scheduler" / "scheduler_config.json")
        _check_json(merged / "scheduler" / "scheduler_config.json", expected.scheduler, found)
    if expected.pipeline is not None:
        generated.add(merged / "model_index.json")
        _check_json(merged / "model_index.json", {"_class_name": expected.pipeline}, found)
    for path in sorted(merged.rglob("*")):
        if path.is_dir() or path in weights or path in generated:
            continue
        twin = base / path.relative_to(merged)
        found.files_untouched += 1
        if not twin.is_file():
            found.problem(f"{path.relative_to(merged)} is not in the base and no recipe asks for it")
        elif not twin.samefile(path) and not filecmp.cmp(twin, path, shallow=False):
            found.problem(f"{path.relative_to(merged)} differs from the base's")


def _check_json(path: Path, wanted: Mapping[str, object], found: Verification) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found.problem(f"{path.name} cannot be read: {error}")
        return
    for key, value in wanted.items():
        if content.get(key) != value:
            found.problem(f"{path.name}: {key} is {content.get(key)!r}, the recipe says {value!r}")
