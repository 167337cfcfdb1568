"""Ranges of a file while the wire fails and a Hub lies: bytes are what was promised, or it is refused.

The client is real, and so is the Hub; whole fuses are in `test_streaming`.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from lora_fuse.errors import BadCheckpoint, BadSource, ConnectionLost, Refused, WrongContent
from lora_fuse.hub.streaming import arriving_file, remote_file
from lora_fuse.hub.streaming.arriving_file import Lanes
from lora_fuse.hub.streaming.streamed_base import HubFiles
from lora_fuse.machine.files import FileRecord
from tests.hub_server import Fault, LoopbackHub

REPO, NAME = "alice/base", "transformer/a.safetensors"
CONTENT = os.urandom(3_000_000)
RANGE = 1 << 18
STORED, ASKED = "GET /_lfs/", f"HEAD /{REPO}/resolve/"
STALL = 0.5  # seconds


@pytest.fixture
def files(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[HubFiles]:
    monkeypatch.setattr(arriving_file, "RANGE", RANGE)
    monkeypatch.setattr(remote_file, "ENOUGH", RANGE // 4)
    monkeypatch.setattr(remote_file, "DELAYS", (0.01, 0.02, 0.03))
    record = FileRecord(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    commit = hub.push(REPO, {NAME: CONTENT}, xet="Xet" in request.node.name).oid
    with ThreadPoolExecutor(4) as threads:
        yield HubFiles((REPO, commit), {NAME: record}, Lanes(threads, 4), STALL)


def arrived(files: HubFiles, step: int = 100_001) -> bytes:
    memory = memoryview(bytearray(len(CONTENT)))
    with files.open(NAME) as source:
        for at in range(0, len(CONTENT), step):
            source.fill(memory[at : at + step], at)
    return memory.tobytes()


def stored(hub: LoopbackHub) -> int:
    return sum(call.sent for call in hub.calls(STORED))


ONCE = {
    "nothing": Fault("nowhere"),
    "nothing, kept in Xet": Fault("nowhere"),
    "drop": Fault(STORED, drop_after=100_000, skip=2),
    "500 twice": Fault(STORED, times=2, status=500),
    "429": Fault(STORED, status=429, headers={"Retry-After": "0"}),
    "short body": Fault(STORED, truncate_to=1000),
    "stall": Fault(STORED, delay=600),
    "trickle": Fault(STORED, trickle=0.02),
    "address expired": Fault(STORED, skip=5, times=1, status=403),
    "Hub in trouble": Fault(ASKED, times=2, status=503),
}


@pytest.mark.parametrize("name", ONCE)
def test_what_goes_wrong_once_is_overcome_and_nothing_comes_twice(hub: LoopbackHub, files: HubFiles, name: str) -> None:
    fault = replace(ONCE[name])
    hub.faults.append(fault)
    assert arrived(files) == CONTENT
    assert fault.hits == (0 if name.startswith("nothing") else ONCE[name].times)
    sent_in_vain = RANGE if name == "trickle" else RANGE // 2  # the Hub counts what it begins to send
    assert len(CONTENT) <= stored(hub) <= len(CONTENT) + sent_in_vain
    assert all(call.authorized for call in hub.calls(ASKED))
    assert not any(call.authorized for call in hub.calls(STORED))
    assert len(hub.calls(ASKED)) == {"address expired": 2, "Hub in trouble": 3}.get(name, 1)


ALWAYS: dict[str, tuple[Fault, type[Refused], str]] = {
    "drop": (Fault(STORED, drop_after=0), ConnectionLost, "what is finished stays"),
    "500": (Fault(STORED, status=500), ConnectionLost, "answered 500"),
    "no such file": (Fault(ASKED, status=404, headers={"X-Error-Code": "EntryNotFound"}), BadSource, "no such file"),
    "short body": (Fault(STORED, truncate_to=1000), ConnectionLost, "bytes of a range did not come"),
    "stall": (Fault(STORED, delay=600), ConnectionLost, "2 times"),
    "trickle": (Fault(STORED, trickle=0.02), ConnectionLost, "less than 1 kB/s moved for"),
    "in a circle": (Fault(STORED, status=302, headers={"Location": "/_lfs/x"}), BadSource, "one address to the next"),
    "no ranges": (Fault(STORED, whole=True), BadSource, "answered 200, not 206"),
    "another range": (Fault(STORED, says={"Content-Range": "bytes 0-9/10"}), WrongContent, "the answer has"),
    "changes": (Fault(STORED, skip=6, says={"ETag": '"other"'}), WrongContent, "changed between two ranges"),
    "other promise": (Fault(ASKED, says={"X-Linked-Etag": f'"{64 * "0"}"'}), WrongContent, "its answer 0000"),
    "other commit": (Fault(ASKED, says={"X-Repo-Commit": 40 * "0"}), BadSource, "asked for was"),
    "flipped byte": (Fault(STORED, skip=7, times=1, flip_at=70_000), WrongContent, "expected "),
}


@pytest.mark.parametrize("name", ALWAYS)
def test_what_goes_wrong_always_is_refused(hub: LoopbackHub, files: HubFiles, name: str) -> None:
    fault, kind, said = ALWAYS[name]
    hub.faults.append(replace(fault, times=-1 if name != "flipped byte" else 1))
    with pytest.raises(kind) as caught:
        arrived(files)
    assert type(caught.value) is kind
    assert said in str(caught.value)
    assert NAME in str(caught.value)
    assert "hf_" not in str(caught.value)


def test_what_streams_is_read_once_in_order_and_to_its_end(files: HubFiles) -> None:
    memory = memoryview(bytearray(10))
    with (
        pytest.raises(BadCheckpoint, match="after byte 0 of 3000000 came, those from 5 to 15"),
        files.open(NAME) as one,
    ):
        one.fill(memory, 5)
    with pytest.raises(BadCheckpoint, match="10 of 3000000 bytes were read"), files.open(NAME) as one:
        one.fill(memory, 0)


def test_a_file_that_was_read_in_part_goes_on_from_there(hub: LoopbackHub, files: HubFiles) -> None:
    memory = memoryview(bytearray(len(CONTENT) - 1000))
    with files.open(NAME, CONTENT[:1000]) as source:
        source.fill(memory, 1000)
    assert memory == CONTENT[1000:]
    assert stored(hub) == len(memory)
