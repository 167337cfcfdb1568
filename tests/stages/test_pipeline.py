"""Laws of the whole pipeline: a real DVC run in a checkout of its own, and a real Hub on loopback for publishing."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_fuse.checkpoint.shards import PROVENANCE
from tests.hub_server import LoopbackHub
from tests.support.workspace import MERGED, METRICS, Workspace, hub_environment, ran

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def test_a_second_run_has_nothing_to_do(workspace: Workspace) -> None:
    assert ran(workspace.repro()) == []


def test_the_run_passes_and_says_so(workspace: Workspace) -> None:
    metrics = workspace.read(METRICS)
    assert (metrics["passed"], workspace.read("artifacts/verify.json")["passed"]) == (True, True)
    assert "-2threads-float32-" in metrics["environment"]
    assert 0 < metrics["rabbit.over_floor"] < 2
    summary = workspace.stage("summary")
    assert "artifacts/regression/report.html" in summary
    assert all(case in summary for case in ("rabbit", "hat"))


def test_a_build_leaves_the_checkout_clean_but_for_the_lock(workspace: Workspace) -> None:
    changed = workspace.run("git", "status", "--porcelain").stdout.split()
    assert changed in ([], ["M", "dvc.lock"], ["??", "dvc.lock"])
    assert workspace.read("artifacts/merged.build.json")["tool"]["dirty"] is False
    for name in ("artifacts/merged/model_index.json", "artifacts/verify.json", "artifacts/regression/images/x.png"):
        workspace.run("git", "check-ignore", name)
    workspace.run("git", "check-ignore", "artifacts/golden/pocket/x.png", code=1)


def test_a_deleted_result_is_rebuilt_to_the_same_bytes(workspace: Workspace) -> None:
    before = workspace.fused()
    shutil.rmtree(workspace.root / MERGED)
    output = workspace.repro("verify")
    assert ran(output)[0] == "fuse"
    assert workspace.fused() == before
    assert before.keys() == {
        str(p.relative_to(workspace.root / MERGED))
        for p in (workspace.root / MERGED / "transformer").glob("*.safetensors")
    }


def test_another_scale_fails_the_gate_as_an_export_does_and_the_default_is_fused_again(workspace: Workspace) -> None:
    before = workspace.fused()
    exports = ["export.formats=[single_file,nvfp4]", "regress.exports.nvfp4.worst_l2=0.01"]
    workspace.config("fuse.scale=0.9", *exports)
    output = workspace.repro(code=255)
    assert ran(output) == ["fuse", "verify", "regress", "gate"]
    assert "gate: regression: there is a picture outside its limits, and what was exported as nvfp4 is not" in output
    metrics = workspace.read(METRICS)
    verdicts = [metrics[f"exports.{name}.verdict"] for name in ("single_file", "nvfp4")]
    assert verdicts == ["exact", "regression"], metrics
    assert workspace.read(METRICS)["passed"] is False
    assert workspace.read("artifacts/verify.json")["passed"] is True
    workspace.config()
    workspace.repro("verify")
    assert workspace.fused() == before


def test_a_parameter_reruns_the_stages_that_use_it_and_no_other(workspace: Workspace) -> None:
    settings = ("fuse.scale=0.5", "regress.golden.psnr_db=20", "verify.rows=all", "publish.repo_id=a/b")
    workspace.config(*settings, "publish.private=false")
    changed = {stage: found[0]["changed deps"] for stage, found in workspace.status("dvc.yaml").items()}
    assert {stage: list(deps) for stage, deps in changed.items()} == {stage: ["params.yaml"] for stage in changed}
    assert {stage: set(deps["params.yaml"]) for stage, deps in changed.items()} == {
        "fuse": {"fuse"},
        "verify": {"fuse.scale", "verify"},
        "export": {"fuse.scale"},
        "regress": {"fuse.scale", "regress"},
    }


def test_a_recipe_by_override_runs_end_to_end_without_a_golden(workspace: Workspace) -> None:
    """Edit-Plus with two pictures: no golden was approved under this seed, so the verdict is no pass."""
    output = workspace.run("dvc", "exp", "run", "-S", "recipe=pocket_plus", "-S", "name=unapproved", code=255)
    assert "stages.approve" in output.stdout + output.stderr
    assert "exited with 3" in output.stdout + output.stderr
    assert workspace.read("artifacts/merged/model_index.json")["_class_name"] == "QwenImageEditPlusPipeline"
    metrics = workspace.read(METRICS)
    assert (metrics["verdict"], metrics["passed"]) == ("no-golden", False)


def test_what_is_approved_is_what_the_next_run_is_compared_with(workspace: Workspace) -> None:
    shutil.rmtree(workspace.root / "artifacts/golden/pocket")
    workspace.commit("no goldens")
    failed = workspace.repro(code=255)
    assert (ran(failed), "exited with 3" in failed) == (["regress", "gate"], True)
    assert workspace.read(METRICS)["verdict"] == "no-golden"
    workspace.stage("approve", "--reason", "the rabbit is purple")
    assert "no-golden" in workspace.stage("gate", code=3)  # the run itself does not pass by it
    record = json.loads((workspace.goldens / "rabbit.json").read_text())
    shown = (workspace.root / "artifacts/regression/images/rabbit.merged.png").read_bytes()
    assert record["sha256"] == hashlib.sha256(shown).hexdigest()
    assert record["approval"]["by"] == "t <t@example.org>"
    assert record["provenance"]["tool"]["git"] == workspace.run("git", "rev-parse", "HEAD").stdout.strip()
    assert ran(workspace.repro()) == ["regress"]  # with these very results the gate was passed before
    metrics = workspace.read(METRICS)
    assert (metrics["verdict"], metrics["rabbit.golden.identical"]) == ("exact", True)
    workspace.commit("goldens")


def test_a_run_in_another_environment_has_to_be_looked_at(workspace: Workspace) -> None:
    workspace.config("regress.threads=1")
    output = workspace.repro(code=255)
    assert "exited with 4" in output
    assert "gate: review" in output
    metrics = workspace.read(METRICS)
    assert "-1threads-" in metrics["environment"]
    assert (metrics["verdict"], metrics["passed"]) == ("review", False)
    assert "2threads" in metrics["rabbit.reasons"]
    assert "threads is 1, was 2" in (workspace.root / "artifacts/regression/report.html").read_text()
    assert "params.yaml is not what recipe pocket composes to" in workspace.stage("approve", "--reason", "x", code=1)


def test_a_golden_that_nobody_approved_stops_the_run_and_leaves_the_last_one(workspace: Workspace) -> None:
    before = (workspace.root / METRICS).read_bytes()
    golden = workspace.goldens / "rabbit.png"
    content = bytearray(golden.read_bytes())
    content[len(content) // 2] ^= 1
    golden.write_bytes(content)
    errors = [line for line in workspace.repro(code=255).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "rabbit.png has sha256" in errors[0]
    assert (workspace.root / METRICS).read_bytes() == before
    command = errors[0].partition("next: ")[2].split()
    workspace.run(*command)  # what the message says helps
    assert workspace.run("git", "status", "--porcelain", "artifacts").stdout == ""


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("download", "loras.lightning.filename=nope.safetensors", "nope.safetensors"),
        ("download", "loras.lightning.filename=lora.pt", "pickle"),
        ("download", "base.path=pocket/nowhere", "pocket/nowhere"),
        pytest.param("fuse", "fuse.device=cuda", "cuda", marks=NO_GPU),
        pytest.param("regress", "regress.placement=cuda", "regress.placement cuda", marks=NO_GPU),
    ],
)
def test_bad_input_is_one_error_line_and_leaves_the_last_result(
    workspace: Workspace, stage: str, override: str, message: str
) -> None:
    before = workspace.fused()
    errors = [line for line in workspace.stage(stage, override, code=2).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert workspace.fused() == before
    assert (workspace.root / MERGED / "model_index.json").is_file()
    assert (workspace.root / "artifacts/regression/images/rabbit.merged.png").is_file()


def test_dvc_ends_with_the_error_of_a_stage(workspace: Workspace) -> None:
    workspace.config("base.path=pocket/nowhere")
    errors = [line for line in workspace.repro(code=255).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "pocket/nowhere" in errors[0]


def test_publishing_is_off_unless_asked_for(workspace: Workspace) -> None:
    assert "publish" not in workspace.repro("--dry")
    workspace.repro("publish/dvc.yaml")
    receipt = workspace.read("artifacts/publish.json")
    assert (receipt["status"], receipt["files"]) == ("skipped", {})


def test_publish_refuses_what_the_gate_has_not_passed(workspace: Workspace, hub: LoopbackHub) -> None:
    hub_env = hub_environment()
    workspace.config("publish.enabled=true", "publish.repo_id=alice/bad")
    verify = workspace.root / "artifacts/verify.json"
    text = verify.read_text()
    failed = {"passed": False, "problem_count": 1, "problems": ["a row differs"]}
    verify.write_text(json.dumps(json.loads(text) | failed))
    refused = workspace.run(sys.executable, "-m", "stages.publish", code=2, env=hub_env)
    verify.write_text(text)
    assert "the gate is not passed" in refused.stderr
    assert hub.registry.repos == {}


DRAW = """
import sys, torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from lora_fuse.pictures.environment import make_deterministic
from lora_fuse.pictures.render import allow_missing_torchvision, condition_area
make_deterministic(2)
allow_missing_torchvision()
pipe = DiffusionPipeline.from_pretrained("alice/pocket-merged", revision="v1", dtype=torch.float32)
with condition_area(16384):
    picture = pipe(image=load_image("pocket/inputs/rabbit.png"), prompt="Change the rabbit's color to purple",
        negative_prompt=" ", num_inference_steps=4, true_cfg_scale=1.0, height=128, width=128,
        generator=torch.Generator("cpu").manual_seed(0)).images[0]
