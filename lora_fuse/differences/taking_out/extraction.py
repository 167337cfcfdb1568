"""A LoRA of the difference between a checkpoint and its base: weight by weight, written whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from lora_fuse.checkpoint import dtypes, repository_files
from lora_fuse.differences import PairedCheckpoints, PairedTensor, open_pair
from lora_fuse.differences.taking_out.difference import Difference, Left, LoraFactors
from lora_fuse.differences.taking_out.lora_writer import LoraWriter, lora_writer
from lora_fuse.errors import BadCheckpoint, BadConfig, Refused
from lora_fuse.lora import open_lora
from lora_fuse.machine import FileRecord, direct_io, file_state, files, progress
from lora_fuse.models import COMPONENT
from lora_fuse.recipe import records

if TYPE_CHECKING:
    from lora_fuse.hub import streamed_base

Tensor = npt.NDArray[np.generic]

COPIES = 3  # of a difference that are held at once: it, and what is made of some of it
A_CORE = 1 << 29  # bytes of them: those of the largest matrix of Qwen-Image
LEAST = 1 << 30
WEIGHT = ".weight"
BIAS = ".bias"
# Beginnings of the class of a component, and of the names of a single file, and the prefix of a LoRA's keys for it.
CLASSES = {"UNet": "unet"}
OF_FILES = {"transformer_blocks.": COMPONENT, "single_transformer_blocks.": COMPONENT, "down_blocks.": "unet"}
NATIVE = "diffusion_model"  # ComfyUI's, for other names
FURTHER = ("transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")  # components that keys may name


@dataclass(frozen=True, slots=True)
class ExtractedWeight:
    """A weight that differs: its name in the base, and the rank of its factors, 0 where the difference is not factored.

    `key` is the beginning of its keys in the LoRA; None where it is not in it, and all of the difference is left.
    """

    name: str
    rank: int
    left: Left
    key: str | None

    @property
    def form(self) -> str:
        """The form in which it is in the LoRA."""
        if self.key is None:
            return "left out"
        return f"rank {self.rank}" if self.rank else "whole"


@dataclass(frozen=True, slots=True)
class Extracted:
    """A LoRA that was extracted: its file, the weights that differ, and the number of those that do not."""

    path: Path
    file: FileRecord
    weights: tuple[ExtractedWeight, ...]
    unchanged: int
    pair: PairedCheckpoints

    @property
    def total(self) -> Left:
        """The sums over all weights that differ."""
        parts = [weight.left for weight in self.weights]
        difference, product, fused = (
            math.fsum(getattr(part, name) for part in parts) for name in ("difference", "product", "fused")
        )
        return Left(difference, product, fused, sum(part.equal for part in parts), sum(part.size for part in parts))


def extract(  # noqa: PLR0913 - by keyword, each is a choice of its own
    checkpoint: Path | streamed_base.StreamedBase,
    base: Path | streamed_base.StreamedBase,
    out: Path,
    *,
    rank: int | None = None,
    residual: float | None = None,
    dtype: str = "float32",
    matrices_only: bool = False,
    replace: bool = False,
    show_progress: bool = False,
) -> Extracted:
    """Write a LoRA that makes the checkpoint of the base when it is fused at a scale of 1, as nearly as is asked for.

    Args:
        checkpoint: a pipeline folder, a component folder or one file, or a pipeline on the Hub, as `base`: see
            `explain`.
        base: what it came from.
        out: the file to write.
        rank: that of every module's factors, but for those that have no such rank.
        residual: the most that may be left of each module's difference when the LoRA is fused, as a share of its norm
            (Frobenius); each gets the least rank that does.
        dtype: ``bfloat16``, ``float16`` or ``float32``: that of the factors.
        matrices_only: leave out what is no weight matrix of a module; diffusers loads factors only.
        replace: replace a file that was not extracted here, too.
        show_progress: show bytes and rate on stderr.

    Raises:
        BadCheckpoint: one cannot be read, or they are of two architectures.
        BadConfig: not one of rank and residual is given, or one makes no sense.
        Refused: the checkpoint and the base do not differ, or `out` cannot be written; it is as it was.
    """
    asked = _Asked(rank, residual, dtype, matrices_only)
    asked.check()
    pair = open_pair(checkpoint, base)
    with nullcontext() if show_progress else progress.silence(), lora_writer(out, replace=replace) as (writer, new):
        found = list(_extracted(pair, asked, writer))
        weights = tuple(weight for weight in found if weight is not None)
        if not any(weight.key for weight in weights):
            raise Refused(_nothing(pair, len(weights)))
        record = writer.finish(_entry(pair, weights, asked))
        _check_names(new, weights)
    return Extracted(out, record, weights, len(found) - len(weights), pair)


@dataclass(frozen=True, slots=True)
class _Asked:
    rank: int | None
    residual: float | None
    dtype: str
    matrices_only: bool

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            BadConfig: so it is.
        """
        if (self.rank is None) == (self.residual is None):
            raise BadConfig("how much is extracted: give --rank R, or --residual X, and not both")
        if self.rank is not None and self.rank < 1:
            raise BadConfig(f"--rank is {self.rank}; give 1 or more")
        if self.residual is not None and not 0 < self.residual < 1:
            raise BadConfig(f"--residual is {self.residual:g}; give a share of the difference between 0 and 1, as 0.05")
        if self.dtype not in dtypes.OUTPUTS:
            raise BadConfig(f"--dtype is {self.dtype!r}; it is one of {', '.join(dtypes.OUTPUTS)}")


