"""The meaning of a LoRA file's keys: the delta of each module. Pure: names, shapes and scalars in, deltas out.

Every key is consumed, or the file is refused. `key_formats` knows the names, `deltas` the arithmetic.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from lora_fuse.checkpoint import TensorInfo
from lora_fuse.errors import BadLora, FactorMismatch
from lora_fuse.lora.key_formats import FORMATS, Algorithm, KeyFormat, component_of, read_key, unread_kind
from lora_fuse.lora.scaling import StatedScale, scale_of

SHOWN = 3  # offenders that an error names
LEAVE_OUT = "; or leave them out on purpose: --leave-out PATTERN (fuse.leave_out)"
LARGE_RANK = 1024  # what a rank may be in a weight of any size; above, no more than its longer side
Roles = dict[str, TensorInfo]
Part = Literal["weight", "bias", "modulation"]
PARTS: tuple[Part, ...] = get_args(Part)
WHOLE: Mapping[str, Part] = {"diff": "weight", "set": "weight", "diff bias": "bias", "diff modulation": "modulation"}


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """One parameter's delta in a LoRA file, under the names of the file.

    `keys` are the tensors' names by role (see `key_formats`), `shape` the rows and columns of the delta as
    a matrix. The product of the tensors is multiplied by `factor`, which is made of `alpha` and `rank`; both are None
    where the algorithm has none. A `part` called weight may be a parameter that has the module's own name. `said_by` is
    the place that says alpha: the tensor, or an entry outside the tensors.
    """

    module: str
    part: Part
    format: KeyFormat
    keys: Mapping[str, str]
    shape: tuple[int, int]
    rank: int | None = None
    alpha: float | None = None
    factor: float = 1.0
    said_by: str = "the algorithm has none"

    @property
    def algorithm(self) -> str:
        """The algorithm's name, with DoRA or without."""
        return f"{self.format.algorithm} with DoRA" if self.has_dora else str(self.format.algorithm)

    @property
    def has_dora(self) -> bool:
        """True where the rows or columns of the result are given a length of their own."""
        return "dora_scale" in self.keys or "magnitude" in self.keys

    @property
    def component(self) -> str | None:
        """The folder of the component that it is for; None for the main one, or whichever somebody names."""
        return component_of(self.module)

    @property
    def is_replacement(self) -> bool:
        """True for values that are put in the place of the base's."""
        return self.format.algorithm is Algorithm.SET

    @property
    def is_plain(self) -> bool:
        """True for a low-rank product and nothing more."""
        return self.algorithm == str(Algorithm.LORA)

    @property
    def description(self) -> str:
        """Algorithm, key format, rank and alpha, for a reader."""
        text = f"{self.algorithm}, keys {self.format.name}"
        if self.rank is None or self.alpha is None:
            return text
        return f"{text}, rank {self.rank}, alpha {self.alpha:g} (factor {self.factor:g})"

    @property
    def strength(self) -> str:
        """Factor and alpha, and the place that says them, for a reader."""
        alpha = "" if self.alpha is None else f"alpha {self.alpha:g}, "
        return f"factor {self.factor:g} ({alpha}{self.said_by})"


def parse_lora(
    tensors: Mapping[str, TensorInfo], alphas: Mapping[str, float], stated: Sequence[StatedScale], where: str
) -> tuple[LoraDelta, ...]:
    """Group a file's keys into deltas, every key exactly once.

    `alphas` are the values of its `.alpha` keys, `stated` what other places say of strength and kind.

    Raises:
        BadLora: the file is empty, or a key is of no known format, twice there or alone.
        FactorMismatch: tensors of one module do not fit each other, or not what is stated.
    """
    if not tensors:
        raise BadLora(f"{where} is empty: it has no tensors")
    modules = _modules(tensors, alphas, stated, where)
    deltas = [delta for module in modules for delta in module.deltas()]
    if lone := [key for module in modules for key in module.left()]:
        raise BadLora(
            f"{where}: {len(lone)} of {len(tensors)} keys have no partner ({_first(lone)}); "
            "the file is incomplete, fetch or export it again"
        )
    for place in stated:
        _check_kind(place, deltas, where)
    return tuple(sorted(deltas, key=lambda delta: (delta.module, delta.part)))


