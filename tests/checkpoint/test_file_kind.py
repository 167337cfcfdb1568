"""Files that are no safetensors are called what they are, whatever their name; safetensors are read under any name."""

import gzip
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save, save_file

from lora_fuse.checkpoint import file_kind
from lora_fuse.checkpoint.shards import open_checkpoint, read_header
from lora_fuse.errors import BadCheckpoint
from tests.support import tiny

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
ARRAY = np.arange(40, dtype=np.float32)


def saved(write: Callable[[io.BytesIO], object]) -> bytes:
    """What a library writes to a file."""
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def zipped(buffer: io.BytesIO) -> None:
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.safetensors", save({"a": ARRAY}))


# Each written by who writes such files; by the words that the message has to have.
OTHERS = {
    "torch": (saved(lambda file: torch.save({"a": torch.ones(3)}, file)), "a pickle in a zip"),
    "torch before 1.6": (
        saved(lambda file: torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False)),
        "is a pickle, and",
    ),
    **{f"pickle {protocol}": (pickle.dumps({"a": 1}, protocol), "is a pickle") for protocol in range(2, 6)},
    "zip": (saved(zipped), "another zip"),
    "gzip": (gzip.compress(save({"a": ARRAY})), "packed archive"),
    "GGUF": (b"GGUF" + (3).to_bytes(4, "little") + bytes(300), "a GGUF file"),
    "pointer": (POINTER, "a pointer of git-lfs"),
    "page": (b"\n<!DOCTYPE html><html><head><title>Sign in</title>", "a web page"),
    "refusal": (b'{"error":"Repository not found"}', "what a server answers when it refuses"),
    "configuration": (json.dumps({"_class_name": "P"}, indent=2).encode(), "JSON: a configuration"),
    "gated": (b"Access to model a/b is restricted. You must have access to it.", "a server's refusal"),
    "gone": (b"Entry not found", "a server's refusal"),
    "numpy": (saved(lambda file: np.save(file, ARRAY)), "a numpy array"),
    "png": (saved(lambda file: Image.new("RGB", (4, 4)).save(file, "PNG")), "a picture"),
    "jpeg": (saved(lambda file: Image.new("RGB", (4, 4)).save(file, "JPEG")), "a picture"),
    "zeros": (bytes(4096), "a file of zeros"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_another_kind_of_file_is_called_what_it_is(tmp_path: Path, kind: str, name: str) -> None:
    content, said = OTHERS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadCheckpoint) as caught:
        read_header(tmp_path / name)
    assert said in str(caught.value)
    assert "truncated" not in str(caught.value)
    assert (found := file_kind.kind_of(content)) is not None
    assert found.way_out in str(caught.value)


@pytest.mark.parametrize("name", ["base.sft", "BASE.SAFETENSORS", "d41d8cd98f00b204", "weights.bin"])
def test_safetensors_are_read_under_any_name(tmp_path: Path, name: str) -> None:
    save_file(tiny.weights(), tmp_path / name)
    assert open_checkpoint(tmp_path / name).tensors().keys() == tiny.weights().keys()


def test_a_cut_safetensors_file_is_called_truncated(tmp_path: Path) -> None:
    whole = save(tiny.weights())
    assert file_kind.kind_of(whole) is None
    assert file_kind.kind_of(b"\x80\x02" + bytes(6) + b' {"a": {}}') is None  # 640 bytes of header, and no pickle
    for kept in (len(whole) - 1, 9):
        (tmp_path / "cut.safetensors").write_bytes(whole[:kept])
        with pytest.raises(BadCheckpoint, match="truncated"):
            read_header(tmp_path / "cut.safetensors")
