"""Laws of `python -m stages.sweep`, run as a user runs it: real processes, also killed ones, and a real DVC queue."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_fuse.machine import space
from lora_fuse.pictures.metrics import METRICS
from lora_fuse.recipe.hf_cache import cache_dir
from lora_fuse.recipe.paths import Artifacts
from stages.sweep import expand, sweep
from tests.hub_server import LoopbackHub
from tests.support.machine import ROOT, start, until
from tests.support.repositories import PIPELINE
from tests.support.workspace import METRICS as RUN_METRICS
from tests.support.workspace import Workspace

LONGEST = 300.0  # seconds that anything is waited for
QUICK = ("~regress.cases.hat", "base.sampling.steps=6", "loras.lightning.path=loras")
LORA = "pocket-lightning-4steps-v2.safetensors"
SWEPT = "artifacts/sweep"


class Project:
    """A folder with the project's configuration and model, in which sweeps are started."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("conf", "pocket", "params.yaml"):
            (root / name).symlink_to(ROOT / name)
        (root / "artifacts").mkdir()
        (root / "artifacts/golden").symlink_to(ROOT / "artifacts/golden")
        shutil.copytree(ROOT / "pocket/lora", root / "loras")
        save_file(
            {
                "transformer_blocks.0.attn.to_q.lora_A.weight": np.ones((2, 8), np.float32),
                "transformer_blocks.0.attn.to_q.lora_B.weight": np.ones((8, 2), np.float32),
            },
            root / "loras/other-model.safetensors",
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return start(sys.executable, "-m", "stages.sweep", *arguments, *QUICK, "--json", cwd=self.root)

    def sweep(self, *arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
        """The facts of the last line, and all that was said."""
        return ended(self.start(*arguments), code)

    def points(self) -> dict[str, dict[str, Any]]:
        """The content of every `point.json`, by the folder's name."""
        return {
            path.parent.name: json.loads(path.read_text()) for path in self.root.glob(f"{SWEPT}/points/*/point.json")
        }

    def checkpoints(self) -> list[Path]:
        return list(self.root.glob(f"{SWEPT}/points/*/*merged*/"))

    def page(self) -> str:
        return (self.root / SWEPT / "sweep.html").read_text()


def ended(process: subprocess.Popen[str], code: int) -> tuple[dict[str, Any], str]:
    out, said = process.communicate(timeout=LONGEST)
    assert process.returncode == code, said
    return json.loads(out.splitlines()[-1]) if out else {}, said


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def swept(project: Project) -> tuple[dict[str, Any], str]:
    """Two scales, one of them given twice."""
    return project.sweep("fuse.scale=0.8,1,1.0")


def test_every_point_is_built_once_looked_at_and_thrown_away(
    project: Project, swept: tuple[dict[str, Any], str]
) -> None:
    facts, said = swept
    assert (facts["points"], facts["built"], facts["wrong"]) == (2, 2, {})
    assert "2 points (1 more are the same again), 0 done already, 2 to build" in said
    assert len(project.points()) == 2
    assert project.checkpoints() == []
    assert len(list(project.root.glob(f"{SWEPT}/baseline/*/rabbit.png"))) == 1
    for folder in (project.root / SWEPT / "points").glob("*/"):
        metrics = json.loads((folder / "metrics.json").read_text())
        assert (metrics["weights_passed"], metrics["rabbit.agrees"]) == (True, True)
        for side in ("golden", "unfused", "floor", "baseline"):
            assert {f"rabbit.{side}.{name}" for name in METRICS} <= metrics.keys()
        assert (folder / "images/rabbit.merged.png").is_file()


def test_the_point_of_the_recipe_is_the_golden_where_there_is_one(
    project: Project, swept: tuple[dict[str, Any], str]
) -> None:
    """What is shared between points changes no pixel."""
    found = [json.loads(path.read_text()) for path in project.root.glob(f"{SWEPT}/points/*/metrics.json")]
    recipe, other = sorted(found, key=lambda metrics: metrics["scale"] != 1.0)
    assert other["rabbit.golden.identical"] is False
    assert recipe["rabbit.golden.identical"] is (ROOT / f"artifacts/golden/pocket/{recipe['environment']}").is_dir()


def test_the_sheet_names_the_recommended_scale_with_its_reason(
    project: Project, swept: tuple[dict[str, Any], str]
) -> None:
    facts, _ = swept
    content = json.loads((project.root / SWEPT / "sweep.json").read_text())
    assert content["recommendation"]["label"] == facts["recommended"]
    means = {point["label"]: point["mean"]["baseline.latents_l2"] for point in content["points"]}
    assert facts["recommended"] == min(means, key=lambda label: means[label])
    assert "edge of the sweep" in facts["reason"]
    page = project.page()
    assert facts["recommended"] in page
    assert page.count("data:image/png") == 4  # input, base alone, two points
    assert facts["recommended"] in (project.root / SWEPT / "sweep.md").read_text()


def test_a_lora_that_does_not_fit_is_refused_and_the_others_stay(
    project: Project, swept: tuple[dict[str, Any], str]
) -> None:
    before = project.points()
    filenames = f"{LORA},other-model.safetensors,absent.safetensors"
    facts, said = project.sweep(f"loras.lightning.filename={filenames}", "--keep", code=1)
    label = "loras.lightning.filename="
    assert (facts["points"], facts["built"]) == (3, 1)  # it is there, but its checkpoint was thrown away
    assert facts["wrong"].keys() == {f"{label}other-model.safetensors", f"{label}absent.safetensors"}
    assert "refused" in said
    assert facts["recommended"] == f"{label}{LORA}"
    refused = [point["refused"] for name, point in project.points().items() if name not in before]
    assert any("absent.safetensors" in sentence for sentence in refused)
    assert any("other-model.safetensors" in sentence for sentence in refused)
    assert "absent.safetensors" in project.page()
    assert project.page().count("kept: <code>") == 1
    (kept,) = project.checkpoints()
    assert (kept / "model_index.json").is_file()
    shutil.rmtree(kept)
    assert "Traceback" not in said


def test_interrupted_and_killed_sweeps_go_on_where_they_were_also_in_two_processes(
    project: Project, swept: tuple[dict[str, Any], str]
) -> None:
    before = project.points().keys()

    def new() -> set[str]:
        return project.points().keys() - before

    scales = "fuse.scale=0.7,0.9,1.1"
    first = project.start(scales)
    until(new, first)
    first.send_signal(signal.SIGINT)
    _, said = ended(first, 130)
    assert "1 of 3 points are done and stay; go on with the rest: python -m stages.sweep fuse.scale=0.7,0.9,1.1" in said
    (one,) = new()
    record = project.root / SWEPT / "points" / one / "point.json"
    written = record.stat().st_mtime_ns
    second = project.start(scales)
    until(lambda: any((path.parent / "merged").is_dir() for path in project.checkpoints()), second)
    second.kill()
    second.communicate()
    assert project.checkpoints()
    (project.root / SWEPT / "sweep.html").unlink(missing_ok=True)
    both = [project.start(scales) for _ in range(2)]  # two at once share what is missing
    facts = [ended(process, 0)[0] for process in both]
    assert [one["points"] for one in facts] == [3, 3]
    assert sum(one["built"] for one in facts) == 2
    assert any("sheet" in one for one in facts)  # of the one that ended last
    assert project.page().count("1.1") > 1
    assert len(new()) == 3
    assert record.stat().st_mtime_ns == written
    assert project.checkpoints() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to sweep"),
        (["fuse.scale="], "nothing to sweep"),
        (["fuse.scale=0.8"], "nothing to sweep"),
        (["fuse.scale=range(1,1)"], "a sweep of no points"),
        (["fuse.scale=interval(0,1)"], "list the values"),
        (["fuse.scale=0.8,,1"], "fuse.scale=0.8,,1"),
        (["fuse.scale=0.8,big"], "fuse.scale: Input should be a valid number, got 'big'"),
        (["fuse.scale=0.8,nan"], "finite number"),
        (["fuse.sale=0.8,1.0"], "fuse.sale"),
        (["lora=v1,v3"], "lora/v3"),
        (["recipe=pocket,nope"], "recipe/nope"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_built(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_fuse.errors import BadConfig

    monkeypatch.chdir(ROOT)
    with pytest.raises(BadConfig) as refused:
        expand(arguments)
    assert said in str(refused.value)


def test_the_points_are_hydra_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = expand(["fuse.scale=range(1,3)", "lora=glob(*)", "verify.rows=all"]).points
    labels = [" ".join(variant.overrides) for variant in found]
    assert labels == ["fuse.scale=1 lora=v1", "fuse.scale=1 lora=v2", "fuse.scale=2 lora=v1", "fuse.scale=2 lora=v2"]
    assert {variant.recipe.verify.rows for variant in found} == {"all"}
    assert [v.recipe.loras["lightning"].filename[-14:-12] for v in found[:2]] == ["v1", "v2"]


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_fuse.errors import NoSpace

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(space, "free_bytes", lambda _: 1000)
    with pytest.raises(NoSpace, match="1000 bytes"):
        sweep(expand(["fuse.scale=0.8,1.0"]), Artifacts(tmp_path / "sweep"))
    assert not list(tmp_path.glob("sweep/points/*"))


def test_a_disk_without_room_for_base_and_point_is_refused_before_anything_is_fetched(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_fuse.errors import NoSpace

    monkeypatch.chdir(ROOT)
    hub.push("bob/base", PIPELINE)
    total = sum(map(len, PIPELINE.values()))
    transformer = sum(len(data) for name, data in PIPELINE.items() if name.startswith("transformer/"))
    monkeypatch.setattr(space, "free_bytes", lambda _: total + transformer - 1)
    swept = expand(["fuse.scale=0.8,1.0", "base.repo_id=bob/base", "base.path=null", "base.revision=main"])
    with pytest.raises(NoSpace, match=rf"{total + transformer} bytes.*{total + transformer - 1} bytes"):
        sweep(swept, Artifacts(tmp_path / "sweep"))
    assert not list(cache_dir().glob("models--*/blobs/*"))


def test_a_queue_of_dvc_gives_a_table_with_the_same_names(workspace: Workspace) -> None:
    """As `dvc exp run --queue` and two workers make it, in a checkout of its own."""

    def quietly(*command: str) -> None:  # workers inherit the output and would keep a pipe open
        subprocess.run(
            command,
            cwd=workspace.root,
            env=workspace.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )

    quick = ["-S", "~regress.cases.hat", "-S", "regress.threads=1"]
    quietly("dvc", "exp", "run", "--queue", "-S", "fuse.scale=0.6,0.8", *quick, "regress")

    def idle() -> bool:
        return not {"Queued", "Running"} & set(workspace.run("dvc", "queue", "status").stdout.split())

    try:
        quietly("dvc", "queue", "start", "-j", "2")
        until(idle, seconds=LONGEST, every=6)  # asking costs the workers a core for a second
    finally:
        quietly("dvc", "queue", "stop", "--kill")
    shown = json.loads(workspace.run("dvc", "exp", "show", "--json").stdout)
    runs = [one["revs"][0]["data"] for revision in shown for one in revision.get("experiments") or []]
    assert sorted(run["params"]["params.yaml"]["data"]["fuse"]["scale"] for run in runs) == [0.6, 0.8]
    for run in runs:
        metrics = run["metrics"][RUN_METRICS]["data"]
        assert {f"rabbit.{side}.{name}" for side in ("floor", "unfused") for name in METRICS} <= metrics.keys()
        assert metrics["rabbit.agrees"] is True
