"""The deltas that LoRA files should add to weights, read and matched independently of the engine.

numpy computes, and a module means the weight whose dotted name is the longest tail of its key. Factors stay in their
file until rows are asked for. Nothing is refused here: what does not add up is listed, and fails the verification.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lora_fuse.errors import BadLora
from lora_fuse.lora import LoraInput, Selection
from lora_fuse.verification.nearest import Array, Wide, widen
from lora_fuse.verification.other_names import ABSENT, Numbers, OtherNames
from lora_fuse.verification.strength import Strength, configuration_of, read_strength
from lora_fuse.verification.weights import NUMBERS, Rows, StoredTensor, Weights, row_blocks

Part: TypeAlias = Array | StoredTensor
Groups = dict[tuple[str, str], dict[str, Part]]  # tensors by role, of each module's weight and bias

KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_down|lora_up|lora_mid|lora_A|lora_B|lora\.down|lora\.up|lora_linear_layer\.down|"
    r"lora_linear_layer\.up|(?:hada|lokr)_\w+|diff_[bm]|diff|[wb]_norm|set_weight|alpha|dora_scale|lora_magnitude_vector)"
    r"(?:\.(?!bias$)[^.]+)??(?:\.weight|(?P<bias>\.bias))?"
)
FILE_PREFIX = "model.diffusion_model."  # of names in a checkpoint for ComfyUI
RANK = 1024  # as large as any is
DOWN = {"lora_down", "lora_A", "lora.down", "lora_linear_layer.down"}
UP = {"lora_up", "lora_B", "lora.up", "lora_linear_layer.up"}


@dataclass(frozen=True, slots=True)
class ExpectedDelta:
    """One file's part in one parameter: tensors by role, the file's factor and the user's scale.

    `own` has for each row of the parameter the number of the delta's row, or `ABSENT`; None where they are the same.
    """

    parts: Mapping[str, Part]
    factor: float
    scale: float
    own: Numbers | None = None

    @property
    def seams(self) -> Rows:
        """The rows of the parameter beside which the delta's rows are not one after another."""
        if self.own is None:
            return np.array([], np.int64)
        breaks = np.flatnonzero(np.diff(self.own) != 1)
        return np.unique(np.concatenate([breaks, breaks + 1]))

    @property
    def factors(self) -> tuple[Wide, Wide] | None:
        """Two matrices whose product it is, (rows, rank) and (rank, columns); None where it is not a plain LoRA's."""
        if not {"up", "down"} <= self.parts.keys() or self.parts.keys() & {"lora_mid", "dora"}:
            return None
        up = _matrix(_values(self.parts["up"])) * (self.factor * self.scale)
        if self.own is not None:
            up = np.where((self.own == ABSENT)[:, None], 0.0, up[self.own])
        return up, _matrix(_values(self.parts["down"]))

    def derive(self, total: int, base: Callable[[Rows], Array]) -> Callable[[Rows], Wide]:
        """The function that gives the delta of some rows, float64 (n, columns).

        `base` gives rows of the parameter, of its `total` ones, where they are needed.

        Raises:
            ValueError: the delta has not so many rows, or lengths.
        """
        by_row = self.parts.get("up", self.parts.get("diff"))
        if "set" in self.parts and self.scale * self.factor != 1:
            raise ValueError(f"it replaces the weight, and its scale is {self.scale:g}")
        if self.own is not None:
            return self._in_own_rows(base)
        if by_row is not None and len(by_row) != total:
            raise ValueError(f"it has {len(by_row)} rows")
        if "set" in self.parts:
            return lambda block: self._plain(block) - widen(base(block)).reshape(len(block), -1)
        if "dora" not in self.parts:
            return lambda block: self._plain(block) * (self.factor * self.scale)
        lengths = _values(self.parts["dora"])
        if self._has_lengths_of_rows():
            return partial(self._by_output, base, np.broadcast_to(lengths.reshape(-1, 1), (total, 1)))
        squares = np.zeros(lengths.size)
        for block in row_blocks("", total, None):
            _, moved = self._moved(block, base)
            squares += np.square(moved).reshape(len(block), lengths.size, -1).sum(axis=(0, 2))
        return partial(self._by_input, base, lengths.reshape(-1) / np.sqrt(squares))

    def _has_lengths_of_rows(self) -> bool:
        lengths = _values(self.parts["dora"])
        return bool(_values(self.parts["peft"])) or lengths.size == 1 or lengths.shape[0] != 1

    def _in_own_rows(self, base: Callable[[Rows], Array]) -> Callable[[Rows], Wide]:
        """As `derive`, where the parameter has rows of the delta, perhaps among others, in which it adds nothing."""
        own = np.array(self.own)
        lengths = _values(self.parts["dora"]).reshape(-1, 1) if "dora" in self.parts else None
        if lengths is not None and not self._has_lengths_of_rows():
            raise ValueError("its lengths are of columns, and it is cut")

        def rows(block: Rows) -> Wide:
            weight = widen(base(block)).reshape(len(block), -1)
            added = np.zeros(weight.shape)
            mine = own[block] != ABSENT
            part = block[mine]
            if len(part) and lengths is None:
                added[mine] = self._plain(part) * (self.factor * self.scale)
                added[mine] -= weight[mine] if "set" in self.parts else 0
            elif len(part) and lengths is not None:
                placed = lengths[own if len(lengths) > 1 else np.zeros_like(own)]  # one may be for all
                added[mine] = self._by_output(base, placed, part)
            return added

        return rows

    def _moved(self, block: Rows, base: Callable[[Rows], Array]) -> tuple[Wide, Wide]:
        """Rows of the weight, and of the weight with the product added, before lengths are given."""
        weight = widen(base(block)).reshape(len(block), -1)
        inside = self.scale if _values(self.parts["peft"]) else 1.0
        return weight, weight + self._plain(block) * (self.factor * inside)

    def _by_output(self, base: Callable[[Rows], Array], lengths: Wide, block: Rows) -> Wide:
        """Each row has a length."""
        weight, moved = self._moved(block, base)
        outside = 1.0 if _values(self.parts["peft"]) else self.scale
        moved *= lengths[block] / np.linalg.norm(moved, axis=1, keepdims=True)
        return np.asarray((moved - weight) * outside)

    def _by_input(self, base: Callable[[Rows], Array], gains: Wide, block: Rows) -> Wide:
        """Each column has a length, and so its gain, or each input channel of a convolution."""
        weight, moved = self._moved(block, base)
        by_input = moved.reshape(len(block), len(gains), -1) * gains.reshape(1, -1, 1)
        return np.asarray((by_input.reshape(moved.shape) - weight) * self.scale)

    def _plain(self, block: Rows) -> Wide:
        parts = self.parts
        block = block if self.own is None else self.own[block]
        if "diff" in parts:
            return _matrix(_values(parts["diff"], block))
        if "up" in parts:
            down = _matrix(_values(parts["down"]))
            if "lora_mid" in parts:
                down = np.moveaxis(np.tensordot(_values(parts["lora_mid"]), down, (1, 0)), -1, 1)
            return np.asarray(_matrix(_values(parts["up"], block)) @ _matrix(down))
        if "hada_w1_a" in parts:
            return np.asarray(np.multiply(*(_two(parts, "hada", n, block) for n in (1, 2))))
        first, second = (_two(parts, "lokr", n) for n in (1, 2))
        return np.stack([np.kron(first[row // len(second)], second[row % len(second)]) for row in block])


def _values(part: Part, rows: Rows | None = None) -> Wide:
    """A part as float64, all of it or some rows."""
    if isinstance(part, StoredTensor):
        return widen(part.read(rows))
    return widen(part if rows is None else part[rows])


def _matrix(part: Wide) -> Wide:
    return part.reshape(len(part), -1)


def _two(parts: Mapping[str, Part], kind: str, n: int, rows: Rows | None = None) -> Wide:
    """One of the two matrices that LoHa and LoKr are made of, or some rows of it."""
    if f"{kind}_w{n}" in parts:
        return _matrix(_values(parts[f"{kind}_w{n}"], rows))
    b = _values(parts[f"{kind}_w{n}_b"])
    if f"{kind}_t{n}" in parts:
        a = _values(parts[f"{kind}_w{n}_a"])  # rank, out
        a = a if rows is None else a[:, rows]
        core = np.tensordot(a, _values(parts[f"{kind}_t{n}"]), (0, 0))  # out, rank, and the kernel's dimensions
        return _matrix(np.moveaxis(np.tensordot(core, b, (1, 0)), -1, 1))
    return np.asarray(_values(parts[f"{kind}_w{n}_a"], rows) @ _matrix(b))


@dataclass(slots=True)
class Expected:
    """All deltas by the name of the base parameter, the number of updates in the files, and what did not add up."""

    deltas: dict[str, list[ExpectedDelta]] = field(default_factory=dict)
    modules: int = 0
    problems: list[str] = field(default_factory=list)


def read_expected(
    loras: Sequence[LoraInput],
    base: Weights,
    selection: Selection,
    belongs: Callable[[LoraInput, str], bool] = lambda _, __: True,
) -> Expected:
    """Work out what every LoRA should add at its scale; of `base`, only names and shapes are looked at.

    `belongs` tells the keys that are for it.

    Raises:
        BadLora: a file cannot be opened.
    """
    found = Expected()
    stored = {name.removeprefix(FILE_PREFIX): name for name in sorted(base.names())}
    flat = {name.rpartition(".")[0].replace(".", "_"): name.rpartition(".")[0] for name in stored}
    most = _most_numbers(base)
    others = OtherNames({name: len(base[full]) for name, full in stored.items()})
    for given in loras:
        groups, strength, every = _read_file(given, most, found.problems, selection.leave_out, belongs)
        left = [key for key in every if belongs(given, key) and is_left_out(key, selection.leave_out)]
        modules = {key: match["module"] for key in left if (match := KEY.fullmatch(key))}
        found.problems += [
            f"{given.name}: {key} is left out, and the base has its module"
            for key, module in modules.items()
            if any(
                _longest_match(module, kind, stored.keys(), flat) or others.find(_names(module, kind))
                for kind in ("weight", "bias", "modulation")
            )
        ]
        added: dict[str, list[ExpectedDelta]] = {}
        for (module, kind), parts in groups.items():
            found.modules += 1
            try:
                name, places = _find(module, kind, parts, base, (stored, flat, others))
            except ValueError as error:
                found.problems.append(f"{given.name}: {module} of the file does not fit: {error}")
                continue
            if name is None or not _complete(parts):
                found.problems.append(f"{given.name}: {module} of the file has no {kind} in the base, or lacks a part")
                continue
            factor = strength.factor(module, name.rpartition(".")[0], parts)
            for place, own in places.items():
                if (share := selection.share(place)) is not None:
                    delta = ExpectedDelta(parts, factor, given.scale * share, own)
                    added.setdefault(stored[place], []).append(delta)
        for place, deltas in added.items():
            once, problem = _once(deltas, base[place].shape)
            found.deltas.setdefault(place, []).extend(once)
            found.problems += [f"{given.name}: {place}: {problem}"] if problem else []
        found.problems += [f"{given.name}: {problem}" for problem in dict.fromkeys(strength.problems)]
    return found


def _once(deltas: list[ExpectedDelta], shape: tuple[int, ...]) -> tuple[list[ExpectedDelta], str]:
    """The deltas of one file for a parameter of a shape: of two for the same rows, the one with more of them.

    Returns:
        These, and what is wrong, where two add other values to a row.
    """
    kept: list[tuple[npt.NDArray[np.bool_], ExpectedDelta]] = []
    masks = [np.ones(shape[:1], bool) if one.own is None else one.own != ABSENT for one in deltas]
    for mask, delta in sorted(zip(masks, deltas, strict=True), key=lambda pair: -int(pair[0].sum())):
        shared = [(mask & other, there) for other, there in kept if (mask & other).any()]
        if not shared:
            kept.append((mask, delta))
            continue
        if "dora" in delta.parts or "set" in delta.parts or (mask & ~kept[0][0]).any():
            return deltas, "two of its modules change the same rows"
        for rows, there in shared:
            for block in np.array_split(np.flatnonzero(rows), max(1, int(rows.sum()) // 64)):
                one, other = (each._plain(block) * each.factor for each in (delta, there))
                if not np.allclose(one, other, rtol=0, atol=2.0**-30 * np.abs(other).max(initial=0)):
                    return deltas, "two of its modules change the same rows, each in its own way"
    return [delta for _, delta in kept], ""


def _find(
    module: str,
    kind: str,
    parts: dict[str, Part],
    base: Weights,
    names: tuple[Mapping[str, str], Mapping[str, str], OtherNames],
) -> tuple[str | None, Mapping[str, Numbers | None]]:
    """The name that a module's parameter has, in either spelling, and the rows of the base's parameters that it is.

    Raises:
        ValueError: these are not as many.
    """
    stored, flat, others = names
    name = _longest_match(module, kind, stored.keys(), flat)
    if name is None and "diff" in parts and kind == "weight":  # a parameter that is no module's weight
        name = next((tail for tail in _tails(module, ".") if tail in stored), None)
    beginning = module[: -len(name.rpartition(".")[0])] if name else ""
    if name is not None and not re.search(r"\d[._]", beginning):
        return name, {name: None}
    other = others.find(_names(module, kind))  # `out.0` is not what a name means that ends in `to_out.0`
    if other is None or (name is not None and len(other[0]) <= len(name)):
        return name, {} if name is None else {name: None}
    places = {place: (rows, base[stored[place]].shape) for place, rows in other[1].items()}
    return other[0], _checked(parts, places)


def _most_numbers(base: Weights) -> int:
    """The most that a tensor of a LoRA can be of: a whole weight, a factor at a rank of 1024, a 3x3 kernel."""
    shapes = [base[name].shape for name in base.names()]
    return max(max(math.prod(shape), 9 * RANK * max((RANK, *shape))) for shape in shapes)


def is_left_out(key: str, patterns: Sequence[str]) -> bool:
    """True for a key that somebody leaves out on purpose."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _read_file(
    given: LoraInput,
    most: int,
    problems: list[str],
    leave_out: Sequence[str],
    belongs: Callable[[LoraInput, str], bool],
) -> tuple[Groups, Strength, set[str]]:
    """The tensors of a LoRA by module and role, what is said of their strength, and all keys of the file.

    Larger tensors than are of use stay unread, and so does what is left out or for another component.
    """
    file, config = configuration_of(given.path)
    groups: Groups = {}
    stored = Weights([file], BadLora)
    every = stored.names()
    known = {key for key in every if not is_left_out(key, leave_out)}
    keys = {key for key in known if belongs(given, key)}
    for key in sorted(keys):
        match = KEY.fullmatch(key)
        if match is None:
            problems.append(f"{file}: the key {key} is of no known kind")
        elif (size := math.prod(stored[key].shape)) > most:
            problems.append(f"{file}: {key} has {size} numbers, and for this base at most {most} are of use")
        elif stored[key].dtype not in NUMBERS:
            problems.append(f"{file}: {key} is {stored[key].dtype}, of which no numbers are read")
        elif not _put(match, stored[key], groups):
            problems.append(f"{file}: another key means the same as {key}")
    strength = read_strength(file, config, stored.metadata[file.name], known)
    for (module, kind), parts in groups.items():
        weight = groups.get((module, "weight"), {})
        if kind == "bias" and "of" in parts:  # a LoRA's own bias is scaled as its product is
            parts["of"] = weight.get("down", parts["of"])
            parts.update({name: weight[name] for name in ("alpha",) if name in weight})
    return (
        {place: parts for place, parts in groups.items() if set(parts) != {"alpha"} or place[1] == "weight"},
        strength,
        every,
    )


def _put(match: re.Match[str], value: StoredTensor, groups: Groups) -> bool:
    """Put a tensor where its key says; False where another one is there."""
    part = match["part"]
    kind = "bias" if match["bias"] or part in {"diff_b", "b_norm"} else "modulation" if part == "diff_m" else "weight"
    module = re.sub(r"\.to\.([qkv])$", r".to_\1", match["module"])  # as Anime-Z's LoRAs for Z-Image say it
    parts = groups.setdefault((module, kind), {})
    if kind != "weight" or part in {"diff", "w_norm", "set_weight"}:
        role = "diff"
        parts.update({"of": value} if match["bias"] else {})
        parts.update({"set": np.array(True)} if part == "set_weight" else {})
    elif part in {"dora_scale", "lora_magnitude_vector"}:
        role = "dora"
        parts["peft"] = np.array(part != "dora_scale")
    else:
        role = "down" if part in DOWN else "up" if part in UP else part
    free = role not in parts
    parts[role] = value.read() if role == "alpha" else value
    return free


def _complete(parts: Mapping[str, Part]) -> bool:
    whole = [{"diff"}, {"up", "down"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}]
    sides = [{f"lokr_w{n}"} <= set(parts) or {f"lokr_w{n}_a", f"lokr_w{n}_b"} <= set(parts) for n in (1, 2)]
    return all(sides) or any(needed <= set(parts) for needed in whole)


def _longest_match(module: str, kind: str, names: Collection[str], flat: Mapping[str, str]) -> str | None:
    """The base's parameter whose dotted name, or its name with underscores, is the longest tail of `module`."""
    modules = _tails(module, ".")
    if "." not in module:
        modules += [flat[tail] for tail in _tails(module, "_") if tail in flat][:1]
        modules += [flat[tail] for tail in (f"text_model_{tail}" for tail in _tails(module, "_")) if tail in flat][:1]
    modules += [f"text_model.{tail}" for tail in _tails(module, ".")]  # CLIP, before transformers 5
    return next((f"{name}.{kind}" for name in modules if f"{name}.{kind}" in names), None)


def _names(module: str, kind: str) -> list[str]:
    """The parameters that a module's tails may be; original norms call their weight a scale."""
    tails = _tails(module, "." if "." in module else "_")
    kinds = (".weight", "_weight", ".scale", "_scale", "") if kind == "weight" else (f".{kind}", f"_{kind}")
    return [tail + one for tail in tails for one in kinds]


def _checked(
    parts: dict[str, Part], places: Mapping[str, tuple[Numbers, tuple[int, ...]]]
) -> dict[str, Numbers | None]:
    """The rows of each parameter, None where they are all of the delta's in order; other dimensions are laid out so.

    Raises:
        ValueError: the parameters have another number of the delta's rows than it has.
    """
    rows = sum(int((own != ABSENT).sum()) for own, _ in places.values())
    ((first, shape), *more) = places.values()
    diff = parts.get("diff")
    if isinstance(diff, StoredTensor) and not more and len(diff) != rows and math.prod(diff.shape) == math.prod(shape):
        parts["diff"] = diff.read().reshape(shape)
    elif (count := _count_rows(parts)) != rows:
        raise ValueError(f"it has {count} rows, and {', '.join(places)} {rows}")
    whole = not more and np.array_equal(first, np.arange(rows))
    return {name: None if whole else own for name, (own, _) in places.items()}


def _count_rows(parts: Mapping[str, Part]) -> int:
    """Rows of the product that parts make."""
    if (whole := parts.get("up", parts.get("diff"))) is not None:
        return len(whole)
    if "hada_w1_a" in parts:
        return parts["hada_w1_a"].shape["hada_t1" in parts]
    sides = [parts.get(f"lokr_w{n}", parts.get(f"lokr_w{n}_a")) for n in (1, 2)]
    columns = "lokr_t2" in parts and "lokr_w2" not in parts
    return math.prod(side.shape[n == 2 and columns] for n, side in enumerate(sides, 1) if side is not None)


def _tails(name: str, separator: str) -> list[str]:
    parts = name.split(separator)
    return [separator.join(parts[start:]) for start in range(len(parts))]
