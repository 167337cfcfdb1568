"""The tensors of a base that stand for one weight, found by name, dtype and shape: codes, their scales, a description.

Containers, by source: ComfyUI's `comfy_quant` (comfy/ops.py and quant_ops.py) and its older `scaled_fp8` with a
`scale_weight` for each weight; float8 with a float32 `weight_scale` for each row, as diffusers reads it; float8 alone;
GGUF. A container says what the codes mean, or the weight is refused: no meaning is guessed from numbers.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fuse.checkpoint import Header, TensorInfo
from lora_fuse.checkpoint.stored.gguf_file import BY_NAME
from lora_fuse.checkpoint.stored.marks import BY_LAYER, MARKS
from lora_fuse.errors import BadCheckpoint
from lora_fuse.machine import files

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Scales = npt.NDArray[np.float32]

FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # dtypes of a header, and ComfyUI's names
BLOCK_TYPES = ("Q8_0", "Q4_K", "Q5_K", "Q6_K")  # of GGUF, that are decoded
OLD_MARKER = "scaled_fp8"
DESCRIPTION = "comfy_quant"
SCALES = ("weight_scale", "scale_weight")
ACTIVATIONS = ("input_scale", "scale_input")  # of a layer's input; a weight does without
KNOWN = {DESCRIPTION, *SCALES, *ACTIVATIONS}
LONGEST = 1 << 16  # bytes of a description
WAY_OUT = "take the base unquantised, in bf16, fp16 or fp32, and quantise the result"


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor, and the file that it is in."""

    path: Path
    tensor: TensorInfo


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A weight by its name, as it is stored: `format` of its codes, their place, and what multiplies them.

    `shape` is the weight's. `scales` are float32, of no dimension or (rows, 1), None where the codes are the values or
    hold their scales. `group` is that of a ConvRot rotation (arXiv:2512.03673), 0 for none. `scale` is the tensor of
    the scales, and `beside` has the names of what else goes with the codes and is not there once they are decoded.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    codes: Part
    scale: Part | None = None
    scales: Scales | None = None
    group: int = 0
    beside: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The format as a person, and a manifest, has it."""
        parts = [self.format]
        if self.scales is not None:
            parts.append("scaled by row" if self.scales.ndim else "scaled")
        if self.group:
            parts.append(f"convrot {self.group}")
        return ", ".join(parts)


@dataclass(slots=True)
class StoredWeights:
    """The weights of a base that are codes, by name; those that cannot be decoded, with the reason; and the markers.

    `markers` are tensors that say of the whole file that it is quantised.
    """

    matrices: dict[str, StoredMatrix] = field(default_factory=dict)
    refused: dict[str, BadCheckpoint] = field(default_factory=dict)
    markers: tuple[str, ...] = ()

    @property
    def beside(self) -> frozenset[str]:
        """The tensors that are there for codes only, and are not once all are decoded."""
        return frozenset(self.markers) | {name for matrix in self.matrices.values() for name in matrix.beside}

    @property
    def tensors(self) -> frozenset[str]:
        """All that is not what it stands for: codes, and what is beside them."""
        return self.beside | self.matrices.keys()


def find_stored(files_and_headers: Iterable[tuple[Path, Header]], where: str) -> StoredWeights:
    """Find the weights that are codes in the files of one component; scales and descriptions are read.

    Raises:
        BadCheckpoint: a header has a list of layers that cannot be read.
    """
    pairs = list(files_and_headers)
    parts = {name: Part(path, tensor) for path, header in pairs for name, tensor in header.tensors.items()}
    search = _Search(parts, _listed_layers(pairs), where)
    found = StoredWeights(markers=tuple(name for name in parts if _tail(name) == OLD_MARKER))
    search.marked = bool(found.markers)
    for name in (name for name in parts if name not in found.markers):
        try:
            if (matrix := search.matrix(name)) is not None:
                found.matrices[name] = matrix
        except BadCheckpoint as error:
            found.refused[name] = error
    return found


class _Search:
    """The tensors of a base, asked for one weight after another."""

    def __init__(self, parts: Mapping[str, Part], layers: Mapping[str, object], where: str) -> None:
        self._parts = parts
        self._layers = layers
        self._where = where
        self.marked = False
        self._beside: defaultdict[str, dict[str, Part]] = defaultdict(dict)
        for name, part in parts.items():
            module, _, tail = name.rpartition(".")
            if tail not in ("weight", "bias"):
                self._beside[module][tail] = part

    def matrix(self, name: str) -> StoredMatrix | None:
        """A weight, if it is codes.

        Raises:
            BadCheckpoint: it is codes, and what they mean is not known or not said.
        """
        part = self._parts[name]
        dtype = part.tensor.dtype
        module, _, tail = name.rpartition(".")
        beside = self._beside.get(module, {}) if tail == "weight" else {}
        self._refuse_unknown(name, module, beside)
        if dtype in BY_NAME and BY_NAME[dtype].block > 1:
            return self._of_blocks(name, part)
        said = self._description(name, module, beside) if tail == "weight" else None
        if said is not None:
            return self._described(name, part, beside, said)
        scale = next((one for one in SCALES if one in beside), None)
        if dtype in FLOAT8 and (scale is None and not (self.marked and len(part.tensor.shape) > 1)):
            return StoredMatrix(name, FLOAT8[dtype], part.tensor.shape, part)
        if dtype in FLOAT8:
            return self._scaled(name, FLOAT8[dtype], part, beside)
        if scale is not None:
            raise self._refusal(name, f"{module}.{scale}", str(_words_of(scale)))
        return None

    def _refuse_unknown(self, name: str, module: str, beside: Mapping[str, Part]) -> None:
        for owner, others in ((module, beside), (name, self._beside.get(name, {}))):
            for tail in others:
                if (owner is name or tail not in KNOWN) and (words := _words_of(tail, owner is name)):
                    raise self._refusal(name, f"{owner}.{tail}", words)

    def _refusal(self, name: str, evidence: str, words: str) -> BadCheckpoint:
        return BadCheckpoint(
            f"{self._where}: {name!r} is quantised, as {evidence!r} says ({words}), and that is not decoded; {WAY_OUT}"
        )

    def _of_blocks(self, name: str, part: Part) -> StoredMatrix:
        dtype = part.tensor.dtype
        shape = part.tensor.shape
        if dtype not in BLOCK_TYPES:
            raise BadCheckpoint(
                f"{self._where}: {name!r} is quantised as {dtype}, and decoded are {', '.join(BLOCK_TYPES)}; {WAY_OUT}"
            )
        if not shape or math.prod(shape[1:]) % BY_NAME[dtype].block:
            raise BadCheckpoint(
                f"{self._where}: {name!r} is {dtype}, {list(shape)}, and {BY_NAME[dtype].block} values, a block, would "
                f"lie in two rows; {WAY_OUT}"
            )
        return StoredMatrix(name, dtype, part.tensor.shape, part)

    def _description(self, name: str, module: str, beside: Mapping[str, Part]) -> Mapping[str, Any] | None:
        """The description of a module's weight, by a tensor or an entry of the header."""
        said: object
        evidence = f"{module}.{DESCRIPTION}"
        if (part := beside.get(DESCRIPTION)) is not None:
            if part.tensor.dtype != "U8" or part.tensor.nbytes > LONGEST:
                raise self._refusal(
                    name, evidence, f"{part.tensor.dtype} {list(part.tensor.shape)}, and ComfyUI's is a text"
                )
            try:
                said = files.parse_json(_read(part).decode())
            except ValueError as error:
                raise self._refusal(name, evidence, "ComfyUI's, and no text of JSON") from error
        else:
            tails = (module[start:] for start in _starts(module))
            listed = next((tail for tail in tails if tail in self._layers), None)
            if listed is None:
                return None
            said = self._layers[listed]
            evidence = f"{BY_LAYER} in the header"
        if not isinstance(said, dict) or not isinstance(said.get("format"), str):
            raise self._refusal(name, evidence, f"no format in it: {str(said)[:60]}")
        return {**said, "evidence": evidence}

    def _described(self, name: str, part: Part, beside: Mapping[str, Part], said: Mapping[str, Any]) -> StoredMatrix:
        kind = said["format"]
        dtype = "I8" if kind == "int8_tensorwise" else next((key for key, one in FLOAT8.items() if one == kind), None)
        if dtype is None:
            known = ", ".join([*FLOAT8.values(), "int8_tensorwise"])
            raise self._refusal(name, said["evidence"], f"ComfyUI's format {kind!r}; known are {known}")
        if part.tensor.dtype != dtype:
            words = f"ComfyUI's {kind}, whose codes are {dtype}, and the weight is {part.tensor.dtype}"
            raise self._refusal(name, said["evidence"], words)
        return self._scaled(name, kind, part, beside, self._group(name, part, said))

    def _group(self, name: str, part: Part, said: Mapping[str, Any]) -> int:
        """The group of the rotation that a description asks for."""
        inner = said.get("params")
        settings = {**(inner if isinstance(inner, dict) else {}), **said}
        if not settings.get("convrot"):
            return 0
        group = settings.get("convrot_groupsize", 256)
        columns = part.tensor.shape[-1] if part.tensor.shape else 0
        fits = type(group) is int and group >= 4 and math.log(group, 4).is_integer() and columns % group == 0
        if said["format"] != "int8_tensorwise" or not fits:
            words = f"convrot in groups of {group!r}, of {said['format']}, and rows of {columns}"
            raise self._refusal(name, said["evidence"], words)
        return int(group)

    def _scaled(self, name: str, kind: str, part: Part, beside: Mapping[str, Part], group: int = 0) -> StoredMatrix:
        """Codes with a scale beside them, for the whole matrix or for each row."""
        held = [tail for tail in SCALES if tail in beside]
        module = name.rpartition(".")[0]
        if len(held) != 1:
            there = " and ".join(held) or f"no {' or '.join(SCALES)}"
            raise BadCheckpoint(
                f"{self._where}: {name!r} is {kind} with a scale, and beside it is {there}; get a whole copy"
            )
        scale = beside[held[0]]
        rows = part.tensor.shape[0] if len(part.tensor.shape) == 2 else 0
        if scale.tensor.dtype != "F32" or scale.tensor.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)) or not rows:
            raise BadCheckpoint(
                f"{self._where}: {module}.{held[0]} is {scale.tensor.dtype} {list(scale.tensor.shape)}, and the scale "
                f"of {name!r}, {list(part.tensor.shape)}, would be F32 of one value or [{rows}, 1]; {WAY_OUT}"
            )
        scales = _float32(scale)
        if not (scales >= 0).all() or not (scales < math.inf).all():
            bad = scales[~((scales >= 0) & (scales < math.inf))][0]
            raise BadCheckpoint(f"{self._where}: {module}.{held[0]} holds {bad}, which is no scale; {WAY_OUT}")
        by_row = scale.tensor.shape in ((rows,), (rows, 1)) and rows > 1
        others = tuple(f"{module}.{tail}" for tail in beside if tail in KNOWN)
        scales = scales.reshape((rows, 1) if by_row else ())
        return StoredMatrix(name, kind, part.tensor.shape, part, scale, scales, group, others)


