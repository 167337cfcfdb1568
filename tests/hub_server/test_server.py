"""The loopback Hub against the real client: what later tests build on does what the client expects of a Hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from tests.hub_server import Fault, LoopbackHub

REPO = "alice/model"
ALICE, BOB = "hf_write", "hf_read"
BIG = bytes(range(256)) * 2000
UPLOAD = """
import sys
from huggingface_hub import HfApi
HfApi().upload_file(path_or_fileobj=sys.argv[1], path_in_repo="big.safetensors", repo_id="alice/model")
"""


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    hub.create(REPO)
    return HfApi(endpoint=hub.url, token=ALICE)


def download(hub: LoopbackHub, name: str, cache: Path, revision: str = "main") -> bytes:
    path = hf_hub_download(REPO, name, revision=revision, endpoint=hub.url, cache_dir=cache, token=ALICE)
    return Path(path).read_bytes()


def test_a_pull_request_has_its_own_files_until_it_is_merged(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    files = [CommitOperationAdd("big.safetensors", BIG), CommitOperationAdd("a.json", b"{}")]
    made = api.create_commit(REPO, files, commit_message="add", create_pr=True)
    assert made.pr_num == 1
    assert "a.json" not in hub.registry.repos[REPO].head.tree
    assert download(hub, "big.safetensors", tmp_path, "refs/pr/1") == BIG
    api.create_commit(REPO, [CommitOperationAdd("b.json", b"[]")], commit_message="more", revision="refs/pr/1")
    api.merge_pull_request(REPO, 1)
    assert api.get_discussion_details(REPO, 1).status == "merged"
    assert {"a.json", "b.json", "big.safetensors"} <= hub.registry.repos[REPO].head.tree.keys()


def test_an_empty_pull_request_can_be_filled(hub: LoopbackHub, api: HfApi) -> None:
    pull = api.create_pull_request(REPO, "staged")
    api.create_commit(REPO, [CommitOperationAdd("a.json", b"{}")], commit_message="x", revision=pull.git_reference)
    assert "a.json" in hub.registry.repos[REPO].at(f"refs/pr/{pull.num}").tree


def test_tags_refs_and_history_are_listed(hub: LoopbackHub, api: HfApi) -> None:
    commit = hub.push(REPO, {"a.json": b"{}"})
    api.create_tag(REPO, tag="v1", revision=commit.oid)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1")
    api.create_pull_request(REPO, "one")
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", commit.oid)]
    assert [pull.ref for pull in refs.pull_requests or ()] == ["refs/pr/1"]
    assert [item.title for item in api.list_repo_commits(REPO)] == ["push", "initial commit"]


def test_a_listing_in_pages_is_whole(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path, page_size=3).run() as hub:
        hub.push(REPO, {f"{letter}/{number}.json": b"{}" for letter in "ab" for number in range(4)})
        api = HfApi(endpoint=hub.url, token=ALICE)
        whole = [item.path for item in api.list_repo_tree(REPO, recursive=True)]
        assert len([path for path in whole if path.endswith(".json")]) == 8
        assert {"a", "b"} <= set(whole)
        assert [item.path for item in api.list_repo_tree(REPO, "b")] == [f"b/{number}.json" for number in range(4)]
        assert len(hub.calls("cursor=")) == 4
        assert [info.path for info in api.get_paths_info(REPO, ["a/0.json", "gone"])] == ["a/0.json"]


def test_visibility_can_be_changed_and_hides_from_others(hub: LoopbackHub, api: HfApi) -> None:
    api.update_repo_settings(REPO, private=True)
    assert api.model_info(REPO).private
    assert not HfApi(endpoint=hub.url, token=BOB).repo_exists(REPO)
    assert api.whoami()["name"] == "alice"


def test_a_large_file_goes_up_in_parts_without_xet(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(BIG * 15)  # 7.7 MB: two parts
    with LoopbackHub(tmp_path / "hub", multipart_from=1).run() as hub:
        hub.create(REPO)
        ours = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_write", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", UPLOAD, str(tmp_path / "big")]
        subprocess.run(command, env={**os.environ, **ours}, check=True, capture_output=True)
        assert len(hub.calls("/part/")) == 2
        assert hub.read(REPO, "big.safetensors") == BIG * 15


def test_a_broken_download_is_taken_up_again(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.push(REPO, {"big.safetensors": BIG})
    hub.faults.append(Fault("GET /_lfs/", drop_after=100_000))
    assert download(hub, "big.safetensors", tmp_path) == BIG
    first, second = hub.calls("GET /_lfs/")
    assert (first.sent, second.sent) == (100_000, len(BIG))


def test_a_fault_waits_for_its_turn_and_counts(hub: LoopbackHub, api: HfApi) -> None:
    fault = Fault("/refs", skip=1, status=500, body=b"{}")
    hub.faults.append(fault)
    api.list_repo_refs(REPO)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.list_repo_refs(REPO)
    api.list_repo_refs(REPO)
    assert fault.hits == 1
    assert [call.status for call in hub.calls("/refs")] == [200, 500, 200]