def _check_kind(place: StatedScale, deltas: Sequence[LoraDelta], where: str) -> None:
    """Compare what a place says of DoRA, biases and patterns with the tensors that are there."""
    dora = any(delta.has_dora for delta in deltas)
    bias = any("up bias" in delta.keys for delta in deltas)
    for name, said, found in (("use_dora", place.dora, dora), ("lora_bias", place.bias, bias)):
        if said is not None and said != found:
            tensors = "has" if found else "has no"
            raise BadLora(f"{where}: {place.where} sets {name}={said}, and the file {tensors} tensors of it")
    if (place.rank_pattern or place.alpha_pattern) and not any("." in delta.module for delta in deltas):
        raise BadLora(
            f"{where}: {place.where} has patterns for names with dots, and the file's have underscores instead "
            f"(first {deltas[0].module!r}); use the file that the configuration was written for"
        )


def _modules(
    tensors: Mapping[str, TensorInfo], alphas: Mapping[str, float], stated: Sequence[StatedScale], where: str
) -> list[_Module]:
    modules: dict[str, _Module] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        read = read_key(key)
        if read is None:
            unknown.append(key)
            continue
        name, format_, role = read
        module = modules.setdefault(name, _Module(name, alphas, stated, where))
        roles = module.shared if format_ is None else module.rows[format_.name]
        if role in roles:
            raise BadLora(f"{where}: {roles[role].name!r} and {key!r} mean the same; a file may hold one adapter only")
        roles[role] = tensor
    if unknown:
        kinds = sorted({kind for key in unknown if (kind := unread_kind(key)) is not None})
        known = f"it has {', '.join(kinds)}" if kinds else f"known are {', '.join(row.name for row in FORMATS)}"
        raise BadLora(
            f"{where}: {len(unknown)} of {len(tensors)} keys belong to no known format ({_first(unknown)}); "
            f"{known}{LEAVE_OUT}"
        )
    return list(modules.values())


def _first(keys: Sequence[str]) -> str:
    return "first " + ", ".join(repr(key) for key in sorted(keys)[:SHOWN])