def _words_of(tail: str, behind_weight: bool = False) -> str | None:
    """The format that a tensor's last name, or with `weight.` before it, is a mark of; None if of none that is sure."""
    names = [f"weight.{tail}"] if behind_weight else [tail]
    return next((mark.what for mark in MARKS if any(mark.names.fullmatch(name) for name in names)), None)


def _listed_layers(pairs: Iterable[tuple[Path, Header]]) -> dict[str, object]:
    """The layers that a header lists, with what it says of each.

    Raises:
        BadCheckpoint: it has a list that cannot be read, so that codes would be taken for what they are not.
    """
    found: dict[str, object] = {}
    for path, header in pairs:
        try:
            said = files.parse_json(header.metadata.get(BY_LAYER, '{"layers": {}}'))
            found |= {str(layer): one for layer, one in said["layers"].items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadCheckpoint(
                f"{path}: {BY_LAYER} in its header is no JSON with layers ({error}), and it says what codes mean; "
                "fetch it again"
            ) from error
    return found


def _starts(module: str) -> list[int]:
    """The places at which a name begins, and what is left of it behind each dot."""
    return [0, *(match.end() for match in re.finditer(r"\.", module))]


def _tail(name: str) -> str:
    return name.rpartition(".")[2]


def _read(part: Part) -> bytes:
    try:
        with files.open_regular(part.path) as file:
            file.seek(part.tensor.start)
            return file.read(part.tensor.nbytes)
    except OSError as error:
        raise BadCheckpoint(f"cannot read {part.path}: {error.strerror}") from error


def _float32(part: Part) -> Scales:
    import numpy as np

    values: Scales = np.frombuffer(_read(part), "<f4").reshape(part.tensor.shape).astype(np.float32)
    return values
