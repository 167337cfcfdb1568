"""The role of a file in a repository of models, by its name alone: a table, read from above. Pure.

Invariant: a name that is in no row is never taken, and no pickle is, so a repository cannot slip in what runs code by
itself. Code is taken where the base asks for it by name; a library runs it only for who says `trust_remote_code`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath


class Role(Enum):
    """The use of a file to who loads the model."""

    PICKLE = "pickle"
    INDEX = "index of safetensors"
    WEIGHTS = "safetensors"
    FOREIGN = "weights of another framework"
    CODE = "code"
    TEXT = "configuration, vocabulary or licence"
    OTHER = "none"


@dataclass(frozen=True, slots=True)
class FileRole:
    """A role, the names that have it (whole, in lower case), and why such a file is left behind where it is."""

    role: Role
    names: re.Pattern[str]
    reason: str = ""


_SAFETENSORS = r".+\.(safetensors|sft)"
# Endings of weights: torch's, flax's, Keras', ONNX', TensorFlow Lite's, llama.cpp's, Rust's, Core ML's, TensorRT's. Of
# vocabularies: `vocab_files_names` of the tokenizers of transformers, and those that repositories' own code reads.
ROLES = (
    FileRole(
        Role.PICKLE, re.compile(r".+\.(bin|ckpt|pickle|pkl|pt|pth)"), "a pickle, which can run code when it is loaded"
    ),
    FileRole(Role.INDEX, re.compile(_SAFETENSORS + r"(\..+)?\.index(\..+)?\.json")),
    FileRole(Role.WEIGHTS, re.compile(_SAFETENSORS)),
    FileRole(Role.OTHER, re.compile(r".+\.index(\..+)?\.json"), "an index of weights that are not taken"),
    FileRole(
        Role.FOREIGN,
        re.compile(r".+\.(msgpack|h5|onnx|onnx[._]data|pb|tflite|gguf|ot|mlmodel|engine|flashpack)"),
        "weights of another framework",
    ),
    FileRole(Role.CODE, re.compile(r".+\.py"), "code that nothing in the base asks for"),
    FileRole(Role.TEXT, re.compile(r".*licen[cs]e.*|(notice|copying|use[ ._-]policy|third[ ._-]?party).*")),
    FileRole(Role.OTHER, re.compile(r"readme(\..*)?|model_?card\.md"), "a model card; a published merge has its own"),
    FileRole(
        Role.TEXT,
        re.compile(
            r".+\.(jsonl?|txt|txt\.gz|jinja2?|model(\.v\d+)?|tiktoken|vocab|bpe|codes|spm|tokenizer|merges)|vocab|merges"
        ),
    ),
    FileRole(
        Role.OTHER,
        re.compile(r".+\.(md|rst|pdf|png|jpe?g|gif|webp|svg|mp4|webm|mp3|wav|ipynb|html?|csv)"),
        "for people, no library loads it",
    ),
    FileRole(Role.OTHER, re.compile(r"(?s:.*)"), "of no kind that a library is known to load"),
)


def role_of(path: str) -> FileRole:
    """The row of a file by its name."""
    name = PurePosixPath(path).name.lower()
    return next(row for row in ROLES if row.names.fullmatch(name))
