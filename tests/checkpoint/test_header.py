"""Laws of the safetensors header: a good one tiles its file exactly, everything else is refused by name.

What is accepted here safetensors itself accepts, as the same tensors; where it accepts more, the reason is listed.
"""

import contextlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save, save_file

from lora_fuse.checkpoint import header as header_module
from lora_fuse.checkpoint.dtypes import DTYPES
from lora_fuse.checkpoint.header import Header, parse_header
from lora_fuse.checkpoint.shards import read_header
from lora_fuse.errors import BadCheckpoint

Content = dict[str, tuple[str, tuple[int, ...], bytes]]  # dtype, shape and data by name

F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NUMPY = [
    np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64,
    np.float16, np.float32, np.float64, ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
]  # fmt: skip

# Why this reader refuses what safetensors reads.
STRICTER = re.compile("stands in it twice|the format knows|lacks|has the dtype|that no array can have")

# What a mutation puts in the place of a part of the JSON, as text.
JUNK = [
    "0", "-0", "-1", "4", "8", "16", "1.0", "8e0", "1e400", "NaN", "Infinity", "-Infinity", "true", "null", "9" * 5000,
    str(2**63 - 1), str(2**63), str(2**64 - 1), str(2**64), '""', '"8"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"',
    "{}", "[]", "[0]", "[0, 0]", "[0, 8]", "[8, 0]", "[4, 12]", "[0, 8, 8]", '{"a": "b"}', '{"a": null}', "[[0]]",
    '["F32", [2], [0, 8]]', '{"F32": null}', '"F8_E8M0"', '"F4"', '"I16"', '"f32"', "[" * 5000, "[" * 500 + "]" * 500,
    f"[0, {2**64}]", f"[{2**40}, {2**40}, 0]", f"[0, {2**40}, {2**40}]", str([1] * 70), str([2**62] * 1000),
]  # fmt: skip
SLOT = "the place to put junk"


def parse(entries: object, data: int = 8) -> Header:
    body = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    raw = struct.pack("<Q", len(body)) + body
    return parse_header(raw, len(raw) + data, "x.safetensors")


def packed(entries: object, data: bytes = b"") -> bytes:
    """A file of a header, given as bytes or as what to say in JSON, and data."""
    body = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(body)) + body + data


def reference(blob: bytes) -> Content | None:
    """What safetensors reads in a file; None if it refuses it."""
    try:
        tensors = deserialize(blob)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return None
    return {name: (told["dtype"], tuple(told["shape"]), bytes(told["data"])) for name, told in tensors}


def content(blob: bytes, header: Header) -> Content:
    return {name: (told.dtype, told.shape, blob[told.start : told.end]) for name, told in header.tensors.items()}


def check_law(path: Path, blob: bytes) -> None:
    """The law of this file for one file, and for the same with one more metadata entry."""
    path.write_bytes(blob)
    theirs = reference(blob)
    read = read_or_refuse(path)
    if isinstance(read, str):
        assert theirs is None or STRICTER.search(read), read
        assert str(path) in read
        return
    assert content(blob, read) == theirs
    check_metadata(path, blob, read, "lora_fuse", '{"base": "\u00e9"}')


def read_or_refuse(path: Path) -> Header | str:
    try:
        return read_header(path)
    except BadCheckpoint as error:
        return str(error)


def check_metadata(path: Path, blob: bytes, header: Header, name: str, value: str) -> None:
    longer = header.with_metadata(name, value)
    path.write_bytes(longer + blob[len(header.raw) :])
    again = read_header(path)
    assert reference(path.read_bytes()) == content(blob, header)
    assert again.raw == longer
    shift = len(longer) - len(header.raw)
    assert [(told.name, told.start - shift, told.end - shift) for told in again.tensors.values()] == [
        (told.name, told.start, told.end) for told in header.tensors.values()
    ]
    with safe_open(path, framework="np") as handle:
        assert handle.metadata() == again.metadata == {**header.metadata, name: value}


