"""The fitness of a base: plain weights as they were trained, neither merged nor quantised nor with a LoRA attached.

And of one that is to be loaded, that it asks for no code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_fuse.checkpoint.file_roles import Role, role_of
from lora_fuse.checkpoint.foreign_code import asked_code, countless_parts
from lora_fuse.checkpoint.repository_files import MODEL_INDEX, list_files, locate
from lora_fuse.checkpoint.shards import PROVENANCE, Checkpoint, Shard
from lora_fuse.checkpoint.stored import StoredWeights
from lora_fuse.errors import BadCheckpoint, ShapeMismatch, UnmatchedTargets
from lora_fuse.machine import files

UNQUANTISED = "fuse into the unquantised base, in bf16, fp16 or fp32, and quantise the result"
WHOLE_FILE = "quantization_config"  # in a header: nunchaku's
# the module that PEFT puts in the place of another, and the factors that it holds (peft/tuners/lora/layer.py)
WRAPPED = ".base_layer."
FACTOR = re.compile(r"\.lora_(A|B|down|up)\b")


def refuse_unfit(checkpoint: Checkpoint) -> None:
    """Refuse a base that is merged or quantised, as a LoRA was trained for the plain weights, or cannot be listed."""
    for name in (*(shard.relative for shard in checkpoint.shards), *checkpoint.others):
        if checkpoint.kind != "file" and not files.is_text(name):
            raise BadCheckpoint(
                f"{checkpoint.root}: the name of {files.as_text(name)} is not UTF-8, and a manifest lists it; rename it"
            )
    for shard in checkpoint.shards:
        _refuse_marked(shard)
    if checkpoint.config.get("quantization_config"):
        raise BadCheckpoint(
            f"{checkpoint.root} is quantised ({checkpoint.config['quantization_config']}); {UNQUANTISED}"
        )


def refuse_code(contents: Iterable[tuple[str, object]], label: str, fail: Callable[[str], Exception]) -> None:
    """Refuse a base whose JSON asks for code, see `asked_code`, or for countless parts.

    `contents` are parsed files by POSIX path.

    Raises:
        fail: a file does; the message names it, the key and its value.
    """
    for name, content in contents:
        for words in asked_code(name, content):
            raise fail(
                f"{label}: {words}; no code of a base is run here: take a copy whose classes are all diffusers' or "
                "transformers', or take the entry out"
            )
        for words in countless_parts(name, content):
            raise fail(f"{label}: {words}; get a good copy")


def refuse_unloadable(folder: Path, fail: Callable[[str], Exception]) -> None:
    """As `refuse_code`, of the files of a pipeline on this machine that are at its top or in its components.

    Raises:
        fail: as there; a file is no JSON, or its text (a vocabulary, say) is larger than any that is read whole.
    """

    def read(name: str) -> object:
        return files.read_json(locate(folder, name), object, fail, "get a good copy")

    index = read(MODEL_INDEX)
    parts = index if isinstance(index, dict) else {}
    held = [name for name in list_files(folder) if "/" not in name or name.partition("/")[0] in parts]
    for path in (locate(folder, name) for name in held if role_of(name).role is Role.TEXT):
        if path.is_file() and (size := path.stat().st_size) > files.MOST:
            raise fail(f"{path} has {size} bytes, and at most {files.MOST} are read of a text; get a good copy")
    refuse_code(((name, read(name)) for name in held if name.endswith(".json")), str(folder), fail)


def _refuse_marked(shard: Shard) -> None:
    """Refuse a file that is no plain base by its header: merged, quantised as a whole, a LoRA, or with one in it."""
    metadata = shard.header.metadata
    if PROVENANCE in metadata:
        raise BadCheckpoint(
            f"{shard.path} is merged already ({metadata[PROVENANCE]}); fuse into the original base, "
            "all LoRAs in one run"
        )
    if WHOLE_FILE in metadata:
        raise BadCheckpoint(
            f"{shard.path} is quantised ({WHOLE_FILE} in its header: {metadata[WHOLE_FILE]}); {UNQUANTISED}"
        )
    names = list(shard.header.tensors)
    wrapped = next((name for name in names if WRAPPED in name), None)
    if wrapped is not None:
        raise BadCheckpoint(
            f"{shard.path} was saved with a LoRA attached: {wrapped!r} is PEFT's name of a wrapped weight; load it, "
            "call unload_lora_weights() (of PEFT itself unload()), save it again, and name the LoRA with --lora"
        )
    factors = [name for name in names if FACTOR.search(name)]
    if 2 * len(factors) > len(names):
        raise BadCheckpoint(
            f"{shard.path} is a LoRA, as {factors[0]!r} says, and no base; the base comes first, the LoRA after --lora"
        )


@contextmanager
def blaming_a_quantised_base(checkpoint: Checkpoint) -> Iterator[None]:
    """Say of a base that is quantised as a whole that this is why a LoRA does not fit it.

    Raises:
        BadCheckpoint: a LoRA does not fit, and most of the modules with a matrix are quantised.
    """
    try:
        yield
    except (UnmatchedTargets, ShapeMismatch) as error:
        decoded = checkpoint.stored().matrices
        found = [
            one for one in checkpoint.quantised().values() if one.certain and f"{one.module}.weight" not in decoded
        ]
        matrices = (name for name, tensor in checkpoint.tensors().items() if len(tensor.shape) > 1)
        plain = {name.removesuffix(".weight") for name in matrices if name.endswith(".weight")}
        if not found or len(found) < len(plain - {one.module for one in found}):
            raise
        first = min(found, key=lambda one: one.module)
        raise BadCheckpoint(
            f"{checkpoint.root} is quantised: of {len(found)} modules {first.module!r} is the first, as "
            f"{first.evidence!r} says ({first.what}); {UNQUANTISED}"
        ) from error


def refuse_quantised(checkpoint: Checkpoint, stored: StoredWeights, targets: Iterable[str]) -> None:
    """Refuse a target that is quantised and not decoded, whatever its dtype: the sum would be scaled a second time.

    Raises:
        BadCheckpoint: there is one.
    """
    quantised = checkpoint.quantised()
    for name in targets:
        if name in stored.refused:
            raise stored.refused[name]
        found = quantised.get(name.rpartition(".")[0])
        if found is None or (found.evidence == name and not found.certain):  # a norm's own `scale`, `scale_shift_table`
            continue
        if not name.endswith(".bias") and name not in stored.matrices:
            raise BadCheckpoint(
                f"{checkpoint.root}: the target {name!r} is quantised, as {found.evidence!r} says ({found.what}); "
                f"{UNQUANTISED}"
            )
