"""What a publication survives: real processes against a Hub on the loopback that fails, lies, stalls or loses answers.

Whatever happens, a run ends in bounded time with one error line or with everything right, `main` never holds half of
it, and the next run finishes and sends only what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lora_fuse.hub import Receipt
from lora_fuse.recipe.recipe import Recipe
from lora_fuse.recipe.records import Manifest, MergedFile, MergedLora, Tool, from_json, to_json
from tests.hub_server import Fault, LoopbackHub, Repo
from tests.hub_server.routes import LFS_SUFFIXES
from tests.support.released import leave_regression

ROOT = Path(__file__).resolve().parents[2]
REPO = "alice/merged"
SHARDS = [f"transformer/model-{number}.safetensors" for number in range(1, 5)]
VOCABULARY = "tokenizer/spiece.model"
SIZE = 200_000  # bytes of a shard
XORBS, PUTS, COMMIT, MERGE, TAG = (
    r"POST /cas/\w+/xorbs/",
    "PUT /_lfs/",
    "POST .*/commit/",
    "POST .*/merge$",
    "POST .*/tag/",
)
PICTURES = 5  # large files by their name: two cases with their inputs, and the plot of the blocks
BOUND = 90.0  # seconds that no run may take
ONE_BY_ONE = """
from lora_fuse.hub import push
push.BATCH = 1
from stages.config import run_stage
from stages.publish import publish
run_stage(publish)
"""


@dataclass
class Place:
    """A project's folder in which everything is built and checked, and the commands that publish from there."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    def fill(self, seed: int = 0) -> None:
        """Lay down a checkpoint with its manifest and the records of its checks."""
        files = {"model_index.json": b'{"_class_name": "P"}\n'}
        files[VOCABULARY] = b"large by its name\0"
        for number, name in enumerate(SHARDS):
            files[name] = np.random.default_rng([seed, number]).bytes(SIZE)
        records = {}
        for name, content in files.items():
            path = self.root / "artifacts/merged" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            records[name] = MergedFile(len(content), hashlib.sha256(content).hexdigest(), "fused")
        lora = MergedLora("lightning", 1.0, "5" * 64)
        text = to_json(Manifest(1, "pocket", None, (lora,), 1.0, 12, records, Tool("1.2.3")))
        (self.root / "artifacts/merged.manifest.json").write_text(text)
        same = {"passed": True, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
        (self.root / "artifacts/verify.json").write_text(json.dumps({**same, "problem_count": 0}))
        if not (self.root / "pocket").exists():
            (self.root / "pocket").symlink_to(ROOT / "pocket")  # its pictures are the cases' inputs
        with contextlib.chdir(self.root):
            leave_regression(Recipe.parse(yaml.safe_load((ROOT / "params.yaml").read_text()), "params.yaml"))

    def configure(self, **publish: object) -> None:
        """Write params.yaml with these settings of `publish`."""
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        unsigned = {"license": "apache-2.0", "signing": {"key": None, "keyless": False}}
        params["publish"] = {"enabled": True, "repo_id": REPO, "private": True, "tag": None, **unsigned, **publish}
        (self.root / "params.yaml").write_text(yaml.safe_dump(params))

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, *(arguments or ("-m", "stages.publish"))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        whole = {**os.environ, **self.env, **env, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=self.root, env=whole, text=True, **pipes)  # type: ignore[call-overload, no-any-return]

    def run(self, *arguments: str, **env: str) -> Done:
        return finish(self.start(*arguments, **env))

    @property
    def manifest(self) -> Manifest:
        return from_json(Manifest, (self.root / "artifacts/merged.manifest.json").read_text(), "manifest")

    @property
    def receipt(self) -> Receipt:
        return from_json(Receipt, (self.root / "artifacts/publish.json").read_text(), "receipt")


@dataclass
class Done:
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line that it was refused with."""
        assert self.code == 2, self.out + self.err
        assert "Traceback" not in self.out + self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.err.splitlines()[-1] == line
        return line


def finish(process: subprocess.Popen[str]) -> Done:
    """Wait for the end; a run that hangs fails here."""
    try:
        out, err = process.communicate(timeout=BOUND)
    finally:
        process.kill()
    return Done(process.returncode, out, err)


@pytest.fixture
def place(tmp_path: Path, hub: LoopbackHub) -> Place:
    made = Place(tmp_path / "project", {"HF_XET_CLIENT_RETRY_BASE_DELAY": "100ms"})
    made.fill()
    made.configure()
    return made


@pytest.fixture(params=["xet", "lfs"])
def upload(request: pytest.FixtureRequest, place: Place) -> str:
    """The requests that carry large files, with Xet and without."""
    if request.param == "lfs":
        place.env["HF_HUB_DISABLE_XET"] = "1"
    return {"xet": XORBS, "lfs": PUTS}[request.param]


def repo(hub: LoopbackHub) -> Repo:
    return hub.registry.repos[REPO]


def is_untouched(hub: LoopbackHub) -> bool:
    """`main` is as it was created."""
    return repo(hub).head.tree.keys() == {".gitattributes"}


def check_published(place: Place, hub: LoopbackHub) -> None:
    """Everything is on main and nothing else, and the receipt says so."""
    manifest, receipt, head = place.manifest, place.receipt, repo(hub).head
    assert head.tree.keys() == {*receipt.files, ".gitattributes"}
    assert {*manifest.files, "README.md", "lora_fuse.json"} < receipt.files.keys()
    for name, file in manifest.files.items():
        assert hashlib.sha256(hub.read(REPO, name)).hexdigest() == file.sha256
        assert receipt.files[name].sha256 == file.sha256
    assert (receipt.status, receipt.commit, receipt.private) == ("published", head.oid, True)
    assert repo(hub).pulls[receipt.pull_request or 0].merge_commit == head.oid


def large(place: Place) -> int:
    """Bytes of what goes to LFS or Xet, of the last publication."""
    return sum(file.size for name, file in place.receipt.files.items() if name.endswith(LFS_SUFFIXES))


def check_next_run(place: Place, hub: LoopbackHub, *, sends: int | None = 0) -> None:
    """The faults are over: the next run finishes, and the one after it sends nothing."""
    hub.faults.clear()
    before = hub.uploaded()
    done = place.run()
    assert done.code == 0, done.err
    check_published(place, hub)
    if sends is not None:
        overhead = 2000 if sends else 0  # of xorbs; the content is random and cannot be compressed
        assert sends <= hub.uploaded() - before <= sends + overhead


def killed_when(place: Place, hub: LoopbackHub, pattern: str, done: int, *arguments: str) -> None:
    """Start a run and kill it, with SIGKILL, when so many requests have been answered and one more is under way.

    Its helper must not outlive it.
    """

    def is_time() -> bool:
        asked = [call for call in hub.log if re.search(pattern, call.line)]
        return len(asked) > done and len([call for call in asked if call.status == 200]) == done

    process = place.start(*arguments)
    wait_until(is_time)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)  # a helper that lives on holds the pipes
    assert process.returncode == -signal.SIGKILL
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 5.0)


def wait_until(true: Callable[[], object], seconds: float = BOUND) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


# ---------------------------------------------------------------- the wire


@pytest.mark.parametrize(
    "fault",
    [
        {"drop_request_after": 60_000},
        {"times": 2, "status": 500},
        {"status": 429, "headers": {"Retry-After": "1"}},
    ],
    ids=["dropped", "500-twice", "429"],
)
def test_an_upload_that_fails_for_a_while_succeeds(
    place: Place, hub: LoopbackHub, upload: str, fault: dict[str, Any]
) -> None:
    hub.faults.append(Fault(upload, **fault))
    done = place.run()
    assert done.code == 0, done.err
    assert hub.faults[0].hits == fault.get("times", 1)
    check_published(place, hub)


def test_uploads_that_fail_for_ever_end_with_one_line(tmp_path: Path, place: Place, hub: LoopbackHub) -> None:
    """Side by side, since the client tries for half a minute by itself."""
    kinds: dict[str, dict[str, Any]] = {"dropped": {"drop_request_after": 60_000}, "500": {"status": 500}}
    running: list[tuple[LoopbackHub, Place, subprocess.Popen[str]]] = []
    hubs: list[Any] = []
    try:
        for kind, fault in kinds.items():
            for xet in ("", "1"):
                server = LoopbackHub(tmp_path / f"hub-{kind}-{xet}").run()
                one = server.__enter__()
                hubs.append(server)
                one.faults.append(Fault(f"{PUTS}|{XORBS}", times=-1, **fault))
                env = {"HF_ENDPOINT": one.url, "HF_HUB_DISABLE_XET": xet, "HF_HOME": str(tmp_path / f"hf-{kind}-{xet}")}
                there = Place(tmp_path / f"project-{kind}-{xet}", {**place.env, **env})
                there.fill()
                there.configure()
                running.append((one, there, there.start()))
        for one, there, process in running:
            done = finish(process)
            assert REPO in done.refusal
            assert "once more without Xet" in done.err or there.env["HF_HUB_DISABLE_XET"]
            assert is_untouched(one)
            assert not (there.root / "artifacts/publish.json").exists()
            one.faults.clear()
            assert there.run().code == 0
            check_published(there, one)
    finally:
        for server in hubs:
            server.__exit__(None, None, None)


def test_an_upload_without_an_end_is_ended(place: Place, hub: LoopbackHub, upload: str) -> None:
    hub.faults.append(Fault(f"{PUTS}|{XORBS}", times=-1, delay=600, status=503))
    begun = time.monotonic()
    done = place.run(LORA_FUSE_STALL_S="3")
    assert "no byte moved for 3 s" in done.refusal
    assert time.monotonic() - begun < 40
    assert is_untouched(hub)
    check_next_run(place, hub, sends=None)


def test_xet_that_stalls_is_left_for_lfs(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault(XORBS, times=-1, delay=600, status=503))
    done = place.run(LORA_FUSE_STALL_S="3")
    assert done.code == 0, done.err
    assert "no byte moved for 3 s; check the connection and publish again; once more without Xet" in done.err
    check_published(place, hub)


@pytest.mark.parametrize("line", ["POST /api/repos/create", MERGE])
def test_a_hub_that_does_not_answer_is_left(place: Place, hub: LoopbackHub, line: str) -> None:
    hub.faults.append(Fault(line, times=-1, delay=600, status=503))
    begun = time.monotonic()
    assert REPO in place.run(LORA_FUSE_STALL_S="2").refusal
    assert time.monotonic() - begun < 30


# ---------------------------------------------------------------- who may do what


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
    wait_until(lambda: hub.calls("refs%2Fpr%2F1"))
    repo(hub).private = False
    assert f"{REPO} is public" in finish(process).refusal
    assert is_untouched(hub)


# ---------------------------------------------------------------- answers that are lost, and refusals


@pytest.mark.parametrize(("line", "status"), [(COMMIT, None), (COMMIT, 504), (MERGE, 504), (TAG, None)])
def test_an_answer_that_is_lost_changes_nothing(place: Place, hub: LoopbackHub, line: str, status: int | None) -> None:
    place.configure(tag="v1")
    hub.faults.append(Fault(line, after=True, status=status))
    done = place.run()
    assert done.code == 0, done.err
    assert hub.faults[0].hits == 1
    check_published(place, hub)
    assert len(repo(hub).pulls) == 1
    assert repo(hub).tags == {"v1": repo(hub).head.oid}


def test_a_commit_is_tried_again_when_the_hub_is_busy(place: Place, hub: LoopbackHub, upload: str) -> None:
    hub.faults += [Fault(COMMIT, status=503), Fault(COMMIT, status=429, headers={"Retry-After": "2"})]
    begun = time.monotonic()
    done = place.run()
    assert done.code == 0, done.err
    assert "once more in 2 s" in done.err
    assert time.monotonic() - begun > 3
    check_published(place, hub)
    assert hub.uploaded() < large(place) + 2000  # nothing twice


@pytest.mark.parametrize(("status", "said"), [(412, "somebody else was faster"), (503, "answered 503")])
def test_a_commit_that_is_refused_is_one_line(
    place: Place, hub: LoopbackHub, upload: str, status: int, said: str
) -> None:
    hub.faults.append(Fault(COMMIT, status=status, times=-1, body=b"{}"))
    assert said in place.run().refusal
    assert (is_untouched(hub), repo(hub).pulls) == (True, {})
    check_next_run(place, hub)


@pytest.mark.parametrize("status", [403, 409])
def test_a_merge_that_is_refused_leaves_a_whole_pull_request(place: Place, hub: LoopbackHub, status: int) -> None:
    hub.faults.append(Fault(MERGE, status=status, times=-1, body=b"{}"))
    line = place.run().refusal
    assert f"answered {status}" in line
    assert f"{hub.url}/{REPO}/discussions/1" in line
    assert is_untouched(hub)
    assert {*place.manifest.files, "README.md"} <= repo(hub).at("refs/pr/1").tree.keys()
    check_next_run(place, hub)
    assert len(repo(hub).pulls) == 1


def test_what_arrives_as_something_else_is_not_merged(place: Place, hub: LoopbackHub) -> None:
    name = SHARDS[1]
    hub.tamper(name, b"something else")
    assert f": {name} " in place.run().refusal
    assert is_untouched(hub)
    hub._api.tampered.clear()
    check_next_run(place, hub)
    assert len(repo(hub).pulls) == 1


@pytest.mark.parametrize("is_the_same", [True, False])
def test_a_tag_that_exists_counts_only_on_the_same_commit(place: Place, hub: LoopbackHub, is_the_same: bool) -> None:
    assert place.run().code == 0
    repo(hub).tags["v1"] = repo(hub).head.oid if is_the_same else next(iter(repo(hub).commits))
    place.configure(tag="v1")
    commits = dict(repo(hub).commits)
    done = place.run()
    if is_the_same:
        assert (done.code, place.receipt.tag) == (0, "v1")
    else:
        assert f"the tag v1 on commit {repo(hub).tags['v1']}" in done.refusal
        assert repo(hub).head.oid in done.refusal
    assert repo(hub).commits == commits


def test_a_tag_on_other_bytes_is_refused_before_anything_is_sent(place: Place, hub: LoopbackHub) -> None:
    place.configure(tag="v1")
    assert place.run().code == 0
    place.fill(seed=1)
    sent, tagged = hub.uploaded(), dict(repo(hub).tags)
    assert "set publish.tag to a new name" in place.run().refusal
    assert (hub.uploaded(), len(repo(hub).pulls), repo(hub).tags) == (sent, 1, tagged)


def test_what_is_tagged_stays_published_when_main_moves_on(place: Place, hub: LoopbackHub) -> None:
    place.configure(tag="v1")
    assert place.run().code == 0
    before = place.receipt
    hub.push(REPO, {"LICENSE": b"theirs"})
    assert place.run().code == 0
    assert place.receipt == before


def test_two_variants_of_one_repository_are_each_had_by_their_tag(place: Place, hub: LoopbackHub) -> None:
    place.configure(tag="soft")
    assert place.run().code == 0
    soft = place.receipt
    place.fill(seed=1)
    place.configure(tag="strong")
    assert place.run().code == 0
    assert repo(hub).tags == {"soft": soft.commit, "strong": repo(hub).head.oid}
    place.fill()
    place.configure(tag="soft")
    sent, commits = hub.uploaded(), dict(repo(hub).commits)
    assert place.run().code == 0
    assert (place.receipt, hub.uploaded(), repo(hub).commits) == (soft, sent, commits)


# ---------------------------------------------------------------- kill -9


def test_a_kill_during_the_upload_sends_only_the_rest(place: Place, hub: LoopbackHub, upload: str) -> None:
    """A commit a file: pictures, vocabulary and two shards are there, the third is under way."""
    done = PICTURES + 3
    hub.faults.append(Fault(upload, skip=done, times=-1, delay=600, status=503))
    killed_when(place, hub, upload, done, "-c", ONE_BY_ONE)
    assert is_untouched(hub)
    check_next_run(place, hub, sends=2 * SIZE)
    assert len(repo(hub).pulls) == 1


def test_a_kill_within_a_commit_sends_only_the_rest(place: Place, hub: LoopbackHub) -> None:
    """Without Xet every file that arrived counts, though no commit names it yet."""
    place.env["HF_HUB_DISABLE_XET"] = "1"
    hub.faults.append(Fault(PUTS, skip=2, times=-1, delay=600, status=503))
    killed_when(place, hub, PUTS, 2)
    check_next_run(place, hub, sends=None)
    assert hub.uploaded() <= large(place) + 2000  # nothing twice


@pytest.mark.parametrize("line", [MERGE, TAG], ids=["before-merge", "before-tag"])
def test_a_kill_after_the_upload_sends_nothing_again(place: Place, hub: LoopbackHub, upload: str, line: str) -> None:
    place.configure(tag="v1")
    hub.faults.append(Fault(line, times=-1, delay=600, status=503))
    killed_when(place, hub, line, 0)
    assert is_untouched(hub) == (line == MERGE)
    assert not (place.root / "artifacts/publish.json").exists()
    check_next_run(place, hub)
    assert len(repo(hub).pulls) == 1
    assert repo(hub).tags == {"v1": repo(hub).head.oid}


def test_a_full_disk_for_the_receipt_is_one_line(place: Place, hub: LoopbackHub) -> None:
    partial = place.root / "artifacts/.publish.json.partial"
    partial.symlink_to("/dev/full")
    line = place.run().refusal
    assert "artifacts/publish.json cannot be written (No space left on device), published:" in line
    partial.unlink()
    check_next_run(place, hub)


# ---------------------------------------------------------------- others at the same time


def test_a_second_run_of_the_same_folder_says_so(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault(COMMIT, delay=4.0))
    first = place.start()
    wait_until(lambda: hub.calls("/commit/"))
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


# ---------------------------------------------------------------- what may be sent, and what is kept secret


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        (".env", lambda path: path.write_text("HF_TOKEN=1"), ".env is in artifacts/merged and not in the manifest"),
        ("unet/weights.bin", lambda path: path.write_bytes(b"p"), "unet/weights.bin is in artifacts/merged and not"),
        ("key.pem", lambda path: path.symlink_to("/etc/hostname"), "key.pem in artifacts/merged is a symlink"),
        ("more", lambda path: path.symlink_to("transformer"), "more in artifacts/merged is a symlink"),
    ],
    ids=["file", "pickle", "link", "linked-folder"],
)
def test_what_the_manifest_does_not_name_is_refused_by_name(
    place: Place, hub: LoopbackHub, name: str, make: Callable[[Path], object], said: str
) -> None:
    path = place.root / "artifacts/merged" / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    assert said in place.run().refusal
    assert not hub.log


def test_a_file_that_changes_under_way_is_not_published(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault("/preupload/", delay=1.0))
    process = place.start()
    wait_until(lambda: hub.calls("/preupload/"))
    (place.root / "artifacts/merged" / SHARDS[0]).write_bytes(bytes(SIZE))
    assert SHARDS[0] in finish(process).refusal
    assert is_untouched(hub)


@pytest.mark.parametrize("fault", [None, "echo"])
def test_the_token_is_nowhere(place: Place, hub: LoopbackHub, tmp_path: Path, upload: str, fault: str | None) -> None:
    canary = "hf_canaryCanaryCanary"
    hub.registry.tokens[canary] = hub.registry.tokens["hf_write"]
    place.configure(tag="v1")
    if fault:  # a Hub that repeats the token in what it says, once, and then for ever
        header = {"X-Error-Message": f"bad token {canary}"}
        hub.faults += [Fault(COMMIT, status=503, headers=header), Fault(MERGE, times=-1, status=403, headers=header)]
    done = place.run(HF_TOKEN=canary)
    assert done.code == (2 if fault else 0), done.err
    assert "(token)" in done.err or not fault
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(written) > 10
    texts = [done.out.encode(), done.err.encode(), *(path.read_bytes() for path in written)]
    for commit in repo(hub).commits.values():
        texts += [commit.title.encode(), commit.message.encode(), *(entry.content for entry in commit.tree.values())]
    texts += [str(pull).encode() for pull in repo(hub).pulls.values()] + [str(hub.log).encode()]
    assert not [text for text in texts if canary.encode() in text]


# ---------------------------------------------------------------- the dry run


def rows(done: Done) -> dict[str, tuple[str, int, str]]:
    found = re.findall(r"^(\w+) +(\d+) ([0-9a-f]{64}) (.+)$", done.out, re.MULTILINE)
    return {name: (state, int(size), sha256) for state, size, sha256, name in found}


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(place: Place, hub: LoopbackHub) -> None:
    assert place.run().code == 0
    place.fill(seed=0)
    path = place.root / "artifacts/merged" / SHARDS[0]
    hub.push(REPO, {SHARDS[0]: b"other", SHARDS[1]: None})
    before = len(hub.log)
    done = place.run("-m", "stages.publish", "--dry-run")
    assert done.code == 0, done.err
    found = rows(done)
    assert {name: row[0] for name, row in found.items()} == {
        **dict.fromkeys(place.receipt.files, "same"),
        SHARDS[0]: "changed",
        SHARDS[1]: "new",
    }
    assert found[SHARDS[0]][1:] == (SIZE, hashlib.sha256(path.read_bytes()).hexdigest())
    assert f"2 of {len(found)} files, 400kB, would be sent" in done.out
    assert done.out.endswith(hub.read(REPO, "README.md").decode() + "\n")
    assert all(call.line.startswith("GET ") for call in hub.log[before:])


def test_a_dry_run_needs_no_token_and_no_repository(place: Place, hub: LoopbackHub) -> None:
    done = place.run("-m", "stages.publish", "--dry-run", HF_TOKEN="")
    assert done.code == 0, done.err
    assert {row[0] for row in rows(done).values()} == {"unknown"}
    assert "which cannot be read" in done.out
    assert not hub.registry.repos


def test_a_dry_run_takes_overrides_as_every_stage(place: Place, hub: LoopbackHub) -> None:
    (place.root / "conf").symlink_to(ROOT / "conf")
    done = place.run("-m", "stages.publish", "--dry-run", "publish.repo_id=carol/other", "publish.tag=v7")
    assert done.code == 0, done.err
    assert "carol/other" in done.out
    assert "; tag v7" in done.out


def test_a_dry_run_refuses_what_would_be_refused(place: Place, hub: LoopbackHub) -> None:
    (place.root / "artifacts/merged/.env").write_text("x")
    assert ".env" in place.run("-m", "stages.publish", "--dry-run").refusal
