"""Laws of the compiled code's cache: work goes on where it cannot be written, or holds what is damaged."""

import tempfile
from pathlib import Path

import numba
import pytest

from lora_fuse.quantisation.compiling import compiled
from tests.support.machine import small_disk


def double(number: int) -> int:
    return 2 * number


def test_a_full_disk_keeps_no_code_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "small", "16k") as disk:
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(disk))
        (disk / "filler").write_bytes(bytes(8000))
        assert compiled()(double)(3) == 6
        assert not list(disk.rglob("*.nbc"))


@pytest.mark.parametrize("damage", [b"", b"no pickle", b"\x80\x04"])
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_damaged_cache_is_none(monkeypatch: pytest.MonkeyPatch, kind: str, damage: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(numba.config, "CACHE_DIR", folder)
        assert compiled()(double)(3) == 6
        (file,) = Path(folder).rglob(f"*.{kind}")
        file.write_bytes(damage)
        assert compiled()(double)(4) == 8


def test_a_folder_that_cannot_be_made_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert compiled()(double)(5) == 10