def _extracted(pair: PairedCheckpoints, asked: _Asked, writer: LoraWriter) -> Iterator[ExtractedWeight | None]:
    """Extract side by side, and write in order; None for a weight that does not differ."""
    cores = os.cpu_count() or 1
    most = max(LEAST, min(cores * A_CORE, direct_io.available_memory() // 4))
    prefixes = {component: _prefix(pair, component) for component in {tensor.component for tensor in pair.tensors}}
    work = (
        (COPIES * 4 * tensor.size, partial(_extract_weight, tensor, prefixes[tensor.component], asked))
        for tensor in pair.tensors
    )
    threads = ThreadPoolExecutor(cores, "extract")
    try:
        total = sum(tensor.nbytes for tensor in pair.tensors)
        # each core has a weight of its own: BLAS' threads would spin against each other
        with progress.byte_progress("extract", total) as advance, threadpool_limits(1, user_api="blas"):
            made = file_state.in_order(threads, work, most)
            for tensor, (weight, parts) in zip(pair.tensors, made, strict=True):
                for name, values in parts.items():
                    writer.add(name, values)
                advance(tensor.nbytes)
                yield weight
    finally:
        threads.shutdown(cancel_futures=True)


def _extract_weight(
    tensor: PairedTensor, prefix: str | None, asked: _Asked
) -> tuple[ExtractedWeight | None, Mapping[str, Tensor]]:
    """Extract a weight: it, and the tensors of the LoRA by name."""
    if tensor.is_shared:
        return None, {}
    difference = Difference(tensor)
    if not difference.energy:
        return None, {}
    name = PurePosixPath(tensor.name).name
    is_number = tensor.base.dtype is None or tensor.base.dtype in dtypes.ROUNDABLE
    if prefix is None or not tensor.base.shape or not is_number:
        return ExtractedWeight(tensor.name, 0, difference.nothing(), None), {}
    if difference.is_matrix:
        key = f"{prefix}.{name.removesuffix(WEIGHT)}"
        if (made := _factors(difference, asked)) is not None:
            return ExtractedWeight(tensor.name, made.rank, made.left, key), _tensors(key, made, tensor.base.shape)
    if asked.matrices_only:
        return ExtractedWeight(tensor.name, 0, difference.nothing(), None), {}
    ending = "diff_b" if name.endswith(BIAS) else "diff"
    key = f"{prefix}.{name.removesuffix(WEIGHT).removesuffix(BIAS)}"
    whole = {f"{key}.{ending}": difference.values.reshape(tensor.base.shape)}
    return ExtractedWeight(tensor.name, 0, difference.whole(), key), whole


def _factors(difference: Difference, asked: _Asked) -> LoraFactors | None:
    dtype = dtypes.DTYPES[dtypes.OUTPUTS[asked.dtype]].numpy
    if asked.rank is not None:
        return difference.of_rank(asked.rank, dtype)
    return difference.of_residual(asked.residual or 0.0, dtype)


def _tensors(key: str, made: LoraFactors, shape: Sequence[int]) -> dict[str, Tensor]:
    """The factors of a module in diffusers' names, and an alpha that is the rank: a factor of 1."""
    return {
        f"{key}.alpha": np.array(made.rank, np.float32),
        f"{key}.lora_A.weight": made.down.reshape(-1, *shape[1:]),
        f"{key}.lora_B.weight": made.up.reshape(-1, made.rank, *[1] * len(shape[2:])),
    }


def _prefix(pair: PairedCheckpoints, component: str) -> str | None:
    """The word before a LoRA's keys for a component, the main one having no name; None of one that no LoRA is for."""
    if component:
        return component if component in FURTHER else None
    if pair.base.is_file():
        names = [PurePosixPath(one.name).name for one in pair.tensors]
        return next((word for start, word in OF_FILES.items() if any(n.startswith(start) for n in names)), NATIVE)
    if (pair.base / repository_files.MODEL_INDEX).is_file():
        folder = PurePosixPath(pair.tensors[0].base.shard.relative).parent.name
        return folder if folder in CLASSES.values() else COMPONENT
    config = files.read_json(pair.base / "config.json", dict, BadCheckpoint, "fetch the base again")
    kind = str(config.get("_class_name", ""))
    return next((word for start, word in CLASSES.items() if kind.startswith(start)), COMPONENT)


def _nothing(pair: PairedCheckpoints, left_out: int) -> str:
    if left_out:
        return (
            f"{' and '.join(pair.names)} differ in {left_out} weights, and none of them can be in a LoRA as it is "
            "asked for (--matrices-only leaves out what is no matrix); nothing was written"
        )
    return f"{' and '.join(pair.names)} have the same {len(pair.tensors)} weights: there is nothing to extract"


def _entry(pair: PairedCheckpoints, weights: Sequence[ExtractedWeight], asked: _Asked) -> dict[str, object]:
    """The entry of the header; no name in it begins with a word that speaks of a LoRA's strength."""
    return {
        "base": pair.sources[1],
        "checkpoint": pair.sources[0],
        "asked": {"rank": asked.rank, "residual": asked.residual, "dtype": asked.dtype},
        "weights": {weight.name: weight_entry(weight) for weight in weights},
    }


def weight_entry(weight: ExtractedWeight) -> dict[str, object]:
    """A weight for a machine, its numbers to the digits of records."""
    return {
        "form": weight.form,
        "residual": records.rounded(weight.left.residual),
        "before_rounding": records.rounded(weight.left.before_rounding),
        "equal": records.rounded(weight.left.equal / weight.left.size),
        "norm": records.rounded(math.sqrt(weight.left.difference)),
    }


def _check_names(path: Path, weights: Sequence[ExtractedWeight]) -> None:
    """Read the file as a fuse does: each weight that is in it has one delta, and no other has.

    Raises:
        Refused: a name of the base is read in another way than it was written.
    """
    found = sorted(delta.module for delta in open_lora(path).deltas)
    written = sorted(weight.key for weight in weights if weight.key is not None)
    if found != written:
        raise Refused(f"names of the base are no names of a LoRA: written {written[:3]}, read {found[:3]}")