@st.composite
def good_files(draw: st.DrawFn) -> bytes:
    """A file as safetensors writes it: up to four small tensors, of zero size too."""
    names = draw(st.lists(st.text(max_size=6).filter(lambda name: name != "__metadata__"), max_size=4, unique=True))
    shapes = st.lists(st.integers(0, 3), max_size=3)
    arrays = {name: np.ones(draw(shapes), draw(st.sampled_from(NUMPY))) for name in names}
    # without tensors and with empty metadata safetensors 0.8 writes what it does not read itself
    metadata = draw(st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=6), min_size=1, max_size=2))
    blob: bytes = save(arrays, metadata)
    size = sum(array.nbytes for array in arrays.values())
    return blob[: len(blob) - size] + bytes(number % 251 for number in range(size))  # no two places alike


@st.composite
def scratched_files(draw: st.DrawFn) -> bytes:
    """A file with a few bytes changed, put in, left out or cut off, anywhere."""
    blob = bytearray(draw(good_files()))
    for _ in range(draw(st.integers(1, 3))):
        at, count = draw(st.integers(0, len(blob))), draw(st.integers(0, 9))
        new = draw(st.binary(max_size=9) | st.text('{}[]",:0123456789\\-+.eE \t', max_size=9).map(str.encode))
        end = draw(st.sampled_from([at, at + count, at + len(new), len(blob)]))
        blob[at:end] = new
        if draw(st.booleans()):  # the length as it should be, so that the change is seen by more than one check
            end = blob.rfind(b"}") + 1
            blob[:8] = struct.pack("<Q", max(end - 8, 0))
    return bytes(blob)


