"""Laws of a fleet with GPUs: two jobs at once have a GPU each, and points on two give the records of one process."""

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lora_fuse.fleet import Job, Needs, Package, connected
from tests.support.clusters import STORE, code, wait_on_gpu
from tests.support.machine import ROOT, python_path

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs here"),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[fleet]'"),
]

SWEEP = ("recipe=pocket_cuda", "fuse.scale=0.8,1.0", "base.sampling.steps=6")


def test_two_jobs_at_once_have_a_gpu_each_and_points_the_records_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    (tmp_path / "marks").mkdir()
    for name in ("conf", "pocket"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/golden").symlink_to(ROOT / "artifacts/golden")
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("PYTHONPATH", python_path())
    with tempfile.TemporaryDirectory(prefix="lf") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("LORA_FUSE_WORK", f"{folder}/work")
        node = {"node_ip_address": "127.0.0.1", "object_store_memory": STORE, "include_dashboard": False}
        node |= {"num_cpus": 4, "num_gpus": 2, "resources": {"disk": 5.0}}
        made = Cluster(initialize_head=True, head_node_args=node)
        try:
            with connected(made.address, Package.of(code(), [])) as fleet:
                argument = {"marks": str(tmp_path / "marks"), "together": 2}
                jobs = [Job(name, {"name": name, **argument}, Needs(1, 1, 10**8, 10**6)) for name in ("1", "2")]
                assert len({done.result for done in fleet.run(wait_on_gpu, jobs)}) == 2
            spread = swept(tmp_path, "--ray", made.address)
        finally:
            made.shutdown()  # type: ignore[no-untyped-call]
    assert len(spread) == 2
    assert swept(tmp_path) == spread


def swept(root: Path, *more: str) -> dict[str, object]:
    """The records of a sweep's points and, but for its hash, which has times in it, of their pictures."""
    subprocess.run([sys.executable, "-m", "stages.sweep", *SWEEP, *more], cwd=root, check=True)
    found = {}
    for path in root.glob("artifacts/sweep/points/*/point.json"):
        record = json.loads(path.read_text())
        record["files"].pop("metrics.json")
        found[path.parent.name] = record
        path.unlink()
    return found