picture.save(sys.argv[1])
"""


def test_what_is_published_draws_the_picture_that_was_judged_and_is_sent_once(
    workspace: Workspace, hub: LoopbackHub, tmp_path: Path
) -> None:
    env = hub_environment()
    workspace.config("publish.enabled=true", "publish.repo_id=alice/pocket-merged", "publish.tag=v1")
    workspace.repro("publish/dvc.yaml", env=env)
    receipt = workspace.read("artifacts/publish.json")
    assert (receipt["status"], receipt["private"]) == ("published", True)
    assert (receipt["tag"], receipt["pull_request"]) == ("v1", 1)
    manifest = workspace.read("artifacts/merged.manifest.json")
    listed = {*manifest["files"], "README.md", "lora_fuse.json", "provenance.json", "bom.cdx.json"}
    pictures = {f"images/{name}.png" for name in ("blocks", "hat", "hat.input", "rabbit", "rabbit.input")}
    assert receipt["files"].keys() == listed | pictures
    assert "hf_write" not in (workspace.root / "artifacts/publish.json").read_text()
    assert hub.registry.repos["alice/pocket-merged"].tags == {"v1": receipt["commit"]}
    drawn = tmp_path / "drawn.png"
    workspace.run(sys.executable, "-c", DRAW, str(drawn), env={**env, "HF_HOME": str(tmp_path / "empty")})
    judged = workspace.root / "artifacts/regression/images/rabbit.merged.png"
    np.testing.assert_array_equal(np.asarray(Image.open(drawn)), np.asarray(Image.open(judged)))
    before = hub.uploaded()
    workspace.repro("-f", "-s", "publish/dvc.yaml:publish", env=env)
    assert workspace.read("artifacts/publish.json") == receipt
    assert hub.uploaded() == before


def test_a_base_of_the_hub_gives_the_same_weights_and_is_asked_for_once(workspace: Workspace, hub: LoopbackHub) -> None:
    data = workspace.data()
    hub_env = hub_environment()
    push = (
        "from huggingface_hub import HfApi; a = HfApi(); a.create_repo('alice/pocket');"
        "print(a.upload_folder(repo_id='alice/pocket', folder_path='pocket/model').oid)"
    )
    commit = workspace.run(sys.executable, "-c", push, env=hub_env).stdout.strip()
    workspace.config("base.path=null", "base.repo_id=alice/pocket", f"base.revision={commit!r}")
    workspace.repro("verify", env=hub_env)
    assert workspace.read("artifacts/base.lock.json")["base"]["revision"] == commit
    fused = workspace.fused()
    assert workspace.data() == data  # the header says what the base was, the rest is the same
    assert all(f'"alice/pocket@{commit}"' in header.metadata[PROVENANCE] for header in workspace.headers().values())
    workspace.repro(
        "-f", "-s", "fuse", env={**hub_env, "HF_ENDPOINT": "http://127.0.0.1:9"}
    )  # later stages need no Hub
    assert workspace.fused() == fused
