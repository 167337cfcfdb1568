"""Publications beside others: of the same folder, of other bytes, of somebody else."""

import hashlib
from pathlib import Path

import pytest

from tests.hub_server import Fault, LoopbackHub
from tests.support.publications import COMMIT, MERGE, REPO, Place, check_next_run, check_published, finish, repo
from tests.support.waiting import until


def test_a_second_run_of_the_same_folder_says_so(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault(COMMIT, delay=4.0))
    first = place.start()
    until(lambda: hub.calls("/commit/"))
    assert "another run is writing artifacts;" in place.run().refusal
    assert finish(first).code == 0
    check_published(place, hub)


@pytest.mark.parametrize("seed", [0, 1], ids=["same-bytes", "other-bytes"])
def test_two_publications_at_once_do_not_mix(place: Place, hub: LoopbackHub, tmp_path: Path, seed: int) -> None:
    hub.create(REPO, private=True)
    other = Place(tmp_path / "other", {**place.env, "HF_HOME": str(tmp_path / "other-home")})
    other.fill(seed)
    other.configure()
    hub.faults.append(Fault(COMMIT, times=2, delay=2.0))  # both see an empty main
    processes = [place.start(), other.start()]
    ends = [finish(process) for process in processes]
    winners = [one for one, end in zip((place, other), ends, strict=True) if end.code == 0]
    assert winners
    assert len(winners) == 1 or seed == 0
    check_files = {name: file.sha256 for name, file in winners[0].manifest.files.items()}
    assert {name: hashlib.sha256(hub.read(REPO, name)).hexdigest() for name in check_files} == check_files
    for end in ends:
        assert end.code == 0 or end.refusal


def test_pull_requests_that_are_not_ours_are_left_alone(place: Place, hub: LoopbackHub) -> None:
    """Of other bytes, and one of somebody else under our name, with a file too many."""
    hub.create(REPO, private=True)
    key = hashlib.sha256((place.root / "artifacts/merged.manifest.json").read_bytes()).hexdigest()
    stale = repo(hub).open_pull("pocket, scale 1, manifest 1234", "alice")
    foreign = repo(hub).open_pull(f"pocket, manifest {key}", "mallory")
    hub.push(REPO, {"evil.py": b"import os"}, revision=f"refs/pr/{foreign.number}")
    assert place.run().code == 0
    check_published(place, hub)
    assert (stale.status, foreign.status, place.receipt.pull_request) == ("open", "open", 3)


def test_our_own_pull_request_with_more_on_it_is_closed_with_a_word(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault(MERGE, status=403, times=-1, body=b"{}"))
    assert place.run().refusal
    hub.push(REPO, {"evil.py": b"import os"}, revision="refs/pr/1")
    check_next_run(place, hub)
    pull = repo(hub).pulls[1]
    assert (pull.status, place.receipt.pull_request) == ("closed", 2)
    assert any("a new one takes its place" in str(event) for event in pull.events)
