"""Faults on the wire while the download stage runs: real stage, real client, real Hub.

What goes wrong once is overcome; what goes wrong always is one `error:` line, exit 2, no traceback and no lock.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

import pytest

from tests.hub_server import Fault, LoopbackHub
from tests.support.downloads import BIG, CONTENT, FILE, LORA, Project, fetched, leftovers

ONCE = {
    "drop": Fault(CONTENT, drop_after=100_000),
    "500 twice": Fault(CONTENT, times=2, status=500),
    "429": Fault(CONTENT, status=429, headers={"Retry-After": "1"}),
    "short body": Fault(CONTENT, truncate_to=1000),
    "flipped byte": Fault(CONTENT, flip_at=70_000),
    "stall": Fault(CONTENT, delay=600),
    "HEAD 500": Fault("HEAD /bob/lora/resolve", times=2, status=500),
    "503 of the API": Fault("GET /api/models/bob/lora", times=2, status=503),
    "429 of the API": Fault("GET /api/models/bob/lora", status=429, headers={"Retry-After": "1"}),
}


def pairs(faults: Iterable[str]) -> list[tuple[str, str]]:
    """Each fault with both transports, where that makes a difference."""
    return [(name, kind) for name in faults for kind in ("lfs", "xet") if kind == "lfs" or "API" not in name]


@pytest.mark.parametrize(("name", "transport"), pairs(ONCE), indirect=["transport"])
def test_what_goes_wrong_once_is_overcome(hub: LoopbackHub, project: Project, transport: str, name: str) -> None:
    fault = replace(ONCE[name])
    hub.faults.append(fault)
    project.run()
    assert fault.hits == ONCE[name].times
    assert project.lock()["files"][FILE]["size"] == len(BIG)
    assert not leftovers()


def test_a_transfer_that_is_slow_but_moves_is_left_alone(hub: LoopbackHub, project: Project, transport: str) -> None:
    hub.faults.append(Fault(CONTENT, times=-1, bytes_per_s=600_000))
    assert "trying again" not in project.run(stall=4)
    assert len(fetched(hub)) == 1


ALWAYS = {
    "drop": (Fault(CONTENT, drop_after=0), "no byte came for"),
    "500": (Fault(CONTENT, status=500), "500"),
    "short body": (Fault(CONTENT, truncate_to=1000), "Consistency check failed: file should be of size 3000000"),
    "flipped byte": (Fault(CONTENT, flip_at=70_000), "expected "),
    "stall": (Fault(CONTENT, delay=600), "no byte came for"),
    "HEAD 500": (Fault("HEAD /bob/lora/resolve", status=500), "500"),
    "503 of the API": (Fault("GET /api/models/bob/lora", status=503), "503"),
}


@pytest.mark.parametrize(("name", "transport"), pairs(ALWAYS), indirect=["transport"])
def test_what_goes_wrong_always_is_one_line(hub: LoopbackHub, project: Project, transport: str, name: str) -> None:
    fault, said = ALWAYS[name]
    hub.faults.append(replace(fault, times=-1))
    line = project.refused()
    assert said in line
    assert LORA in line
    assert not leftovers()
    if (name, transport) in {("drop", "xet"), ("flipped byte", "lfs")}:  # what comes next is the same for all
        hub.faults.clear()
        project.run()


def test_a_stalled_transfer_goes_on_without_xet_if_it_may(hub: LoopbackHub, project: Project) -> None:
    hub.push(LORA, {FILE: BIG}, xet=True)
    hub.faults.append(Fault("GET /cas/xorb", times=-1, delay=600))
    output = project.run()
    assert re.search(r"download: .*: no byte came for 3 s; trying again without Xet", output)
    assert [call.line.split("/")[1] for call in fetched(hub) if not call.struck] == ["_lfs"]


def test_without_xet_no_xet_is_used(hub: LoopbackHub, project: Project) -> None:
    hub.push(LORA, {FILE: BIG}, xet=True)
    project.run(HF_HUB_DISABLE_XET="1")
    assert not hub.calls("/cas/")
    assert hub.calls("/_lfs/")
