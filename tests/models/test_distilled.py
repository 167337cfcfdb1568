"""Laws of step-distilled LoRAs: known by name, warned of, and with a scheduler to be taken."""

import json
from pathlib import Path

import pytest
import yaml

import lora_fuse
from lora_fuse import LoraInput
from lora_fuse.cli import main
from lora_fuse.errors import BadConfig
from lora_fuse.fusion.plan import cautions
from lora_fuse.models import LIGHTNING, distillation, needed_scheduler, pair_warnings
from tests.support import tiny
from tests.support.composed import recipe_of

ROOT = Path(__file__).resolve().parents[2]
NAME = "Qwen-Image-Lightning-4steps-V2.0-bf16.safetensors"
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "recipe").glob("qwen_*.yaml") if "_21_" not in path.stem)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return tiny.write_lora(tmp_path / "loras" / NAME, tiny.lora_tensors())


def scheduler_of(merged: Path) -> dict[str, object]:
    content = json.loads((merged / "scheduler/scheduler_config.json").read_text())
    return {key: value for key, value in content.items() if not key.startswith("_")}


def test_the_settings_are_those_of_conf() -> None:
    assert dict(LIGHTNING) == yaml.safe_load((ROOT / "conf/scheduler/lightning.yaml").read_text())


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_says_is_what_its_lora_is_known_to_need(recipe: str) -> None:
    params = recipe_of(f"recipe={recipe}")
    for source in params.loras.values():
        known = distillation(source.filename)
        assert known is not None
        assert (known.steps, known.true_cfg_scale) == (params.sampling.steps, params.sampling.true_cfg_scale)
        assert known.scheduler == params.scheduler_config


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        (NAME, 4),
        ("Qwen-Image-Lightning-8steps-V1.1.safetensors", 8),
        ("qwen_image_edit_2509_lightning_4steps_v1.0_bf16.safetensors", 4),
        ("Qwen-Image-Edit-2511-Lightning-8steps-V1.0-fp32 (1).safetensors", 8),
        ("Qwen-Image-fp8-e4m3fn-Lightning-4steps-V1.0-bf16.safetensors", 4),
        ("Qwen-Image-Edit-2509-my-style.safetensors", None),
        ("Wan2.2-Lightning-4steps.safetensors", None),
        ("lightning.safetensors", None),
        ("pocket-lightning-4steps-v1.safetensors", None),
    ],
)
def test_a_file_is_known_by_its_own_name_if_that_is_unmistakable(name: str, steps: int | None) -> None:
    known = distillation(f"Comfy/loras/{name}")
    assert (known and known.steps) == steps


def test_a_lora_for_fp8_is_a_pair_of_its_own() -> None:
    name = "Qwen-Image-fp8-e4m3fn-Lightning-4steps-V1.0-bf16.safetensors"
    for base in ("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512", None):
        for repo_id in ("lightx2v/Qwen-Image-Lightning", None):
            (said,) = pair_warnings(base, [(repo_id, name)])
            assert said.startswith(
                f"{name} was made for Qwen/Qwen-Image in fp8 (e4m3fn), not for weights of other dtype"
            )
    assert pair_warnings("Qwen/Qwen-Image", [("lightx2v/Qwen-Image-Lightning", NAME), (None, NAME)]) == []


def test_a_wrong_pair_is_known_by_name_as_well() -> None:
    (said,) = pair_warnings("Qwen/Qwen-Image-Edit-2509", [(None, "Qwen-Image-Edit-Lightning-4steps-V1.0.safetensors")])
    assert "was made for Qwen/Qwen-Image-Edit, not for Qwen/Qwen-Image-Edit-2509" in said


def test_keeping_the_base_s_scheduler_is_warned_of_and_auto_takes_the_lora_s(
    tmp_path: Path, base: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    fuse = ["fuse", str(base), str(out), "--lora", str(lora)]
    verify = ["verify", str(out), str(base), "--lora", str(lora)]
    warning = f"warning: {NAME} was distilled for 4 steps at true_cfg_scale 1 with its own FlowMatchEuler"
    for command in (["plan", str(base), "--lora", str(lora)], fuse):
        assert main(command) == 0
        assert warning in capsys.readouterr().err
    assert scheduler_of(out) == {"shift_terminal": 0.02}
    assert main([*verify, "--scheduler", "auto"]) == 1
    assert main([*fuse, "--scheduler", "auto"]) == 0
    done = capsys.readouterr()
    assert (f"scheduler auto: that of {NAME}, for 4 steps at true_cfg_scale 1" in done.out, warning in done.err) == (
        True,
        False,
    )
    assert scheduler_of(out) == dict(LIGHTNING)
    assert main([*verify, "--scheduler", "auto"]) == 0


def test_auto_is_the_same_from_python_and_refused_where_nothing_is_known(
    tmp_path: Path, base: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [LoraInput("l", lora, 1.0)]
    with pytest.warns(UserWarning, match="was distilled for 4 steps"):
        lora_fuse.fuse(lora_fuse.plan(base, given), tmp_path / "out")
    lora_fuse.fuse(lora_fuse.plan(base, given), tmp_path / "out", scheduler="auto")
    assert scheduler_of(tmp_path / "out") == dict(LIGHTNING)
    assert lora_fuse.verify(tmp_path / "out", base, given, scheduler="auto").passed
    other = lora.rename(tmp_path / "style.safetensors")
    command = ["fuse", str(base), str(tmp_path / "new"), "--lora", str(other), "--scheduler", "auto"]
    assert main(command) == 2
    assert "it is not known what style.safetensors needs" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_two_loras_of_other_settings_leave_no_choice() -> None:
    eight = NAME.replace("4steps", "8steps")
    assert needed_scheduler(["style.safetensors", NAME, NAME]).steps == 4
    with pytest.raises(BadConfig, match=f"{NAME} was distilled for 4 steps at .*, {eight} for 8 steps"):
        needed_scheduler([NAME, eight])


def test_nothing_is_said_where_the_scheduler_is_right_and_a_component_is_told_to_set_it(base: Path, lora: Path) -> None:
    given = [LoraInput("l", lora, 1.0)]
    (said,) = cautions(lora_fuse.plan(base / "transformer", given))
    assert said.endswith("set it in the pipeline that loads OUT")
    config = base / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({**LIGHTNING, "_class_name": "FlowMatchEulerDiscreteScheduler"}))
    assert cautions(lora_fuse.plan(base, given)) == []
    config.write_text(json.dumps({**LIGHTNING, "shift_terminal": 0.02}))
    (said,) = cautions(lora_fuse.plan(base, given))
    assert "(shift_terminal null where the base's has 0.02)" in said
