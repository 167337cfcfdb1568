"""A merged checkpoint in other formats. One row of `FORMATS` is one format: where its file goes, and what writes it.

Invariant: a file is there whole or not at all, and its bytes depend on nothing but the merged checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_fuse.checkpoint import Checkpoint
from lora_fuse.errors import BadConfig
from lora_fuse.exports.single_file import single_file_size, write_single_file
from lora_fuse.machine import FileRecord, files, space, staging

Progress = Callable[[int], None]
SUMS = "SHA256SUMS"


@dataclass(frozen=True, slots=True)
class ExportFormat:
    """One format.

    `place` is the path of its file in the repository, with the model's name for ``{}``; `size` gives its bytes before
    it is written; `write` writes it and calls its last argument with the number of bytes just written.
    """

    words: str
    place: str
    size: Callable[[Checkpoint, Mapping[str, str]], int]
    write: Callable[[Checkpoint, Path, Mapping[str, str], Progress], FileRecord]


FORMATS: Mapping[str, ExportFormat] = {
    "single_file": ExportFormat(
        "the transformer in one file, with ComfyUI's keys",
        "diffusion_models/{}.safetensors",  # the folder of ComfyUI that it goes into
        single_file_size,
        write_single_file,
    ),
}


def export_size(checkpoint: Checkpoint, formats: Iterable[str], metadata: Mapping[str, str]) -> int:
    """Bytes that an export writes.

    Raises:
        BadConfig: a format is unknown.
        BadCheckpoint: a format does not know such a model.
    """
    return sum(_format(name).size(checkpoint, metadata) for name in formats)


def export(
    checkpoint: Checkpoint,
    out: Path,
    formats: Iterable[str],
    *,
    name: str,
    metadata: Mapping[str, str],
    progress: Progress,
) -> dict[str, FileRecord]:
    """Write a merged checkpoint in other formats; `out`, a folder of nothing else that the caller holds, is replaced.

    File names have the model's `name` in them, headers the `metadata`; `progress` gets the bytes just written.

    Returns:
        Every file by its POSIX path below `out`, but for `SUMS`, the list of them that ``sha256sum -c`` reads.

    Raises:
        BadConfig: a format is unknown; nothing was written.
        BadCheckpoint: a format does not know such a model; nothing was written.
        NoSpace: the disk has less room than the files need; nothing was written.
    """
    chosen = {_format(one).place.format(name): _format(one) for one in formats}
    need = export_size(checkpoint, formats, metadata) + space.SPARE if chosen else 0
    space.require(files.nearest_folder(out), need, "the export", "make room, or take a format out of export.formats")
    records = {}
    with staging.whole(out) as folder:
        for place, one in sorted(chosen.items()):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            records[place] = one.write(checkpoint, folder / place, metadata, progress)
        sums = [f"{record.sha256}  {place}\n" for place, record in records.items()]
        (folder / SUMS).write_text("".join(sums), encoding="utf-8")
    return records


def _format(name: str) -> ExportFormat:
    if name not in FORMATS:
        raise BadConfig(f"export.formats names {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def is_export(path: str) -> bool:
    """True for a POSIX path that some format gives to some model."""
    ends = [one.place.split("{}") for one in FORMATS.values()]
    return any(
        path.startswith(start) and path.endswith(end) and "/" not in path[len(start) : -len(end)] for start, end in ends
    )


def words(place: str) -> str:
    """A few words on the format of a file, by its path."""
    return next(
        one.words for one in FORMATS.values() if Path(one.place).parent.as_posix() == Path(place).parent.as_posix()
    )
