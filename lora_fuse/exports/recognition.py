"""Is an export what its readers take it for? Its names, shapes, codes, marks and flags are held against `engine_keys`.

Three kinds of files are told by what is in them: marks `comfy_quant` and plain weights are ComfyUI's, scales of rows
without a mark are for diffusers 0.42.1 (`BFLQuantizationConfig`), and GGUF is ComfyUI-GGUF's (loader.py at 001ffcf0),
diffusers' and stable-diffusion.cpp's. Values are not looked at: a scale that is wrong, or tiles in another order, are
seen by who decodes the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from lora_fuse.checkpoint import Header, TensorInfo, read_header
from lora_fuse.checkpoint.stored import open_gguf
from lora_fuse.errors import BadCheckpoint
from lora_fuse.exports.engine_keys import (
    CODES,
    FAMILIES,
    FLOATS,
    MARK,
    MOST_OF_MARK,
    NEWEST,
    OLD_MARK,
    OLD_SCALE,
    PREFIXED,
    PREFIXES,
    SCALE,
    VERSIONS,
    BuiltModel,
    ComfyVersion,
    Settings,
    Shape,
)
from lora_fuse.machine import files

UNKNOWN_FLAG = "{flag} is not known to this version of ComfyUI, which draws a model with {setting} as one without"


def problems(path: Path, config: Settings, version: str = NEWEST) -> list[str]:
    """Points in which an export of a transformer with this `config.json` is not read as it is meant.

    `version` is ComfyUI's, for the files that it reads.

    Raises:
        BadCheckpoint: nothing is known of such a model, or the file is neither safetensors nor GGUF.
    """
    family = _family(config)
    if path.suffix == ".gguf":
        return list(_in_gguf(path, family, config, VERSIONS[version]))
    reader = VERSIONS[version]
    left = _without_prefix(read_header(path))
    if family.told_by not in left:
        return [f"{family.told_by} is missing, by which ComfyUI tells such a model"]
    expected = family.shapes(config)
    found = list(_flags(family, config, reader, left))
    ends = {name.rpartition(".")[2] for name in left}
    is_rows = SCALE in ends and MARK not in ends
    old = left.pop(OLD_MARK, None) is not None
    for name, shape in expected.items():
        module = name.rpartition(".")[0]
        is_matrix = name.endswith(".weight") and len(shape) == 2
        mark = left.pop(f"{module}.{MARK}", None) if is_matrix else None
        tensor = left.pop(name, None)
        if tensor is None:
            found.append(f"{name} is missing")
        elif mark is not None and not reader.formats:
            found.append(f"{module}.{MARK} is not known to ComfyUI {version}, which reads the codes as values")
        elif mark is not None:
            found += _quantised(tensor, shape, _settings(path, mark), left, module)
        elif old and is_matrix:
            found += _old(tensor, shape, left, module)
        elif is_rows and f"{module}.{SCALE}" in left:
            found += _rows(tensor, shape, left.pop(f"{module}.{SCALE}"))
        else:
            found += _plain(tensor, shape)
    return found + [f"{name} is unexpected" for name in left]


def _family(config: Settings) -> BuiltModel:
    kind = str(config.get("_class_name"))
    if kind not in FAMILIES:
        raise BadCheckpoint(f"the names of a {kind} in ComfyUI are not known; known are those of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def _without_prefix(header: Header) -> dict[str, TensorInfo]:
    """Tensors by the names that ComfyUI gives them; with a prefix in the file, those without it are not looked at."""
    for prefix in PREFIXES:
        names = [name for name in header.tensors if name.startswith(prefix)]
        if len(names) > PREFIXED:
            return {name.removeprefix(prefix): header.tensors[name] for name in names}
    return dict(header.tensors)


def _flags(family: BuiltModel, config: Settings, reader: ComfyVersion, left: dict[str, TensorInfo]) -> Iterator[str]:
    for setting, flag in family.flags.items():
        tensor = left.pop(flag, None)
        wanted = bool(config.get(setting))
        if flag not in reader.flags and (wanted or tensor):
            yield UNKNOWN_FLAG.format(flag=flag, setting=setting)
        elif wanted and tensor is None:
            yield f"{flag} is missing, and {setting} is true: edits are drawn in the older way"
        elif tensor is not None and not wanted:
            yield f"{flag} is there, and {setting} is not true"
        elif tensor is not None and tensor.shape != (0,):
            yield f"{flag} has shape {list(tensor.shape)}, not [0]: ComfyUI-GGUF refuses it"


def _old(tensor: TensorInfo, shape: Shape, left: dict[str, TensorInfo], module: str) -> Iterator[str]:
    """Problems of a matrix in a file with the mark of 2025: each is float8_e4m3fn there, whatever the file says."""
    if tensor.dtype != "F8_E4M3":
        yield f"{tensor.name} is {tensor.dtype} in a file marked {OLD_MARK}, which makes it float8_e4m3fn"
    if left.pop(f"{module}.{OLD_SCALE}", None) is None:
        yield f"{module}.{OLD_SCALE} is missing in a file marked {OLD_MARK}"
    if tensor.shape != shape:
        yield f"{tensor.name} has shape {list(tensor.shape)}, not {list(shape)}"


def _rows(tensor: TensorInfo, shape: Shape, scale: TensorInfo) -> Iterator[str]:
    """Problems of a matrix with a scale for each row, as diffusers reads it."""
    if (tensor.dtype, tensor.shape) != ("F8_E4M3", shape):
        yield f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, and diffusers reads F8_E4M3 {list(shape)}"
    if (scale.dtype, scale.shape) != ("F32", shape[:1]):
        yield f"{scale.name} is {scale.dtype} {list(scale.shape)}, and diffusers reads F32 {list(shape[:1])}"


def _in_gguf(path: Path, family: BuiltModel, config: Settings, reader: ComfyVersion) -> Iterator[str]:
    """Problems of a GGUF file, whose names ComfyUI-GGUF, diffusers and stable-diffusion.cpp read without a prefix."""
    file = open_gguf(path)
    entry = file.get_field("general.architecture")
    architecture = entry.contents() if entry else None
    if architecture != family.architecture:
        yield f"general.architecture is {architecture!r}, not {family.architecture!r}: ComfyUI-GGUF refuses it"
    left = {tensor.name: tensor for tensor in file.tensors}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in left.items()}
    for setting, flag in family.flags.items():
        if flag in shapes and flag not in reader.flags:
            yield UNKNOWN_FLAG.format(flag=flag, setting=setting)
        elif (flag in shapes) != bool(config.get(setting)):
            yield f"{flag} is {'there' if flag in shapes else 'missing'}, and {setting} is {config.get(setting)}"
        elif flag in shapes and shapes[flag] != (0,):
            yield f"{flag} has shape {list(shapes[flag])}, not [0]: ComfyUI-GGUF refuses it"
        left.pop(flag, None)
    for name, shape in family.shapes(config).items():
        if left.pop(name, None) is None:
            yield f"{name} is missing"
        elif shapes[name] != shape:
            yield f"{name} has shape {list(shapes[name])}, not {list(shape)}"
    yield from (f"{name} is unexpected" for name in left)


def _plain(tensor: TensorInfo, shape: Shape) -> Iterator[str]:
    if tensor.shape != shape:
        yield f"{tensor.name} has shape {list(tensor.shape)}, not {list(shape)}"
    if tensor.dtype not in FLOATS:
        yield f"{tensor.name} is {tensor.dtype} without a mark {MARK}: its codes are read as values"


def _settings(path: Path, mark: TensorInfo) -> Settings:
    """The JSON of a mark; nothing where it is none."""
    if mark.dtype != "U8" or mark.nbytes > MOST_OF_MARK or len(mark.shape) != 1:
        return {}
    with files.open_regular(path) as file:
        file.seek(mark.start)
        text = file.read(mark.nbytes)
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _quantised(
    tensor: TensorInfo, shape: Shape, settings: Settings, left: dict[str, TensorInfo], module: str
) -> Iterator[str]:
    """Problems of a marked weight; its scales are taken out of `left`."""
    name = str(settings.get("format"))
    if name not in CODES:
        yield f"{module}.{MARK} names the format {name!r}; known are {', '.join(CODES)}"
        return
    codes = CODES[name]
    if tensor.dtype != codes.dtype:
        yield f"{tensor.name} is {tensor.dtype} and marked {name}, whose codes are {codes.dtype}"
    if tensor.shape != codes.weight(shape):
        yield f"{tensor.name} has shape {list(tensor.shape)}, and {name} has {list(codes.weight(shape))}"
    for end, (dtype, shapes) in codes.scales.items():
        scale = left.pop(f"{module}.{end}", None)
        if scale is None:
            yield f"{module}.{end} is missing, which {name} needs"
        elif (scale.dtype, scale.shape) not in [(dtype, one) for one in shapes(shape)]:
            is_so = f"{scale.dtype} {list(scale.shape)}"
            yield f"{scale.name} is {is_so}, and {name} has {dtype} {list(shapes(shape)[0])}"
    for end in codes.optional:
        left.pop(f"{module}.{end}", None)
    yield from _rotation(name, settings, shape, module)


def _rotation(name: str, settings: Settings, shape: Shape, module: str) -> Iterator[str]:
    """Problems of a rotation's groups: Hadamard matrices are made of fours, and groups must fill the columns."""
    group = settings.get("convrot_groupsize")
    if not settings.get("convrot") and group is None:
        return
    if name != "int8_tensorwise" or not settings.get("convrot"):
        yield f"{module}.{MARK} has a group of {group!r}, and {name} is not marked as rotated"
    elif not isinstance(group, int) or group < 4 or group & (group - 1) or group.bit_length() % 2 == 0:
        yield f"{module}.{MARK} has groups of {group!r}, which is no power of 4"
    elif shape[1] % group:
        yield f"{module}.{MARK} has groups of {group}, which do not divide {shape[1]} columns"
