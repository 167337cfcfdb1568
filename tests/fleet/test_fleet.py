"""Jobs on a real Ray cluster on loopback, a head and two nodes, one of which is killed; sweeps and validations."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import psutil
import pytest

from lora_fuse.errors import BadConfig, BadLora, BadSource, NoDevice, NoSpace
from lora_fuse.fleet import Done, Fleet, Job, Needs, Package, archive, connected, node
from lora_fuse.fleet import cluster as cluster_of_ray
from lora_fuse.fleet.needs import refuse_unmet
from lora_fuse.fusion import read_manifest
from lora_fuse.machine import Console
from lora_fuse.recipe import Artifacts
from lora_fuse.recipe.hf_cache import repository_folder
from lora_fuse.studies.catalog import gather
from lora_fuse.studies.catalog.gather import ELSEWHERE
from stages.config.variants import read_compiled
from stages.variants import BuiltVariant, VariantWork, build_variant, take
from tests.support.clusters import BASE, cluster, code, report
from tests.support.machine import ROOT, python_path, start, until

# Not imported to see: every worker collects this module, and one runs it.
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[fleet]'")

SMALL = Needs(cpus=2, gpus=0, memory=10**8, disk=10**6)  # one job a node
QUICK = ("~regress.cases.hat", "base.sampling.steps=6", "loras.lightning.path=loras")
LORA = "pocket-lightning-4steps-v2.safetensors"


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[str, dict[str, Any], Path]]:
    """The address of a cluster, its nodes by name, and the folder that they are in; its path is short, for sockets."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="lf") as folder:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", python_path())
        patch.setenv("RAY_TMPDIR", folder)
        with cluster(Path(folder)) as (made, named):
            yield made.address, named, Path(folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's folder, in which sweeps are started."""
    root = tmp_path_factory.mktemp("project")
    for name in ("conf", "pocket", "params.yaml"):
        (root / name).symlink_to(ROOT / name)
    (root / "artifacts").mkdir()
    (root / "artifacts/golden").symlink_to(ROOT / "artifacts/golden")
    (root / "loras").mkdir()
    shutil.copy2(ROOT / "pocket/lora" / LORA, root / "loras")
    (root / "loras/none.safetensors").write_bytes(b"no LoRA")
    return root


def jobs(marks: Path, *names: str, base: str | None = None, needs: Needs = SMALL, **more: object) -> list[Job]:
    return [Job(name, {"name": name, "marks": str(marks), **more}, needs, base) for name in names]


def done_by(fleet: Fleet, asked: list[Job]) -> dict[str, Done]:
    return {done.job.label: done for done in fleet.run(report, asked)}


def test_jobs_go_where_their_base_is_a_refusal_is_a_result_and_folders_are_removed(
    nodes: tuple[str, dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, _, folder = nodes
    monkeypatch.chdir(ROOT)
    token = "_".join(("hf", "of", "the", "head"))  # this module travels
    monkeypatch.setenv("HF_TOKEN", token)
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(folder / "b/hf/hub"))
        snapshot = repository_folder(BASE) / "snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").touch()
    before = signal.getsignal(signal.SIGTERM)
    with connected(address, Package.of(code(), [Path("pocket/lora"), Path("absent")])) as fleet:
        assert signal.getsignal(signal.SIGTERM) is before
        near = done_by(fleet, jobs(tmp_path, "near", base=BASE, reads="pocket/lora"))["near"]
        assert (near.result["node"], near.result["inputs"]) == ("b", True)
        assert near.result["folder"].startswith(str(folder / "b/work/job-"))
        assert not list(folder.glob("*/work/*job*"))
        refused = done_by(fleet, [*jobs(tmp_path, "bad", refuses=True), *jobs(tmp_path, "full", full=True)])
        assert isinstance(refused["bad"].error, BadLora)
        assert isinstance(refused["full"].error, NoSpace)
        assert len(list(tmp_path.glob("bad-*"))) == 1  # it was not tried again
        with pytest.raises(NoDevice, match=r"has 1 GPU for one job; the 3 nodes have 0 GPU; 0 GPU"):
            done_by(fleet, jobs(tmp_path, "g", needs=replace(SMALL, gpus=1)))
        with pytest.raises(NoDevice, match=r"50 GB of disk for one job.*5 GB of disk.*ray start --address"):
            done_by(fleet, jobs(tmp_path, "d", needs=replace(SMALL, disk=5 * 10**10)))
        other = replace(fleet, software=replace(fleet.software, libraries=(("torch", "1.0"),)))
        with pytest.raises(BadConfig, match=r"torch 1\.0 here, \d\S* there"):
            done_by(other, jobs(tmp_path, "v"))
        absent = replace(fleet, package=replace(fleet.package, absolute=("/nowhere/base",)))
        with pytest.raises(BadSource, match=r"/nowhere/base is not on the node"):
            done_by(absent, jobs(tmp_path, "p"))
    kept = [path for path in (folder / "ray").rglob("*") if path.is_file()]  # logs, and what travelled
    assert len(kept) > 100
    assert not [path for path in kept if token.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def swept(nodes: tuple[str, dict[str, Any], Path], project: Path) -> dict[str, Any]:
    """A point that is built and one that is refused, over the nodes."""
    return sweep(project, f"loras.lightning.filename={LORA},none.safetensors", "--ray", nodes[0], code=1)


def sweep(project: Path, *arguments: str, code: int) -> dict[str, Any]:
    process = start(sys.executable, "-m", "stages.sweep", *arguments, *QUICK, "--json", cwd=project)
    out, said = process.communicate(timeout=300)
    assert process.returncode == code, said
    assert "Traceback" not in said
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    return facts


def points(project: Path) -> dict[str, dict[str, Any]]:
    """Every record of a point, and its numbers but for times, by the folder's name."""
    found = {}
    for path in project.glob("artifacts/sweep/points/*/point.json"):
        record = json.loads(path.read_text())
        record["files"].pop("metrics.json", None)
        metrics = path.with_name("metrics.json")
        numbers = json.loads(metrics.read_text()) if metrics.exists() else {}
        timed = [name for name in numbers if "seconds" in name or "memory" in name]
        found[path.parent.name] = {"record": record, "numbers": {k: v for k, v in numbers.items() if k not in timed}}
    return found


def test_a_sweep_over_nodes_gives_the_records_of_one_that_is_not_spread(
    nodes: tuple[str, dict[str, Any], Path], project: Path, swept: dict[str, Any]
) -> None:
    assert (swept["points"], swept["built"]) == (2, 1)
    assert list(swept["wrong"]) == ["loras.lightning.filename=none.safetensors"]
    spread = points(project)
    assert sorted(bool(one["record"]["refused"]) for one in spread.values()) == [False, True]
    assert (project / "artifacts/sweep/sweep.html").is_file()
    assert not list(project.rglob("merged"))
    shutil.rmtree(project / "artifacts/sweep/points")
    sweep(project, f"loras.lightning.filename={LORA},none.safetensors", code=1)
    assert points(project) == spread


def test_an_interrupted_sweep_leaves_no_job(
    nodes: tuple[str, dict[str, Any], Path], project: Path, swept: dict[str, Any]
) -> None:
    address, _, folder = nodes
    process = start(sys.executable, "-m", "stages.sweep", "fuse.scale=0.7,0.9", *QUICK, "--ray", address, cwd=project)
    until(lambda: list(folder.glob("*/work/job-*/artifacts/sweep")), process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "go on with the rest: python -m stages.sweep fuse.scale=0.7,0.9" in said
    assert "Traceback" not in said
    assert not list(folder.glob("*/work/*job*"))
    until(lambda: not working())


def working() -> list[str]:
    """The names of Ray's processes that run a job, as Ray gives them."""
    names = [" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"])]
    return [name for name in names if name.startswith("ray::") and ("do_job" in name or "fuse.scale" in name)]


def test_jobs_of_a_node_that_is_killed_run_again_elsewhere(
    nodes: tuple[str, dict[str, Any], Path], tmp_path: Path
) -> None:
    """The last test of this module that has the nodes: one of them is gone then."""
    address, named, _ = nodes
    lost: list[Path] = []

    def kill() -> None:
        """End a node as soon as each has a job, and let the jobs end then."""
        try:
            until(lambda: len(list(tmp_path.glob("?-*"))) == 2)
            lost.extend(path for path in tmp_path.glob("?-*") if path.read_text() == "b")
            raylet = psutil.Process(named["b"].all_processes["raylet"][0].process.pid)
            gone = [raylet, *raylet.children(recursive=True)]
            for process in gone:  # as with the machine, at once
                process.kill()
            until(lambda: not any(process.is_running() and process.status() != "zombie" for process in gone))
        finally:
            (tmp_path / "go").touch()

    with connected(address, Package.of(code(), [])) as fleet, ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill)
        found = done_by(fleet, jobs(tmp_path, "1", "2", "3", waits="go"))
        killing.result()
    assert {name: done.error for name, done in found.items()} == dict.fromkeys("123")
    assert {done.result["node"] for done in found.values()} == {"a"}
    assert len(list(tmp_path.glob(f"{lost[0].name[0]}-*"))) == 2


