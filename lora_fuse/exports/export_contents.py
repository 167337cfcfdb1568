"""The tensors of an export, settled before anything is written: which are quantised, which stay, what is refused.

Names are diffusers' own, without a prefix: so read ComfyUI, ComfyUI-GGUF, stable-diffusion.cpp and diffusers. For
Qwen-Image they are the engines' names as well (comfy/ldm/qwen_image/model.py). ComfyUI tells models apart by their
keys: one that was trained with `zero_cond_t` (Qwen-Image-Edit-2511) needs an empty tensor `__index_timestep_zero__`
(comfy/model_detection.py), or its input pictures are treated in the older way; stable-diffusion.cpp reads it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import PROVENANCE, Checkpoint, Shard, TensorInfo, dtypes
from lora_fuse.errors import BadCheckpoint, BadConfig
from lora_fuse.machine import files
from lora_fuse.models import kept_layers
from lora_fuse.quantisation import Fp8Options
from lora_fuse.recipe import sections

BLOCK = 8 << 20  # bytes read at once
WEIGHT = ".weight"
OF_THE_FILE = ("format", "_quantization_metadata")  # entries of a header that are true of the base's file alone
Stored = tuple[TensorInfo, Shard | None]  # a tensor that stays as it is; a flag is of no shard
Matrix = Callable[[str], npt.NDArray[np.float32]]  # the values of a weight by its name


@dataclass(frozen=True, slots=True)
class Layout:
    """A class of transformers as engines know it.

    `flags` are empty tensors that stand for a setting of `config.json` that is true; `architecture` is GGUF's name.
    """

    flags: Mapping[str, str]
    architecture: str


LAYOUTS: Mapping[str, Layout] = {
    "QwenImageTransformer2DModel": Layout({"zero_cond_t": "__index_timestep_zero__"}, "qwen_image"),
}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Settings of `export`: patterns of layers that stay, the rounding to fp8, and the program for ggml's K types.

    `matrix` gives the weights to quantise, None those of the merge; `fusion.exact_sums` has them before they are
    rounded.
    """

    keep: tuple[str, ...] = ()
    fp8: Fp8Options = field(default_factory=Fp8Options)
    sd_cli: str = "sd-cli"
    matrix: Matrix | None = None

    @staticmethod
    def of(params: sections.ExportParams) -> ExportOptions:
        """Read the settings of a recipe's exports."""
        fp8 = Fp8Options(params.fp8_scale == "power_of_two", params.fp8_seed)
        return ExportOptions(tuple(params.keep), fp8, params.sd_cli)


@dataclass(frozen=True, slots=True)
class Contents:
    """The tensors of one file: those that are stored as they are, flags among them, and the shapes of the others.

    `matrices` are by module.
    """

    layout: Layout
    stored: tuple[Stored, ...]
    matrices: Mapping[str, tuple[int, int]]
    metadata: Mapping[str, str]


def contents_of(
    checkpoint: Checkpoint, metadata: Mapping[str, str], options: ExportOptions, *, quantised: bool, coarse: bool
) -> Contents:
    """The tensors of an export of a merged transformer.

    Raises:
        BadCheckpoint: the engines' names of such a model are not known, or it is quantised already.
        BadConfig: see `kept_layers`; or nothing is left to quantise.
    """
    kind = str(checkpoint.config.get("_class_name"))
    if kind not in LAYOUTS:
        raise BadCheckpoint(
            f"{checkpoint.root} is a {kind}, and the engines' keys are known for {', '.join(LAYOUTS)}; set "
            "export.formats to []"
        )
    _refuse_quantised(checkpoint)
    tensors = [(tensor, shard) for shard in checkpoint.shards for tensor in shard.header.tensors.values()]
    shapes = {
        tensor.name.removesuffix(WEIGHT): (tensor.shape[0], tensor.shape[1])
        for tensor, _ in tensors
        if len(tensor.shape) == 2 and tensor.name.endswith(WEIGHT) and tensor.dtype in dtypes.ROUNDABLE
    }
    kept = kept_layers(kind, shapes, options.keep, coarse=coarse) if quantised else frozenset(shapes)
    if quantised and kept >= shapes.keys():
        raise BadConfig(
            f"export.keep leaves none of the {len(shapes)} layers of {checkpoint.root} to quantise: take patterns out "
            "of it, or the format out of export.formats"
        )
    matrices = {module: shapes[module] for module in sorted(shapes.keys() - kept)}
    layout = LAYOUTS[kind]
    flags = [flag for setting, flag in layout.flags.items() if checkpoint.config.get(setting)]
    stored: list[Stored] = [pair for pair in tensors if pair[0].name.removesuffix(WEIGHT) not in matrices]
    stored += [(TensorInfo(flag, "F32", (0,), 0, 0), None) for flag in flags]
    return Contents(layout, tuple(stored), matrices, {**_carried(checkpoint), **metadata})


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    marked = {module: one for module, one in checkpoint.quantised().items() if one.certain}
    if marked:
        module, one = min(marked.items())
        raise BadCheckpoint(
            f"{checkpoint.root} is quantised already ({one.what}: {module!r} has {one.evidence}): an export is made of "
            "the merge itself; set export.formats to []"
        )


def _carried(checkpoint: Checkpoint) -> dict[str, str]:
    """The entries of the shards' headers that are the same in all that have them: a model's, and not a shard's."""
    found: dict[str, set[str]] = {}
    for shard in checkpoint.shards:
        for key, value in shard.header.metadata.items():
            found.setdefault(key, set()).add(value)
    skipped = {*OF_THE_FILE, PROVENANCE}
    return {key: min(values) for key, values in sorted(found.items()) if len(values) == 1 and key not in skipped}


def read_blocks(tensor: TensorInfo, path: Path) -> Iterator[bytes]:
    """The bytes of a tensor, some at a time.

    Raises:
        BadCheckpoint: the file is not what its header says.
    """
    with files.open_regular(path) as file:
        file.seek(tensor.start)
        left = tensor.nbytes
        while left:
            block = file.read(min(left, BLOCK))
            if not block:
                raise BadCheckpoint(f"{path} ends within {tensor.name!r}; fuse again")
            left -= len(block)
            yield block


def widened(tensor: TensorInfo, path: Path) -> npt.NDArray[np.float32]:
    """The values of a stored tensor in float32.

    Raises:
        BadCheckpoint: see `read_blocks`.
    """
    data = b"".join(read_blocks(tensor, path))
    values: npt.NDArray[np.float32] = np.frombuffer(data, dtypes.DTYPES[tensor.dtype].numpy).astype(np.float32)
    return values.reshape(tensor.shape)


def as_merged(checkpoint: Checkpoint) -> Matrix:
    """The weights as the merge has them: rounded to its dtype already."""
    places = {name: (tensor, shard) for shard in checkpoint.shards for name, tensor in shard.header.tensors.items()}

    def matrix(name: str) -> npt.NDArray[np.float32]:
        tensor, shard = places[name]
        return widened(tensor, shard.path)

    return matrix
