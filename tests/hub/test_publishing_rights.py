"""Who may publish, where, and to whom it is visible: real processes against a Hub on the loopback."""

import pytest

from tests.hub_server import Fault, LoopbackHub
from tests.support.publications import COMMIT, REPO, Place, check_next_run, finish, is_untouched, repo
from tests.support.waiting import until


@pytest.mark.parametrize(
    ("token", "said"),
    [("hf_expired", '401 (User Access Token "alice-token" is expired); renew HF_TOKEN'), ("hf_read", "403 (")],
)
def test_a_token_that_may_not_is_refused(place: Place, hub: LoopbackHub, token: str, said: str) -> None:
    assert said in place.run(HF_TOKEN=token).refusal
    assert not hub.registry.repos
    check_next_run(place, hub, sends=None)


def test_a_token_that_is_taken_away_under_way_is_refused(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault(COMMIT, status=401, times=-1, body=b"{}"))
    assert "answered 401" in place.run().refusal
    assert is_untouched(hub)
    check_next_run(place, hub)


def test_who_may_only_propose_leaves_a_pull_request(place: Place, hub: LoopbackHub) -> None:
    hub.create(REPO)
    place.configure(private=False)
    line = place.run(HF_TOKEN="hf_other").refusal  # noqa: S106
    assert f"{hub.url}/{REPO}/discussions/1" in line
    assert "merge it there" in line
    assert is_untouched(hub)
    assert repo(hub).pulls[1].status == "open"
    assert place.run().code == 0  # the owner does not take over what somebody else may still change
    assert {pull.number: pull.status for pull in repo(hub).pulls.values()} == {1: "open", 2: "merged"}


def test_a_public_repository_gets_no_byte_where_private_is_asked_for(place: Place, hub: LoopbackHub) -> None:
    hub.create(REPO)
    assert f"{REPO} is public" in place.run().refusal
    assert (hub.uploaded(), len(repo(hub).commits), repo(hub).pulls) == (0, 1, {})


def test_a_repository_that_becomes_public_under_way_is_not_filled(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault("GET .*/revision/refs%2Fpr%2F1", delay=1.0))
    process = place.start()
    until(lambda: hub.calls("refs%2Fpr%2F1"))
    repo(hub).private = False
    assert f"{REPO} is public" in finish(process).refusal
    assert is_untouched(hub)
