"""Laws of the command line: exit codes, one error line, nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_fuse import cli
from lora_fuse.checkpoint.component_folder import OTHER_WEIGHTS
from lora_fuse.recipe.records import Manifest, from_json
from tests.support import tiny


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_fuse", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors())


def test_fuse_then_verify_is_done_and_right(tmp_path: Path, base: Path, lora: Path) -> None:
    out = tmp_path / "out"
    fused = run("fuse", base, out, "--lora", lora, "--scale", 0.8)
    assert (fused.returncode, "6 of 13 tensors change" in fused.stdout) == (0, True), fused.stderr
    manifest = from_json(Manifest, (tmp_path / "out.manifest.json").read_text(), "manifest")
    assert (manifest.scale, manifest.targets, manifest.recipe) == (0.8, 6, None)
    verified = run("verify", out, base, "--lora", lora, "--scale", 0.8, "--rows", "all")
    assert (verified.returncode, verified.stdout.splitlines()[-1]) == (0, "verify: passed")


def test_verify_of_another_scale_exits_1(tmp_path: Path, base: Path, lora: Path) -> None:
    run("fuse", base, tmp_path / "out", "--lora", lora, "--scale", 0.8)
    wrong = run("verify", tmp_path / "out", base, "--lora", lora, "--scale", 0.7)
    assert (wrong.returncode, wrong.stdout.splitlines()[-1]) == (1, "verify: FAILED, 6 problems")


def test_a_scheduler_replaces_the_base_s(tmp_path: Path, base: Path, lora: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"shift_terminal": None}))
    run("fuse", base, tmp_path / "out", "--lora", lora, "--scheduler", tmp_path / "s.json")
    config = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert config == {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": None}


def test_inspect_says_what_is_in_the_file(lora: Path) -> None:
    seen = run("inspect", lora)
    assert seen.returncode == 0
    assert "rank 4, alpha 2 (factor 0.5): 6 modules" in seen.stdout
    assert "transformer_blocks.1.attn.to_out.0.weight  16x24" in seen.stdout


def test_plan_writes_nothing(tmp_path: Path, base: Path, lora: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run("plan", base, "--lora", lora).returncode == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_names_what_is_left_behind_and_what_is_odd(
    base: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny base has a card and a pickle."""
    shard = base / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    (base / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(shard.read_bytes())
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "Own"]}))
    (base / "pipeline.py").write_text("class Own: ...")
    assert cli.main(["plan", str(base), "--lora", str(lora)]) == 0
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if "left behind" in line] == [
        f"  left behind: {name} ({reason})"
        for name, reason in {
            "README.md": "a model card; a published merge has its own",
            "transformer/diffusion_pytorch_model.fp16.safetensors": OTHER_WEIGHTS,
            "vae/diffusion_pytorch_model.bin": "a pickle, which can run code when it is loaded",
        }.items()
    ]
    assert "warning: code of the base is taken over (pipeline.py)" in said.err


def test_a_known_wrong_pair_in_the_hub_cache_is_warned_of(tmp_path: Path, base: Path, lora: Path) -> None:
    file = "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors"
    cached = tmp_path / "models--lightx2v--Qwen-Image-Lightning" / "snapshots" / ("c" * 40) / file
    cached.parent.mkdir(parents=True)
    lora.rename(cached)
    for repo_id, warned in (("Qwen--Qwen-Image-Edit", True), ("Qwen--Qwen-Image-Edit-2509", False)):
        snapshot = tmp_path / f"models--{repo_id}" / "snapshots" / ("d" * 40)
        snapshot.parent.mkdir(parents=True)
        snapshot.symlink_to(base)
        planned = run("plan", snapshot, "--lora", cached)
        warning = f"warning: {file} was made for Qwen/Qwen-Image-Edit-2509, not for Qwen/Qwen-Image-Edit: it merges"
        assert (planned.returncode, planned.stderr.startswith(warning)) == (0, warned)


def test_an_error_is_one_line_however_long_a_name_is(tmp_path: Path) -> None:
    key = "a\n" * 5000 + ".lora_down.weight"
    tiny.write_lora(tmp_path / "l.safetensors", {key: np.ones((1, 1), np.float32)})
    refused = run("inspect", tmp_path / "l.safetensors")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert len(refused.stderr) < 2100


def broken(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.safetensors"
    tensors = tiny.lora_tensors()
    if kind == "truncated":
        tiny.write_lora(path, tensors)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "unmatched":
        tiny.write_lora(path, {key.replace("attn", "attention"): value for key, value in tensors.items()})
    elif kind == "shape":
        key = "transformer_blocks.0.attn.to_q.lora_up.weight"
        tiny.write_lora(path, {**tensors, key: np.ones((8, 4), np.float32)})
    elif kind == "pickle":
        path = folder / "pickle.pt"
        path.write_bytes(b"\x80\x04K\x01.")
    return path


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "unmatched", "shape", "pickle"])
def test_a_bad_lora_is_one_error_line_exit_2_and_no_out(tmp_path: Path, base: Path, kind: str) -> None:
    refused = run("fuse", base, tmp_path / "out", "--lora", broken(tmp_path, kind))
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ")
    assert kind in line
    assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path, base: Path, lora: Path, scale: str) -> None:
    refused = run("fuse", base, tmp_path / "out", "--lora", lora, f"--scale={scale}")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert f"is {scale}, not a finite number" in refused.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_asked_for_and_absent_is_refused(tmp_path: Path, base: Path, lora: Path) -> None:
    refused = run("fuse", base, tmp_path / "out", "--lora", lora, "--device", "cuda")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "cuda" in refused.stderr.lower()
    assert not (tmp_path / "out").exists()


def test_scales_pair_with_loras(tmp_path: Path, base: Path, lora: Path) -> None:
    refused = run("plan", base, "--lora", lora, "--scale", 1, "--scale", 2)
    assert (refused.returncode, "1 --lora and 2 --scale" in refused.stderr) == (2, True)


def test_a_usage_error_exits_2() -> None:
    assert run("fuse").returncode == 2


def test_a_refused_fuse_leaves_the_last_result(tmp_path: Path, base: Path, lora: Path) -> None:
    run("fuse", base, tmp_path / "out", "--lora", lora)
    held = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert run("fuse", base, tmp_path / "out", "--lora", broken(tmp_path, "shape")).returncode == 2
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == held


def test_a_reader_that_leaves_early_is_no_error(lora: Path) -> None:
    command = [sys.executable, "-m", "lora_fuse", "inspect", str(lora)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate()
    assert (process.returncode, errors) == (141, "")
