"""Laws of the safetensors header: a good one tiles its file exactly, everything else is refused by name."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lora_fuse.checkpoint import read_header
from lora_fuse.errors import BadCheckpoint
from lora_fuse.header import Header, parse_header

F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def parse(entries: object, data: int = 8) -> Header:
    body = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    raw = struct.pack("<Q", len(body)) + body
    return parse_header(raw, len(raw) + data, "x.safetensors")


def test_the_header_of_a_real_file_gives_its_tensors(tmp_path: Path) -> None:
    save_file(
        {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.ones(1)},
        tmp_path / "f.safetensors",
        {"k": "v"},
    )
    header = read_header(tmp_path / "f.safetensors")
    data = (tmp_path / "f.safetensors").read_bytes()
    tensor = header.tensors["a"]
    assert (tensor.dtype, tensor.shape, header.metadata) == ("F16", (2, 3), {"k": "v"})
    assert data[tensor.start : tensor.end] == np.arange(6, dtype=np.float16).tobytes()
    assert data.startswith(header.raw)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"a": {**F32_PAIR, "data_offsets": [0, 4]}}, "span 4"),
        ({"a": {**F32_PAIR, "data_offsets": [4, 12]}}, "overlap or leave a hole"),
        ({"a": F32_PAIR, "b": F32_PAIR}, "overlap or leave a hole"),
        ({"a": {**F32_PAIR, "dtype": "PICKLE"}}, "'PICKLE'"),
        ({"a": {**F32_PAIR, "shape": [-2]}}, "no natural number"),
        ({"a": {**F32_PAIR, "shape": [True, 2]}}, "no natural number"),
        ({"a": {"dtype": "F32"}}, "lacks"),
        ({"a": 3}, "lacks"),
        ({}, "too long"),
        ([], "not a mapping"),
        ({"a": F32_PAIR, "__metadata__": {"k": 1}}, "__metadata__"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}', "twice"),
        (b"\x80\x04pickle", "does not parse"),
        (b"[" * 100_000, "does not parse"),
    ],
)
def test_a_hostile_header_is_refused(entries: object, reason: str) -> None:
    with pytest.raises(BadCheckpoint, match=reason):
        parse(entries)


def test_a_truncated_file_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": np.ones(100)}, path)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadCheckpoint, match=rf"truncated.* {whole} bytes, the file has {whole - 1}"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64, struct.pack("<Q", 1 << 40) + b"{}"])
def test_a_file_without_room_for_its_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(BadCheckpoint):
        read_header(tmp_path / "f.safetensors")


@given(st.binary(max_size=200), st.integers(0, 300))
def test_no_bytes_make_the_parser_fail_otherwise(body: bytes, data: int) -> None:
    with contextlib.suppress(BadCheckpoint):
        parse(body, data)
