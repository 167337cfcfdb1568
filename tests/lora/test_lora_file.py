"""A LoRA that was opened: what is added later is what was hashed then."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lora_fuse
from lora_fuse.errors import BadLora, Refused
from lora_fuse.lora import open_lora
from lora_fuse.machine import file_state
from tests.support import tiny


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors())
    time.sleep(2 * file_state.TICK / 1e9)
    return made


def change(path: Path) -> None:
    """Change its last factor, and set the time back."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-4:] = bytes(4)
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-4] + bytes(4))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [change, replace])
def test_a_lora_that_changes_between_plan_and_fuse_is_in_no_manifest(
    tmp_path: Path, base: Path, path: Path, change: Callable[[Path], None]
) -> None:
    plan = lora_fuse.plan(base, [lora_fuse.LoraInput("l", path, 1.0)])
    assert plan.loras[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    change(path)
    with pytest.raises(Refused, match=r"l\.safetensors changed while it was read; run again"):
        lora_fuse.fuse(plan, tmp_path / "out")
    assert [one.name for one in tmp_path.glob("*out*") if not one.name.endswith(".lock")] == []


def test_with_digests_bytes_count_and_not_states(path: Path) -> None:
    lora = open_lora(path, digests=True)
    (delta,) = (one for one in lora.deltas if one.keys["up"].startswith("transformer_blocks.1.img_mlp"))
    assert lora.read(delta).keys() == delta.keys.keys()
    change(path)
    object.__setattr__(lora, "state", file_state.FileState.of(path.stat()))  # as if a disk had done it
    with pytest.raises(BadLora, match="is read as other bytes than before"):
        list(map(lora.read, lora.deltas))
