"""A merged checkpoint in other formats. One row of `FORMATS` is one format: its file, its container, its codes.

Invariant: a file is there whole or not at all, and its bytes depend on nothing but the merge (of ggml's K types: and on
the program that makes them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import Checkpoint
from lora_fuse.errors import BadConfig
from lora_fuse.exports import gguf_container, safetensors_container, sd_cli
from lora_fuse.exports.export_contents import WEIGHT, Contents, ExportOptions, Matrix, as_merged, contents_of
from lora_fuse.exports.making import Encode
from lora_fuse.machine import FileRecord, files, space, staging
from lora_fuse.quantisation import Fp8Options

Progress = Callable[[int], None]
SUMS = "SHA256SUMS"
AS_IT_IS = ExportOptions()


@dataclass(frozen=True, slots=True)
class ExportFormat:
    """One format.

    `place` is the path of its file in the repository, with the model's name for ``{}``. `codec` is a row of
    `lora_fuse.quantisation.FORMATS`, None for weights as they are and for those that sd-cli makes; `ggml` is the type
    in a GGUF file, None for safetensors. Of a `coarse` one, more layers stay as they are.
    """

    words: str
    place: str
    codec: str | None = None
    ggml: str | None = None
    coarse: bool = False

    @property
    def quantised(self) -> bool:
        """True where weights are made anew, from exact sums."""
        return self.codec is not None or self.ggml is not None


COMFYUI = "diffusion_models/{}"  # the folder of ComfyUI that it goes into
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
FORMATS: Mapping[str, ExportFormat] = {
    "single_file": ExportFormat("the transformer in one file", f"{COMFYUI}.safetensors"),
    "int8_convrot": ExportFormat("int8, rotated, a scale a row", f"{COMFYUI}-int8_convrot.safetensors", "int8_convrot"),
    "gguf_q8_0": ExportFormat("GGUF, Q8_0", f"{COMFYUI}-Q8_0.gguf", "q8_0", "Q8_0"),
    "fp8_scaled": ExportFormat(
        "fp8 e4m3, a scale a matrix", f"{COMFYUI}-fp8_scaled.safetensors", "fp8_scaled", coarse=True
    ),
    "fp8_rows": ExportFormat(
        "fp8 e4m3, a scale a row, for diffusers", "diffusers/{}-fp8_rows.safetensors", "fp8_rows", coarse=True
    ),
    "mxfp8": ExportFormat("mxfp8", f"{COMFYUI}-mxfp8.safetensors", "mxfp8", coarse=True),
    "nvfp4": ExportFormat("nvfp4", f"{COMFYUI}-nvfp4.safetensors", "nvfp4", coarse=True),
    **{
        f"gguf_{kind.lower()}": ExportFormat(f"GGUF, {kind}", f"{COMFYUI}-{kind}.gguf", ggml=kind, coarse=True)
        for kind in K_TYPES
    },
}


def needs_sums(formats: Iterable[str]) -> bool:
    """True where a format is quantised, and so made from exact sums.

    Raises:
        BadConfig: a format is unknown.
    """
    return any(_format(name).quantised for name in formats)


def export_size(
    checkpoint: Checkpoint, formats: Iterable[str], metadata: Mapping[str, str], options: ExportOptions = AS_IT_IS
) -> int:
    """Bytes that an export writes.

    Raises:
        BadConfig: a format is unknown, a pattern of `options.keep` matches nothing, or sd-cli is needed and not there.
        BadCheckpoint: a format does not know such a model, or cannot hold a shape; it is quantised already.
    """
    return sum(_size(_format(name), _contents(name, checkpoint, metadata, options), options) for name in formats)


def export(
    checkpoint: Checkpoint,
    out: Path,
    formats: Iterable[str],
    *,
    name: str,
    metadata: Mapping[str, str],
    progress: Progress,
    options: ExportOptions = AS_IT_IS,
) -> dict[str, FileRecord]:
    """Write a merged checkpoint in other formats; `out`, a folder of nothing else that the caller holds, is replaced.

    File names have the model's `name` in them, headers the `metadata`; `progress` gets the bytes just written.

    Returns:
        Every file by its POSIX path below `out`, but for `SUMS`, the list of them that ``sha256sum -c`` reads.

    Raises:
        BadConfig, BadCheckpoint: see `export_size`; or a matrix has values that a format cannot hold. Nothing was
            written.
        NoSpace: the disk has less room than the files need; nothing was written.
    """
    chosen = {_format(one).place.format(name): one for one in formats}
    need = export_size(checkpoint, formats, metadata, options) + space.SPARE if chosen else 0
    space.require(files.nearest_folder(out), need, "the export", "make room, or take a format out of export.formats")
    records = {}
    with staging.whole(out) as folder:
        for place, one in sorted(chosen.items()):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            contents = _contents(one, checkpoint, metadata, options)
            write = _writer(_format(one), contents, options.matrix or as_merged(checkpoint), options)
            records[place] = write(folder / place, progress)
        sums = [f"{record.sha256}  {place}\n" for place, record in records.items()]
        (folder / SUMS).write_text("".join(sums), encoding="utf-8")
    return records


@dataclass(frozen=True, slots=True)
class QuantisedPart:
    """The tensors that a format quantises, by their names; all others it keeps as they are in the merge.

    `at_best` is what its encoder and decoder leave of a tensor, by its name; None where others encode it.
    """

    names: frozenset[str] = frozenset()
    at_best: Callable[[str, npt.NDArray[np.float32]], npt.NDArray[np.float32]] | None = None


def quantised_by(name: str, checkpoint: Checkpoint, options: ExportOptions = AS_IT_IS) -> QuantisedPart:
    """The part of a merged transformer that a format quantises.

    Raises:
        BadConfig, BadCheckpoint: see `export_size`.
    """
    one = _format(name)
    names = frozenset(module + WEIGHT for module in _contents(name, checkpoint, {}, options).matrices)
    if one.codec is None:
        return QuantisedPart(names if one.quantised else frozenset())
    encode = _encoder(one, options)

    def at_best(tensor: str, matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        from lora_fuse.quantisation import FORMATS as CODECS

        rows, columns = matrix.shape
        return CODECS[str(one.codec)].decode(encode(tensor.removesuffix(WEIGHT), matrix), (rows, columns))

    return QuantisedPart(names, at_best)


def _format(name: str) -> ExportFormat:
    if name not in FORMATS:
        raise BadConfig(f"export.formats names {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def _contents(name: str, checkpoint: Checkpoint, metadata: Mapping[str, str], options: ExportOptions) -> Contents:
    one = _format(name)
    return contents_of(checkpoint, metadata, options, quantised=one.quantised, coarse=one.coarse)


def _size(one: ExportFormat, contents: Contents, options: ExportOptions) -> int:
    if one.ggml is None:
        return safetensors_container.size(contents, one.codec)
    if one.codec is None:
        sd_cli.program(options.sd_cli)
    return gguf_container.size(contents, one.ggml)


def _writer(
    one: ExportFormat, contents: Contents, matrix: Matrix, options: ExportOptions
) -> Callable[[Path, Progress], FileRecord]:
    encode = _encoder(one, options)
    if one.ggml is None:
        return lambda path, progress: safetensors_container.write(contents, one.codec, path, matrix, encode, progress)
    kind = one.ggml
    return lambda path, progress: gguf_container.write(contents, kind, path, matrix, encode, progress)


def _encoder(one: ExportFormat, options: ExportOptions) -> Encode:
    """The function that makes what is stored of a module's matrix."""

    def by_codec(module: str, matrix: npt.NDArray[np.float32]) -> Mapping[str, npt.NDArray[Any]]:
        from lora_fuse.quantisation import FORMATS as CODECS

        return CODECS[str(one.codec)].encode(matrix, _seeded(options.fp8, module))

    def by_sd_cli(_module: str, matrix: npt.NDArray[np.float32]) -> Mapping[str, npt.NDArray[Any]]:
        return {"weight": sd_cli.quantise(sd_cli.program(options.sd_cli), str(one.ggml), matrix)}

    return by_sd_cli if one.codec is None else by_codec


def _seeded(options: Fp8Options, module: str) -> Fp8Options:
    """The options with a seed of the module's own, so that no two are rounded by the same numbers."""
    if options.seed is None:
        return options
    digest = sha256(f"{options.seed} {module}".encode()).digest()
    return Fp8Options(options.power_of_two, int.from_bytes(digest[:8], "little"))


def is_export(path: str) -> bool:
    """True for a POSIX path that some format gives to some model."""
    return bool(_matching(path))


def words(place: str) -> str:
    """A few words on the format of a file, by its path."""
    return max(_matching(place), key=lambda one: len(one.place)).words


def _matching(path: str) -> list[ExportFormat]:
    """The formats that give such a path to a model of some name."""
    ends = {one: one.place.split("{}") for one in FORMATS.values()}
    return [
        one
        for one, (start, end) in ends.items()
        if path.startswith(start) and path.endswith(end) and "/" not in path[len(start) : -len(end)]
    ]
