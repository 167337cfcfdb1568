"""Training from nothing, on a recipe of a few steps: every phase, stopping and going on, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pocket import LORA_TARGETS
from pocket.bench import Bench
from pocket.tasks import held_out
from pocket.train import model
from pocket.train.__main__ import PHASES, main
from pocket.train.autoencoder import be_a_pyramid, encode_small, one_frame
from pocket.train.loras import add_lora, lora_state, peft_state

FEW = {
    "families": 6, "members": 4, "edits": 24, "pairs": 4, "vae_steps": 3, "decoder_steps": 2, "base_steps": 8,
    "base_batch": 4, "trajectories": 6, "v1_steps": 2, "v2_steps": 2, "style_steps": 2,
}  # fmt: skip


def train(folder: Path) -> str:
    """Run the command as a user would, but for the compiler, which would take minutes."""
    settings = [part for key, value in FEW.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "pocket.train", "--work", str(folder / "work"), "--out", str(folder), *settings]
    env = {**os.environ, "TORCH_COMPILE_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    train(folder)
    return folder


def test_it_writes_a_model_that_the_pipelines_run(trained: Path) -> None:
    with Bench(trained) as bench:
        assert len(bench.round_trip(held_out(1))) == 1
        assert bench.merged_plus.transformer.config.num_layers == 5


def test_a_second_run_trains_nothing_and_a_lost_phase_is_done_again_to_the_same_bytes(trained: Path) -> None:
    before = {path.name: path.read_bytes() for path in (trained / "lora").iterdir()}
    (trained / "work/v2.safetensors").unlink()
    log = train(trained)
    assert [name for name in PHASES if f"{name}: done before" not in log] == ["v2"]
    assert {path.name: path.read_bytes() for path in (trained / "lora").iterdir()} == before


def test_a_work_folder_of_another_recipe_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [part for key, value in {**FEW, "base_steps": 9}.items() for part in ("--set", f"{key}={value}")]
    with pytest.raises(SystemExit, match="2"):
        main(["--work", str(trained / "work"), "--out", str(trained), *settings])
    assert "was begun with base_steps=8, not 9: give another --work" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "message"), [("steps=1", "the recipe has seed"), ("seed=x", "valid integer")])
def test_a_key_or_value_that_the_recipe_does_not_know_is_refused(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--work", str(tmp_path / "work"), "--set", change])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_the_outer_level_starts_as_a_box_filter() -> None:
    torch.manual_seed(0)
    vae = model.vae()
    be_a_pyramid(vae)
    one_frame(vae)
    x = torch.rand(2, 3, 1, 64, 64) * 2 - 1
    small = torch.nn.functional.avg_pool2d(x.squeeze(2), 2).unsqueeze(2)
    with torch.no_grad():
        torch.testing.assert_close(vae.quant_conv(vae.encoder(x)), encode_small(vae, small))


def test_one_frame_convolutions_give_what_the_whole_ones_give() -> None:
    torch.manual_seed(0)
    vae, x = model.vae(), torch.rand(1, 3, 1, 64, 64) * 2 - 1
    with torch.no_grad():
        whole = vae.decode(vae.encode(x).latent_dist.mode()).sample
        one_frame(vae)
        short = vae.decoder(vae.post_quant_conv(vae.quant_conv(vae.encoder(x)).chunk(2, 1)[0]))
    torch.testing.assert_close(short.clamp(-1, 1), whole, atol=1e-4, rtol=0)


def test_lora_keys_go_to_the_published_names_and_back() -> None:
    net = model.transformer()
    add_lora(net, 8, 4.0, LORA_TARGETS)
    state = lora_state(net, 4.0)
    assert {key.rpartition(".lora_")[2] for key in state if "lora_" in key} == {"down.weight", "up.weight"}
    assert len(peft_state(state)) == 2 * 5 * len(LORA_TARGETS)