@dataclass(frozen=True, slots=True)
class _Module:
    """The tensors of one module, by format and role, and those that go with any format; taken until none is left."""

    name: str
    alphas: Mapping[str, float]
    stated: Sequence[StatedScale]
    where: str
    rows: dict[str, Roles] = field(default_factory=lambda: defaultdict(dict))
    shared: Roles = field(default_factory=dict)

    def deltas(self) -> Iterator[LoraDelta]:
        """The deltas of the module: of its weight, of its bias, or of both."""
        for row in FORMATS:
            roles = self.rows.get(row.name, {})
            match row.algorithm:
                case Algorithm.LORA if {"down", "up"} <= roles.keys():
                    yield from self._lora(row, roles)
                case Algorithm.LOHA if {"w1_a", "w1_b", "w2_a", "w2_b"} <= roles.keys():
                    yield self._loha(row, roles)
                case Algorithm.LOKR if _has_both_sides(roles):
                    yield self._lokr(row, roles)
                case Algorithm.FULL | Algorithm.SET:
                    yield from self._full(row, roles)

    def left(self) -> list[str]:
        """The keys that no delta took."""
        return [tensor.name for roles in (*self.rows.values(), self.shared) for tensor in roles.values()]

    def _lora(self, row: KeyFormat, roles: Roles) -> Iterator[LoraDelta]:
        taken = _take(roles, "down", "up", "mid")
        down = taken["down"]
        up = taken["up"]
        mid = taken.get("mid")
        rank = down.shape[0] if down.shape else 0
        fits = len(down.shape) >= 2 and up.shape[1:] == (rank, *[1] * (len(up.shape) - 2)) and rank
        kernel: tuple[int, ...] = ()
        if mid is not None:
            kernel = mid.shape[2:]
            fits = fits and mid.shape[:2] == (rank, rank) and set(down.shape[2:]) <= {1}
        if not fits:
            raise self._mismatch(taken, "[out, rank] times [rank, in]")
        shape = (up.shape[0], math.prod(down.shape[1:]) * math.prod(kernel))
        bias = roles.pop("up bias", None)
        delta = self._scaled(row, taken, shape, rank)
        yield delta
        if bias is not None:
            if bias.shape != (shape[0],):
                raise self._mismatch({"bias": bias, "up": up}, "a bias of [out]")
            yield replace(delta, part="bias", keys={"up bias": bias.name}, shape=(shape[0], 1))

    def _loha(self, row: KeyFormat, roles: Roles) -> LoraDelta:
        taken = _take(roles, "w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
        if ("t1" in taken) != ("t2" in taken):
            raise self._mismatch(taken, "hada_t1 and hada_t2 together")
        shapes = [self._product(taken, n) for n in (1, 2)]
        if shapes[0][0] != shapes[1][0]:
            raise self._mismatch(taken, "two products of one shape")
        return self._scaled(row, taken, *shapes[0])

    def _lokr(self, row: KeyFormat, roles: Roles) -> LoraDelta:
        taken = _take(roles, "w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        sides = []
        ranks = set()
        for n in (1, 2):
            if f"w{n}" in taken:
                whole = taken[f"w{n}"].shape
                if len(whole) < 2 or f"w{n}_a" in taken or f"w{n}_b" in taken:
                    raise self._mismatch(taken, f"lokr_w{n} as one matrix, or as two factors")
                sides.append((whole[0], math.prod(whole[1:])))
            else:
                side, rank = self._product(taken, n)
                sides.append(side)
                ranks.add(rank)
        if len(ranks) > 1:
            raise self._mismatch(taken, "factors of one rank")
        shape = (sides[0][0] * sides[1][0], sides[0][1] * sides[1][1])
        return self._scaled(row, taken, shape, ranks.pop() if ranks else None)

    def _product(self, taken: Roles, n: int) -> tuple[tuple[int, int], int]:
        """Shape and rank of side n, ``a @ b``; with a Tucker core of ``core[i, j] * a[i] * b[j]``."""
        left = taken[f"w{n}_a"].shape
        right = taken[f"w{n}_b"].shape
        if len(left) != 2 or len(right) < 2:
            raise self._mismatch(taken, "matrices")
        rank = right[0]
        if f"t{n}" not in taken:
            if left[1] != rank or not rank:
                raise self._mismatch(taken, "[out, rank] times [rank, in]")
            return (left[0], math.prod(right[1:])), rank
        core = taken[f"t{n}"].shape
        if len(right) != 2 or core[:2] != (left[0], rank) or not rank:
            raise self._mismatch(taken, "a core of [rank, rank, height, width]")
        return (left[1], right[1] * math.prod(core[2:])), rank

    def _full(self, row: KeyFormat, roles: Roles) -> Iterator[LoraDelta]:
        for role, part in WHOLE.items():
            tensor = roles.pop(role, None)
            if tensor is None:
                continue
            if not tensor.shape:
                raise self._mismatch({role: tensor}, "a tensor of the parameter's shape")
            shape = (tensor.shape[0], math.prod(tensor.shape[1:]))
            keys = {"diff": tensor.name}
            if role == "diff":
                keys |= self._take_magnitude(shape)
            yield LoraDelta(self.name, part, row, keys, shape)

    def _scaled(self, row: KeyFormat, taken: Roles, shape: tuple[int, int], rank: int | None) -> LoraDelta:
        keys = {role: tensor.name for role, tensor in taken.items()} | self._take_magnitude(shape)
        own = self.shared.pop("alpha", None)
        if rank is None:  # LoKr of two whole matrices: LyCORIS and its readers do not apply an alpha there
            return LoraDelta(self.name, "weight", row, keys, shape)
        if rank > max(LARGE_RANK, *shape):
            raise FactorMismatch(
                f"{self.where}: {self.name!r} has rank {rank} for a delta of {shape[0]}x{shape[1]}, and no more than "
                f"{max(LARGE_RANK, *shape)} is of use; its factors would fill the memory, fetch or export it again"
            )
        scale = scale_of(self.name, rank, None if own is None else self.alphas[own.name], self.stated, self.where)
        return LoraDelta(self.name, "weight", row, keys, shape, rank, scale.alpha, scale.factor, scale.where)

    def _take_magnitude(self, shape: tuple[int, int]) -> dict[str, str]:
        taken = _take(self.shared, "dora_scale", "magnitude")
        if len(taken) > 1:
            raise BadLora(
                f"{self.where}: {self.name!r} has both dora_scale and lora_magnitude_vector; which one counts?"
            )
        for role, tensor in taken.items():
            by_row = math.prod(tensor.shape) == shape[0]
            by_column = role == "dora_scale" and tensor.shape[:1] == (1,) and shape[1] % math.prod(tensor.shape) == 0
            if not by_row and not by_column:
                raise self._mismatch(taken, f"one magnitude for each of {shape[0]} rows or {shape[1]} columns")
        return {role: tensor.name for role, tensor in taken.items()}

    def _mismatch(self, taken: Roles, expected: str) -> FactorMismatch:
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in taken.items())
        return FactorMismatch(f"{self.where}: the tensors of {self.name!r} do not fit: {shapes}; expected {expected}")


def _take(roles: Roles, *names: str) -> Roles:
    return {name: roles.pop(name) for name in names if name in roles}


def _has_both_sides(roles: Roles) -> bool:
    return all(f"w{n}" in roles or {f"w{n}_a", f"w{n}_b"} <= roles.keys() for n in (1, 2))