@st.composite
def restructured_files(draw: st.DrawFn) -> bytes:
    """A file whose JSON has junk in one place or the same key twice, and is spelled in another way."""
    blob = draw(good_files())
    (length,) = struct.unpack("<Q", blob[:8])
    whole: dict[str, Any] = {"": json.loads(blob[8 : 8 + length])}
    parent, key = draw(st.sampled_from(list(places(whole))))
    put = draw(st.sampled_from(JUNK))
    change = draw(st.sampled_from(["nothing", "junk", "junk", "junk", "twice"]))
    if change == "junk":
        parent[key] = SLOT
    elif change == "twice" and isinstance(parent, dict) and parent is not whole:
        parent[SLOT], put = parent.get(key), json.dumps(key)
    text = json.dumps(whole[""], ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    before, after = (
        draw(st.sampled_from(["", "", " ", "\n\t", "\ufeff"])),
        draw(st.sampled_from(["", "  ", "\n", "\0"])),
    )
    body = before + text.replace(json.dumps(SLOT), put) + after
    encoding = draw(st.sampled_from(["utf-8"] * 4 + ["utf-16", "utf-16-le", "utf-32-be"]))
    return packed(body.encode(encoding), blob[8 + length :])


def places(parent: Any) -> Iterator[tuple[Any, Any]]:
    """Every part of a JSON value, and a place for a new one in each mapping, as where it is and its key there."""
    for key in parent if isinstance(parent, dict) else range(len(parent)):
        yield parent, key
        if isinstance(parent[key], dict | list):
            yield from places(parent[key])
    if isinstance(parent, dict):
        yield from ((parent, key) for key in ("new", "__metadata__") if key not in parent)


def test_the_header_of_a_real_file_gives_its_tensors(tmp_path: Path) -> None:
    save_file(
        {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.ones(1)}, tmp_path / "f.safetensors", {"k": "v"}
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


def test_a_name_longer_than_any_model_s_is_refused() -> None:
    spot = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    assert list(parse({"x" * 1000: spot}, data=0).tensors) == ["x" * 1000]
    with pytest.raises(BadCheckpoint, match=r"the name 'xxx.* has 1001 characters, at most 1000 are read"):
        parse({"x" * 1001: spot}, data=0)


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


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "f.safetensors"


@settings(deadline=None, max_examples=200)
@given(blob=good_files(), name=st.text(max_size=6), value=st.text(max_size=20))
def test_every_file_of_safetensors_is_read_and_takes_one_more_entry(
    file: Path, blob: bytes, name: str, value: str
) -> None:
    file.write_bytes(blob)
    header = read_header(file)
    assert content(blob, header) == reference(blob)
    check_metadata(file, blob, header, name, value)


@settings(deadline=None, max_examples=400)
@given(scratched_files())
def test_a_scratched_file_is_read_as_safetensors_reads_it_or_refused(file: Path, blob: bytes) -> None:
    check_law(file, blob)


@settings(deadline=None, max_examples=600)
@given(restructured_files())
def test_a_restructured_header_is_read_as_safetensors_reads_it_or_refused(file: Path, blob: bytes) -> None:
    check_law(file, blob)


BOTH_REFUSE = {
    "overlap": ({"a": F32_PAIR, "b": {**F32_PAIR, "data_offsets": [4, 12]}}, 12, "'b' begins .* overlap"),
    "same place": ({"a": F32_PAIR, "b": F32_PAIR}, 8, "'b' begins .* overlap"),
    "out of range": ({"a": F32_PAIR, "b": {**F32_PAIR, "data_offsets": [8, 16]}}, 8, "truncated"),
    "hole": ({"a": F32_PAIR, "b": {**F32_PAIR, "data_offsets": [9, 17]}}, 17, "'b' begins .* leave a hole"),
    "hole at the start": ({"a": {**F32_PAIR, "data_offsets": [8, 16]}}, 16, "'a' begins .* leave a hole"),
    "trailing bytes": ({"a": F32_PAIR}, 9, "too long"),
    "size": ({"a": {**F32_PAIR, "shape": [3]}}, 8, r"F32 \[3\], 12 bytes, but its data_offsets span 8"),
    "negative size": ({"a": {**F32_PAIR, "data_offsets": [8, 0]}}, 8, "span -8"),
    "empty": (b"", 0, "does not parse"),
    "UTF-16": (json.dumps({"a": F32_PAIR}).encode("utf-16"), 8, "does not parse"),
    "UTF-16 without a mark": (json.dumps({"a": F32_PAIR}).encode("utf-16-le"), 8, "does not parse"),
    "UTF-32": (json.dumps({"a": F32_PAIR}).encode("utf-32"), 8, "does not parse"),
    "byte order mark": (json.dumps({"a": F32_PAIR}).encode("utf-8-sig"), 8, "does not parse"),
    "half a character, name": ({"\ud800": F32_PAIR}, 8, "does not parse .*surrogates"),
    "half a character, metadata": ({"a": F32_PAIR, "__metadata__": {"k": "\udfff"}}, 8, "does not parse .*surrogates"),
    "half a character, metadata key": ({"a": F32_PAIR, "__metadata__": {"\udfff": ""}}, 8, "does not parse .*surrog"),
    "minus zero": ({"a": {**F32_PAIR, "data_offsets": [-0.0, 8]}}, 8, "no natural number"),
    "minus zero, whole": (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-0, 8]}}', 8, "no natural number"),
    "65 bits": ({"a": {**F32_PAIR, "shape": [0, 2**64], "data_offsets": [0, 0]}}, 0, "no natural number"),
    "5000 digits": (json.dumps({"a": F32_PAIR}).encode().replace(b"[2]", b"[" + b"9" * 5000 + b"]"), 8, "no natural"),
    "NaN": ({"a": {**F32_PAIR, "shape": [float("nan")]}}, 8, "no natural number"),
    "a mapping for a shape": ({"a": {**F32_PAIR, "shape": {}, "data_offsets": [0, 4]}}, 4, "no natural number"),
    "a string for a shape": ({"a": {**F32_PAIR, "shape": "", "data_offsets": [0, 4]}}, 4, "no natural number"),
    "three offsets": ({"a": {**F32_PAIR, "data_offsets": [0, 8, 8]}}, 8, "not two offsets"),
    "1000 huge dimensions": ({"a": {**F32_PAIR, "shape": [2**62] * 1000}}, 8, "no array can have"),
    "overflow before zero": ({"a": {**F32_PAIR, "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}, 0, "no array"),
    "deep": (b'{"a":' * 100_000, 0, "does not parse"),
    "deep field": ({"a": {**F32_PAIR, "new": json.loads("[" * 200 + "]" * 200)}}, 8, "has 'new', and the format knows"),
}  # fmt: skip


@pytest.mark.parametrize(("entries", "data", "reason"), BOTH_REFUSE.values(), ids=BOTH_REFUSE)
def test_what_safetensors_refuses_is_refused_by_name(file: Path, entries: object, data: int, reason: str) -> None:
    blob = packed(entries, bytes(data))
    assert reference(blob) is None
    file.write_bytes(blob)
    with pytest.raises(BadCheckpoint, match=reason) as refused:
        read_header(file)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("length", [100, 2**31, 2**63, 2**64 - 1])
def test_a_length_beyond_the_file_is_refused(file: Path, length: int) -> None:
    blob = struct.pack("<Q", length) + packed({"a": F32_PAIR}, bytes(8))[8:]
    assert reference(blob) is None
    file.write_bytes(blob)
    with pytest.raises(BadCheckpoint, match=f"would be {length} bytes and the file has {len(blob)}"):
        read_header(file)


def test_a_header_beyond_the_limit_of_safetensors_is_refused_unread(file: Path) -> None:
    with file.open("wb") as sparse:
        sparse.write(struct.pack("<Q", 100_000_001))
        sparse.truncate(200_000_000)
    with pytest.raises(BadCheckpoint, match="would be 100000001 bytes"):
        read_header(file)


PAIR_TEXT = json.dumps(F32_PAIR)
ONLY_SAFETENSORS_READS = {
    "tensor twice": (f'{{"a": {PAIR_TEXT}, "a": {PAIR_TEXT}}}'.encode(), 8, "'a' stands in it twice"),
    "metadata key twice": (f'{{"a": {PAIR_TEXT}, "__metadata__": {{"k": "", "k": ""}}}}'.encode(), 8, "'k' .* twice"),
    "unknown field": ({"a": {**F32_PAIR, "scale": 2}}, 8, "'a' has 'scale', and the format knows"),
    "a list for an entry": ({"a": list(F32_PAIR.values())}, 8, "'a' lacks"),
    "a mapping for a dtype": ({"a": {**F32_PAIR, "dtype": {"F32": None}}}, 8, "'a' has the dtype"),
    "65 dimensions": ({"a": {**F32_PAIR, "shape": [1] * 64 + [2]}}, 8, "65 dimensions that no array can have"),
    "64 bits times zero": (
        {"a": {"dtype": "U8", "shape": [2**63, 0], "data_offsets": [0, 0]}},
        0,
        "2 dimensions that no array can have",
    ),
    "zero of too much": ({"a": {**F32_PAIR, "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}, 0, "no array can"),
}


@pytest.mark.parametrize(("entries", "data", "reason"), ONLY_SAFETENSORS_READS.values(), ids=ONLY_SAFETENSORS_READS)
def test_this_reader_is_stricter_only_here(file: Path, entries: object, data: int, reason: str) -> None:
    blob = packed(entries, bytes(data))
    assert reference(blob) is not None
    file.write_bytes(blob)
    with pytest.raises(BadCheckpoint, match=reason) as refused:
        read_header(file)
    assert STRICTER.search(str(refused.value))


EMPTY = {**F32_PAIR, "shape": [0], "data_offsets": [0, 0]}
UNUSUAL = {
    "no tensor": ({}, 0),
    "white space": (b" \n\t" + json.dumps({"a": F32_PAIR}).encode() + b"\r\n ", 8),
    "metadata of null": ({"__metadata__": None, "a": F32_PAIR}, 8),
    "no name": ({"": F32_PAIR}, 8),
    "names to escape": ({'"\\\0\n\U0001f600': F32_PAIR, "\u2028": {**F32_PAIR, "data_offsets": [8, 16]}}, 16),
    "not in file order": ({"b": {**F32_PAIR, "data_offsets": [8, 16]}, "a": F32_PAIR}, 16),
    "empty tensors": ({"z": EMPTY, "a": F32_PAIR, "b": EMPTY, "c": {**EMPTY, "data_offsets": [8, 8]}}, 8),
    "64 dimensions": ({"a": {**F32_PAIR, "shape": [1] * 63 + [2]}}, 8),
    "an early zero": ({"a": {**F32_PAIR, "shape": [2**30, 0, 2**30], "data_offsets": [0, 0]}}, 0),
}


@pytest.mark.parametrize(("entries", "data"), UNUSUAL.values(), ids=UNUSUAL)
def test_an_unusual_header_is_read_as_safetensors_reads_it(file: Path, entries: object, data: int) -> None:
    blob = packed(entries, bytes(range(data)))
    file.write_bytes(blob)
    header = read_header(file)
    assert content(blob, header) == reference(blob)
    check_metadata(file, blob, header, "k", "v")


def test_every_known_dtype_is_one_of_safetensors() -> None:
    for dtype, bits in ((name, kind.bits) for name, kind in DTYPES.items()):
        blob = packed({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}, bytes(bits))
        assert reference(blob) == {"a": (dtype, (8,), bytes(bits))}


def test_every_dtype_of_safetensors_is_known_by_its_name_in_numpy() -> None:
    with pytest.raises(SafetensorError, match="expected one of") as refused:
        deserialize(packed({"a": {"dtype": "no such", "shape": [0], "data_offsets": [0, 0]}}))  # type: ignore[no-untyped-call]
    assert set(re.findall("`([A-Z0-9_]+)`", str(refused.value).partition("expected")[2])) == set(DTYPES)
    for kind in DTYPES.values():
        assert kind.numpy.itemsize == max(1, kind.bits // 8)


@pytest.mark.parametrize(("shape", "end"), [([3], 2), ([4], 4), ([2, 2], 1)])
def test_values_of_less_than_a_byte_fill_their_bytes(file: Path, shape: list[int], end: int) -> None:
    blob = packed({"a": {"dtype": "F4", "shape": shape, "data_offsets": [0, end]}}, bytes(end))
    file.write_bytes(blob)
    assert reference(blob) is None
    with pytest.raises(BadCheckpoint, match=r"F4 .* bytes, but its data_offsets span"):
        read_header(file)


def test_more_entries_than_a_model_has_are_refused_unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_module, "MAX_SIGNS", {b"{": 3, b"[": 9, b",": 20})
    spot = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    assert len(parse({"a": spot, "b": spot}, data=0).tensors) == 2
    with pytest.raises(BadCheckpoint, match=r"its header has 4 times '\{', and at most 3 are read"):
        parse({"a": spot, "b": spot, "c": spot}, data=0)
    with pytest.raises(BadCheckpoint, match=r"its header has 10 times '\[', and at most 9 are read"):
        parse({"a": spot | {"shape": [[]] * 8}}, data=0)


def test_a_key_twice_is_found_among_many() -> None:
    entries = {f"k{number}": 0 for number in range(100_000)}
    text = json.dumps(entries)[:-1] + ', "k99999": 0}'
    with pytest.raises(BadCheckpoint, match="'k99999' stands in it twice"):
        parse(text.encode())


def test_an_entry_that_does_not_fit_below_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    header = parse({"a": F32_PAIR})
    longer = header.with_metadata("k", "v" * 100)
    monkeypatch.setattr(header_module, "MAX_HEADER", len(longer) - 8)
    assert header.with_metadata("k", "v" * 100) == longer
    with pytest.raises(BadCheckpoint, match=f"'k' .*would be {len(longer)} bytes.*into shards"):
        header.with_metadata("k", "v" * 108)