def test_a_variant_from_a_node_has_its_records_here_and_keeps_weights_and_receipt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job as a node does it, in this process."""
    monkeypatch.setenv("LORA_FUSE_WORK", str(tmp_path / "work"))
    for name in ("conf", "inputs", "pocket", "variants"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "artifacts/golden/pocket_soft", tmp_path / "artifacts/golden/pocket_soft")
    monkeypatch.chdir(tmp_path)
    recipe = read_compiled().params("pocket_soft")
    work = VariantWork("pocket_soft", recipe, recipe)
    _, built = node.do_job(build_variant, work, node.Software.here())
    assert isinstance(built, BuiltVariant), built
    at = Artifacts.of_variant("pocket_soft", recipe)
    at.merged.mkdir(parents=True)
    at.receipt.touch()
    assert take(work, built, Console()) == built.code
    assert built.reason in capsys.readouterr().err
    assert not at.merged.exists()  # of nobody knows what
    at.merged.mkdir()
    take(work, built, Console(quiet=True))
    assert at.merged.is_dir()  # it is what was built
    assert at.receipt.exists()
    assert not at.sources.exists()
    base, _ = at.read_locks()
    assert read_manifest(at.manifest)[0].base == base
    assert take(work, BadLora("it is none"), Console()) == 2
    at.merged.rmdir()
    at.receipt.unlink()
    entry = gather(recipe, at, of="pocket", build="build", publish=None)
    assert (entry.state, entry.notes) == ("incomplete", (ELSEWHERE,))
    assert entry.verdict


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nonsense", "--ray takes HOST:PORT"),
        ("127.0.0.1:99999", "--ray takes HOST:PORT"),
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1 .Connection refused"),
    ],
)
def test_an_address_without_a_cluster_is_refused(address: str, said: str) -> None:
    with pytest.raises(BadConfig, match=said), connected(address, Package({})):
        pass


def test_what_accepts_a_connection_and_is_no_head_is_refused_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_of_ray, "ANSWERED", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = "{}:{}".format(*mute.getsockname())
        said = f"at {address} .* no head answers within 2 s"
        with pytest.raises(BadConfig, match=said), connected(address, Package({})):
            pass


def test_what_fits_no_node_is_refused_with_both_amounts() -> None:
    with pytest.raises(NoDevice, match="has 2 GPU for one job; the 1 nodes have 1 GPU"):
        refuse_unmet([Needs(1, 2, 0, 0)], [{"CPU": 4, "GPU": 1, "memory": 10**11, "disk": 9}])
    refuse_unmet([Needs(1, 1, 0, 0)], [{"CPU": 4, "GPU": 1, "memory": 10**11, "disk": 9}])


def test_a_package_has_what_is_named_and_nothing_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("HF_TOKEN=secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/picture.png").write_bytes(b"1")
    package = Package.of([], [Path("in"), Path("/data/base"), Path("../other"), Path()])
    assert (list(package.files), package.absolute) == (["in/picture.png"], ("../other", "/data/base"))
    with (tmp_path / "in/base.safetensors").open("wb") as large:
        large.truncate(10**9)
    with pytest.raises(BadSource, match=r"the largest is in/base\.safetensors with 1.00GB"):
        Package.of([], [Path("in")])
    (tmp_path / "in/base.safetensors").unlink()
    (tmp_path / "in/notes.txt").symlink_to(tmp_path / ".env")
    with pytest.raises(BadSource, match=r"a link leads to .*\.env, out of in"):
        Package.of([], [Path("in")])


def test_a_result_comes_back_whole_and_without_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    for name in ("a/b.txt", "merged/w", ".lock"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    content = archive.pack(made, lambda name: not name.startswith("merged/"))
    (tmp_path / "out").mkdir()
    for name in ("old", "receipt"):
        (tmp_path / "out" / name).touch()
    archive.unpack(content, tmp_path / "out", stays=["receipt"])
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["a", "b.txt", "receipt"]
    assert (archive.read(content, "a/b.txt"), archive.read(content, "c")) == (b"a/b.txt", None)
    large = BytesIO()
    with ZipFile(large, "w", ZIP_DEFLATED) as packed, packed.open(ZipInfo("zeros"), "w") as file:
        file.write(bytes(1 << 20))
    monkeypatch.setattr(archive, "LARGEST", 1 << 16)
    nameless = content.replace(b"a/b.txt", b"\0/b.txt")  # a name ends at its first NUL
    for bad, words in (
        (content[:-9], "is not whole"),
        (nameless, "is not whole"),
        (large.getvalue(), "has 1048576 bytes, and at most 65536"),
    ):
        with pytest.raises(BadSource, match=words):
            archive.unpack(bad, tmp_path / "out")
    assert (tmp_path / "out/receipt").exists()


def test_without_ray_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError(name='ray')\n")
    words = "from lora_fuse.fleet import connected, Package\nwith connected('auto', Package({})): pass"
    hidden = f"import sys; sys.modules['ray'] = None\n{words}"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "pip install 'lora-fuse[fleet]'" in done.stderr


def test_what_killed_jobs_left_is_removed_and_what_works_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_FUSE_WORK", str(tmp_path / "work"))
    (tmp_path / "work/job-killed").mkdir(parents=True)
    (tmp_path / "package").mkdir()
    monkeypatch.chdir(tmp_path)
    with node.job_folder(tmp_path / "package") as first:
        assert not (tmp_path / "work/job-killed").exists()
        with node.job_folder(tmp_path / "package") as second:
            assert first.is_dir()
            assert Path.cwd() == second
    assert Path.cwd() == tmp_path
    assert not list((tmp_path / "work").glob("*job*"))
