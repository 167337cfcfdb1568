"""Laws of whole files and of disk space: JSON is a mapping or refused, a disk that is too small is said in bytes."""

from pathlib import Path

import pytest

from lora_fuse.errors import BadCheckpoint, NoSpace
from lora_fuse.machine.files import read_json
from lora_fuse.machine.space import free_bytes, require


def test_a_json_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"b": [1]}')
    assert read_json(tmp_path / "a.json", dict, BadCheckpoint) == {"b": [1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a\.json is not readable JSON \(.*No such file.*\); fetch it again"),
        (b"{", r"a\.json is not readable JSON \(Expecting .*\); fetch it again"),
        (b"\xff", r"a\.json is not readable JSON \(.*decode.*\); fetch it again"),
        (b"[1]", r"a\.json holds a list, not a mapping; fetch it again"),
        (b"[" * 100_000, r"a\.json is not readable JSON \(.*recursion.*\); fetch it again"),
    ],
    ids=["missing", "truncated", "not text", "a list", "too deep"],
)
def test_what_is_no_json_mapping_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=message):
        read_json(tmp_path / "a.json", dict, BadCheckpoint, "fetch it again")


def test_a_disk_with_less_than_is_needed_is_refused_with_both_numbers(tmp_path: Path) -> None:
    there = tmp_path / "not/yet"
    require(there, 1, "the file", "make room")
    need = 2 * free_bytes(there) + 1
    with pytest.raises(NoSpace, match=rf"the file needs .* \({need} bytes\), and the disk of .*yet has .* free; make"):
        require(there, need, "the file", "make room")
