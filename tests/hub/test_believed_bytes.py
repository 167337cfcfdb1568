"""Which bytes are believed: those with the hash that the Hub names, on the wire, in the cache and in a lock."""

from pathlib import Path

import pytest

from lora_fuse.hub.locks import verify_files
from lora_fuse.recipe.hf_cache import locate
from lora_fuse.recipe.records import Lock
from tests.hub_server import Fault, LoopbackHub
from tests.support.repositories import BASE, PIPELINE, flip, lock, records, refusal


@pytest.mark.parametrize("where", ["GET /_lfs/", r"GET .*/resolve/.*/transformer/config\.json"])
def test_a_byte_flipped_on_the_wire_is_fetched_again(hub: LoopbackHub, where: str) -> None:
    hub.push(BASE, PIPELINE)
    fault = Fault(where, flip_at=5)
    hub.faults.append(fault)
    assert lock().files == records(PIPELINE)
    assert fault.hits == 1


@pytest.mark.parametrize(
    ("where", "name", "hash_name"),
    [
        ("GET /_lfs/", "transformer/model-1-of-2.safetensors", "sha256"),
        (r"GET .*/vae/config\.json", "vae/config.json", "git blob"),
    ],
)
def test_a_byte_flipped_twice_is_refused(hub: LoopbackHub, where: str, name: str, hash_name: str) -> None:
    hub.push(BASE, PIPELINE)
    hub.faults.append(Fault(where, times=-1, flip_at=1))
    message = refusal(lock)
    assert f"{name} of {BASE}@" in message
    assert hash_name in message
    assert "expected" in message
    assert "fetched twice" in message


def test_a_short_answer_is_not_believed(hub: LoopbackHub) -> None:
    hub.push(BASE, PIPELINE)
    hub.faults.append(Fault("GET /_lfs/", times=-1, truncate_to=10))
    assert f"{BASE}@" in refusal(lock)


def test_a_byte_flipped_in_the_cache_is_found_offline_and_mended_online(hub: LoopbackHub) -> None:
    hub.push(BASE, PIPELINE)
    pinned = lock()
    damaged = locate(pinned) / "transformer/model-2-of-2.safetensors"
    flip(damaged)
    assert "transformer/model-2-of-2.safetensors" in refusal(lambda: lock(pinned, offline=True))
    assert "download stage" in refusal(lambda: verify_files(locate(pinned), pinned.files))
    assert lock(pinned) == pinned
    verify_files(locate(pinned), pinned.files)


def test_a_byte_flipped_in_the_cache_is_found_without_a_lock_too(hub: LoopbackHub) -> None:
    hub.push(BASE, PIPELINE)
    flip(locate(lock()) / "vae/config.json")
    assert lock().files == records(PIPELINE)


def test_a_missing_or_cut_file_is_not_located(hub: LoopbackHub) -> None:
    hub.push(BASE, PIPELINE)
    pinned = lock()
    path = locate(pinned) / "vae/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    message = refusal(lambda: locate(pinned))
    assert f"{pinned.files['vae/model.safetensors'].size - 1} bytes" in message
    path.unlink()
    assert "download stage" in refusal(lambda: locate(pinned))


def test_a_lock_of_elsewhere_is_not_located(hub: LoopbackHub, tmp_path: Path) -> None:
    there = Lock(BASE, None, "main", "c" * 40, records(PIPELINE))
    message = refusal(lambda: locate(there))
    assert "model_index.json, scheduler/scheduler_config.json, tokenizer/chat_template.jinja and 8 more of" in message
    assert f"{BASE}@{'c' * 40} are not on this machine" in message
    local = Lock(None, str(tmp_path / "gone"), None, None, records(PIPELINE))
    assert f"{tmp_path / 'gone'} are not on this machine" in refusal(lambda: locate(local))
