"""All that is known of a model family, as plain data; the families themselves are files in `families`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_fuse.models.pipeline_call import PipelineCall


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base on the Hub, the pipeline that runs it, and the LoRA files that were made for it.

    `loras` are patterns of ``repo_id/filename``. A file that matches another base's pattern and not this one's is a
    known wrong pair: it may merge (the shapes agree) and still give worse pictures; but `loras_of` are bases whose
    LoRAs are known to go into this one too. `fp8_loras` were made for the same base in fp8 (e4m3fn), and are wrong for
    whatever they are fused into here. `alpha` is what these files have; None where that is not known.
    """

    repo_id: str
    pipeline: str
    loras: tuple[str, ...] = ()
    alpha: float | None = None
    fp8_loras: tuple[str, ...] = ()
    loras_of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """Modules by shell patterns, and who found that they are to be kept."""

    patterns: tuple[str, ...]
    source: str
    coarse: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """Bases of one architecture: their components and names.

    `components` are the folders of a pipeline that LoRAs go to, the main one first, each with its class. `keep` has the
    layers of a class that lose more by few bits than they save. `converter` is the function of
    ``diffusers.loaders.single_file_utils`` that takes the main component's original checkpoint to diffusers' names;
    None where the original has the same. `originals` are the names of the original modules, and
    `original_parameters` those of parameters that are no module's weight or bias, ``{}`` for the number of a block;
    `name_maps` has what the converter makes of them. `pipelines` are the calls of its pipeline classes.
    """

    name: str
    bases: tuple[KnownBase, ...]
    components: Mapping[str, str]
    keep: Mapping[str, tuple[KeptLayers, ...]] = field(default_factory=dict)
    converter: str | None = None
    originals: tuple[str, ...] = ()
    original_parameters: tuple[str, ...] = ()
    pipelines: tuple[PipelineCall, ...] = ()


def within(block: str, names: str) -> tuple[str, ...]:
    """Names below that of a block, from their ends with spaces between them."""
    return tuple(f"{block}.{name}" for name in names.split())
