"""Laws of a build that travels by a DVC remote: a folder, and a server that speaks S3; with a real Hub on loopback."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import LoopbackHub
from tests.support.workspace import ROOT, Workspace, ran

REPO = "alice/pocket"
FROM_HUB = ["base.path=null", f"base.repo_id={REPO}", "base.revision=main"]
LOCKS = ["base.lock.json", "lora.lock.json"]
RESULTS = ["images", "candidates.json", "metrics.json", "cases.json", "blocks.json"]
SMALL = [*LOCKS, "merged.manifest.json", "verify.json", "goldens.json", "export.json"]
SMALL += [f"regression/{name}" for name in RESULTS]
KEYS = {"ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any"}  # the server asks for some
STAY = ["merged", "sources.json"]
BUCKET = """[core]
    remote = bucket
['remote "bucket"']
    url = s3://team/lora-fuse
    endpointurl = {}
"""
READ_GOLDENS = """
import sys
from pathlib import Path
from lora_fuse.errors import LoraFuseError
from lora_fuse.recipe.records import from_json
from lora_fuse.regression.goldens import GoldenRecord, Goldens
from stages.run import command
folder = Path(sys.argv[1])
record = from_json(GoldenRecord, next(folder.glob("*/rabbit.json")).read_text(), "")
try:
    list(Goldens(folder).records(record.provenance.environment.key, "rabbit"))
except LoraFuseError as error:
    sys.exit(command(error.rerun))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Hub that has pocket's base, and what a client needs to find it."""
    hub = LoopbackHub(tmp_path_factory.mktemp("hub"))
    with hub.run():
        folder = ROOT / "pocket/model"
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        hub.push(REPO, files)
        home = tmp_path_factory.mktemp("hf-home")
        yield {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_write"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Workspace:
    """Pocket with its base from the Hub, built, committed, and pushed to a folder."""
    workspace = Workspace.checkout(tmp_path_factory.mktemp("remote"))
    workspace.env |= environment
    workspace.config(*FROM_HUB)
    workspace.run("dvc", "remote", "add", "-q", "-d", "store", str(tmp_path_factory.mktemp("store")))
    workspace.repro("regress", "export")
    workspace.commit("built")
    workspace.run("dvc", "push", "-q")
    return workspace


def content(workspace: Workspace, names: list[str]) -> dict[str, bytes]:
    found = {}
    for name in names:
        path = workspace.root / "artifacts" / name
        for file in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
            found[file.relative_to(workspace.root).as_posix()] = file.read_bytes()
    return found


def check_cache(workspace: Workspace) -> None:
    """Every object of DVC's cache is still what its name says."""
    objects = [path for path in (workspace.root / ".dvc/cache/files/md5").rglob("*") if path.is_file()]
    assert objects
    for path in objects:
        name = path.parent.name + path.name.removesuffix(".dir")
        assert hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == name


def test_another_clone_pulls_the_records_and_rebuilds_the_same_weights(
    built: Workspace, environment: dict[str, str], tmp_path: Path
) -> None:
    other = built.clone(tmp_path / "other")
    other.run("dvc", "pull", "-q", "--allow-missing")
    assert content(other, SMALL) == content(built, SMALL)
    assert not any((other.root / "artifacts" / name).exists() for name in STAY)
    push = "from huggingface_hub import HfApi; HfApi().upload_file(repo_id='alice/pocket', path_in_repo='README.md', "
    other.run(sys.executable, "-c", push + "path_or_fileobj=b'newer')", env=environment)  # main moves
    output = other.repro("fuse")
    assert ran(output) == ["download", "fuse"]  # download has the locks, so it fetches what they name
    assert content(other, LOCKS) == content(built, LOCKS)
    assert other.fused() == built.fused()


def test_what_was_approved_can_be_kept_in_the_remote(built: Workspace, tmp_path: Path) -> None:
    """Goldens that git has grown too small for; another clone has them after a pull, and is told how to restore one."""
    team = built.clone(tmp_path / "team")
    folder = "artifacts/golden/pocket"
    team.run("git", "rm", "-rq", "--cached", folder)
    team.run("dvc", "add", "-q", folder)
    team.commit("goldens in the remote")
    team.run("dvc", "push", "-q")
    other = team.clone(tmp_path / "member")
    assert not (other.root / folder).exists()
    other.run("dvc", "pull", "-q", "--allow-missing")
    assert content(other, ["golden/pocket"]) == content(team, ["golden/pocket"])
    picture = next((other.root / folder).glob("*/rabbit.png"))
    before = picture.read_bytes()
    picture.unlink()
    picture.write_bytes(before[:-1])
    done = other.run(sys.executable, "-c", READ_GOLDENS, folder, code=1)
    command = done.stderr.strip().splitlines()[-1].split()
    assert command[:2] == ["dvc", "checkout"]
    other.run(*command)
    assert picture.read_bytes() == before


@pytest.mark.parametrize("link", ["hardlink", "symlink"])
def test_results_that_are_links_into_the_cache_are_replaced_and_never_written_through(
    built: Workspace, tmp_path: Path, link: str
) -> None:
    linked = built.clone(tmp_path / link)
    linked.dvc_config(f"[cache]\n    type = {link}\n")
    linked.run("dvc", "pull", "-q", "--allow-missing")
    record = linked.root / "artifacts/lora.lock.json"
    assert record.is_symlink() if link == "symlink" else record.stat().st_nlink > 1
    before = record.read_bytes()
    linked.config(*FROM_HUB, "loras.lightning.filename=pocket-lightning-4steps-v1.safetensors")
    assert ran(linked.repro("download")) == ["download"]
    assert record.read_bytes() != before
    assert record.is_symlink() if link == "symlink" else record.stat().st_nlink > 1
    check_cache(linked)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A server that speaks S3, with a bucket of the name "team"; its address."""
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("dvc_s3")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    keys = {f"aws_{name.lower()}": value for name, value in KEYS.items()}
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys)
    client.create_bucket(Bucket="team")
    yield address
    server.stop()


def test_a_remote_that_speaks_s3_has_the_records_and_nothing_large(built: Workspace, s3: str, tmp_path: Path) -> None:
    clones = [built.clone(tmp_path / name) for name in ("one", "two")]
    for one in clones:
        one.env |= {f"AWS_{name}": value for name, value in KEYS.items()}
        one.dvc_config(BUCKET.format(s3))
    sender, receiver = clones
    sender.run("dvc", "pull", "-q", "--allow-missing", "-r", "store")
    sender.run("dvc", "push", "-q")
    receiver.run("dvc", "pull", "-q", "--allow-missing")
    assert content(receiver, SMALL) == content(built, SMALL)
    assert not any((receiver.root / "artifacts" / name).exists() for name in STAY)
