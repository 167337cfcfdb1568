"""Pictures come from real pocket pipelines; what the libraries would let pass with a warning is refused."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_fuse.errors import NoDevice, RenderFailed
from lora_fuse.fusion import device as devices
from lora_fuse.fusion.device import fuse_device, resolve_device
from lora_fuse.lora.inputs import LoraInput
from lora_fuse.pictures.cases import Case, Sampling
from lora_fuse.pictures.metrics import psnr_db
from lora_fuse.pictures.picture import Rendered
from lora_fuse.pictures.render import (
    Pipeline,
    condition_area,
    encode_prompts,
    load_pipeline,
    make_scheduler,
    render,
    shared_components,
)
from lora_fuse.pictures.unfused_lora import load_loras

POCKET = Path(__file__).resolve().parents[2] / "pocket"
LORA = POCKET / "lora/pocket-lightning-4steps-v2.safetensors"
RABBIT, HAT = POCKET / "inputs/rabbit.png", POCKET / "inputs/hat.png"
FOUR_STEPS = Sampling(steps=4, true_cfg_scale=1.0, negative_prompt=" ", condition_area=128 * 128)
MODULES = 60  # 12 targets in each of 5 blocks
TEXT = Case("text", "a purple cat with a red hat", seed=0, height=128, width=128)

LIGHTNING = {
    "base_image_seq_len": 256,
    "base_shift": math.log(3),
    "max_image_seq_len": 8192,
    "max_shift": math.log(3),
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make tiny work slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def edit() -> Pipeline:
    """One load for the module; its text encoder and VAE serve the other pipelines."""
    return lightning(load_pipeline(POCKET / "model", "QwenImageEditPipeline", dtype="float32"))


@pytest.fixture
def text(edit: Pipeline) -> Pipeline:
    """A fresh transformer without input pictures: the quickest of the three."""
    return sibling(edit, "QwenImagePipeline")


def sibling(edit: Pipeline, name: str, folder: Path = POCKET / "model") -> Pipeline:
    return lightning(load_pipeline(folder, name, dtype="float32", shared=shared_components(edit)))


def lightning(pipe: Pipeline) -> Pipeline:
    pipe.register_modules(scheduler=make_scheduler(LIGHTNING))
    return pipe


def spec(scale: float = 1.0, path: Path = LORA) -> LoraInput:
    return LoraInput("lightning", path, scale)


def fuse(pipe: Pipeline, factor: float) -> None:
    """Add factor x up @ down to each target, in float32."""
    state, weights = load_file(LORA), dict(pipe.transformer.named_parameters())
    with torch.no_grad():
        for name in (key.removesuffix(".alpha") for key in state if key.endswith(".alpha")):
            up, down = (state[f"{name}.lora_{side}.weight"].float() for side in ("up", "down"))
            weights[f"{name}.weight"] += factor * up @ down


def pixels(rendered: Rendered) -> bytes:
    return rendered.levels.tobytes()


# Pictures


def test_edit_takes_one_picture(edit: Pipeline) -> None:
    rendered = render(edit, Case("edit", "Change the rabbit's color to purple", 0, (RABBIT,), 64, 96), FOUR_STEPS)
    assert rendered.size == (96, 64)
    assert rendered.nonfinite == 0
    assert rendered.levels.std() > 20
    assert rendered.cost.seconds > 0
    assert rendered.latents.dtype == np.float32


def test_edit_plus_takes_two_pictures(edit: Pipeline) -> None:
    plus = sibling(edit, "QwenImageEditPlusPipeline")
    rendered = render(plus, Case("both", "The rabbit wears the hat", 0, (RABBIT, HAT), 64, 64), FOUR_STEPS)
    assert rendered.size == (64, 64)
    assert rendered.sigmas == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("QwenImagePipeline", ()),
        ("QwenImageEditPipeline", (RABBIT,)),
        ("QwenImageEditPlusPipeline", (RABBIT, HAT)),
    ],
)
def test_prompts_that_are_encoded_apart_give_the_same_bits(edit: Pipeline, name: str, images: tuple[Path, ...]) -> None:
    """Without transformer and VAE, and then without a text encoder."""
    case = Case("apart", "The rabbit wears the hat", 0, images, 64, 64)
    sampling = Sampling(2, 3.0, " ", 128 * 128)
    whole = render(sibling(edit, name), case, sampling)
    encoder = load_pipeline(POCKET / "model", name, dtype="float32", shared={"transformer": None, "vae": None})
    prompts = encode_prompts(encoder, case, sampling)
    assert len(prompts) == 2
    assert len(encode_prompts(encoder, case, FOUR_STEPS)) == 1
    shared = shared_components(edit) | {"text_encoder": None}
    rest = lightning(load_pipeline(POCKET / "model", name, dtype="float32", shared=shared))
    apart = render(rest, case, sampling, prompts=prompts)
    assert (apart.latents == whole.latents).all()
    assert pixels(apart) == pixels(whole)
    other = encode_prompts(encoder, Case("other", "A cat", 0, images, 64, 64), sampling)
    assert pixels(render(rest, case, sampling, prompts=other)) != pixels(whole)


def test_input_pictures_are_scaled_to_the_condition_area_and_afterwards_to_a_megapixel_again() -> None:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as one
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as two

    with condition_area(128 * 256):
        assert one.calculate_dimensions(1024 * 1024, 0.5)[:2] == (128, 256)
        assert two.calculate_dimensions(two.VAE_IMAGE_SIZE, 2.0) == (256, 128)
    for module in (one, two):
        assert module.calculate_dimensions(1024 * 1024, 1.0)[:2] == (1024, 1024)
    with condition_area(None):
        assert one.calculate_dimensions(1024 * 1024, 1.0)[:2] == (1024, 1024)


def test_lightning_visits_its_four_sigmas_and_the_folders_own_scheduler_does_not(
    edit: Pipeline, text: Pipeline
) -> None:
    lightning = render(text, TEXT, FOUR_STEPS)
    own = load_pipeline(POCKET / "model", "QwenImagePipeline", dtype="float32", shared=shared_components(edit))
    base = render(own, TEXT, FOUR_STEPS)
    assert lightning.sigmas == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    assert base.sigmas[-2:] == pytest.approx((0.02, 0.0))
    assert psnr_db(lightning.levels, base.levels) < 28


def test_the_same_seed_gives_the_same_bits_and_another_another_picture(text: Pipeline) -> None:
    first, second = render(text, TEXT, FOUR_STEPS), render(text, TEXT, FOUR_STEPS)
    other = render(text, Case("other", TEXT.prompt, 1, (), 128, 128), FOUR_STEPS)
    assert pixels(first) == pixels(second)
    assert psnr_db(first.levels, other.levels) < 20


def test_nan_weights_are_counted_not_painted_over(text: Pipeline) -> None:
    with torch.no_grad():
        text.transformer.proj_out.bias.fill_(math.nan)
    assert render(text, TEXT, FOUR_STEPS).nonfinite == 128 * 128 * 3


def test_shared_components_are_passed_not_loaded_again(edit: Pipeline, text: Pipeline) -> None:
    assert set(shared_components(edit)) == {"vae", "text_encoder", "tokenizer", "processor"}
    assert text.vae is edit.vae
    assert text.text_encoder is edit.text_encoder
    assert text.transformer is not edit.transformer


# LoRAs


def test_unfused_and_fused_pictures_agree_and_alpha_matters(edit: Pipeline, text: Pipeline) -> None:
    plain = render(text, TEXT, FOUR_STEPS)
    assert load_loras(text, [spec()], MODULES) == MODULES
    unfused = render(text, TEXT, FOUR_STEPS)
    fused = sibling(edit, "QwenImagePipeline")
    fuse(fused, 4.0 / 8)
    right = render(fused, TEXT, FOUR_STEPS)
    assert psnr_db(right.levels, unfused.levels) > 70
    assert psnr_db(plain.levels, unfused.levels) < 29
    fuse(fused, 4.0 / 8)  # as if alpha had been ignored: twice too strong
    assert psnr_db(render(fused, TEXT, FOUR_STEPS).levels, unfused.levels) < 27


def test_a_tenth_of_the_scale_shows(edit: Pipeline, text: Pipeline) -> None:
    load_loras(text, [spec(1.0)], MODULES)
    weaker = sibling(edit, "QwenImagePipeline")
    load_loras(weaker, [spec(0.9)], MODULES)
    assert psnr_db(render(text, TEXT, FOUR_STEPS).levels, render(weaker, TEXT, FOUR_STEPS).levels) < 50


def test_two_loras_act_together(edit: Pipeline, text: Pipeline) -> None:
    halves = sibling(edit, "QwenImagePipeline")
    names = [LoraInput("v1.0", LORA, 0.25), LoraInput("v1.0", LORA, 0.75)]
    assert load_loras(halves, names, 2 * MODULES) == 2 * MODULES
    load_loras(text, [spec()], MODULES)
    assert psnr_db(render(halves, TEXT, FOUR_STEPS).levels, render(text, TEXT, FOUR_STEPS).levels) > 70


def test_another_number_of_modules_than_expected_is_refused(text: Pipeline) -> None:
    with pytest.raises(RenderFailed, match=r"attached 60 of 61 LoRA modules \(lightning\)"):
        load_loras(text, [spec()], MODULES + 1)


def test_a_lora_of_which_no_layer_is_loaded_is_refused(text: Pipeline, tmp_path: Path) -> None:
    """Diffusers loads this file with nothing but a warning."""
    state = {f"base_model.model.{key}": value for key, value in load_file(LORA).items() if "alpha" not in key}
    renamed = {key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value for key, value in state.items()}
    save_file(renamed, tmp_path / "other.safetensors")
    with pytest.raises(RenderFailed, match="attached 0 of 60"):
        load_loras(text, [spec(path=tmp_path / "other.safetensors")], MODULES)


def test_a_lora_that_diffusers_cannot_read_is_refused(text: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(RenderFailed, match="cannot load LoRA lightning"):
        load_loras(text, [spec(path=tmp_path / "missing.safetensors")], MODULES)


# Refusals


@pytest.mark.parametrize("content", [None, b"not a picture", RABBIT.read_bytes()[:500]])
def test_a_picture_that_cannot_be_read_is_refused(content: bytes | None, edit: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "in.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RenderFailed, match=r"case broken: input picture .*in\.png cannot be read: .+"):
        render(edit, Case("broken", "x", 0, (path,)), FOUR_STEPS)


@pytest.mark.parametrize("pictures", [(), (RABBIT, HAT)])
def test_too_few_or_too_many_pictures_are_refused(pictures: tuple[Path, ...], edit: Pipeline) -> None:
    with pytest.raises(RenderFailed, match=f"case many has {len(pictures)} input pictures .*Edit.* takes 1"):
        render(edit, Case("many", "x", 0, pictures), FOUR_STEPS)


def test_an_unknown_pipeline_class_is_refused_with_the_near_names() -> None:
    with pytest.raises(RenderFailed, match=r"unknown .*EditPlusPipelin'.*did you mean QwenImageEditPlusPipeline"):
        load_pipeline(POCKET / "model", "QwenImageEditPlusPipelin", dtype="float32")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(RenderFailed, match="unknown dtype 'int8'"):
        load_pipeline(POCKET / "model", "QwenImagePipeline", dtype="int8")


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RenderFailed, match=r"no model_index\.json"):
        load_pipeline(tmp_path, "QwenImagePipeline", dtype="float32")
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}', encoding="utf-8")
    with pytest.raises(RenderFailed, match="cannot be loaded as QwenImagePipeline"):
        load_pipeline(tmp_path, "QwenImagePipeline", dtype="float32")


# Devices


def test_cuda_is_refused_where_there_is_none() -> None:
    if torch.cuda.is_available():
        assert resolve_device("cuda") == "cuda"
        return
    with pytest.raises(NoDevice, match=rf"torch {torch.__version__.replace('+', '.')} .* finds no GPU"):
        resolve_device("cuda")
    assert resolve_device("auto") == "cpu"


@pytest.mark.parametrize(
    ("cores", "plain", "present", "device"),
    [(2, True, True, "cuda"), (64, True, True, "cpu"), (64, False, True, "cuda"), (2, True, False, "cpu")],
)
def test_a_fuse_takes_the_gpu_only_where_it_is_of_use(
    cores: int, plain: bool, present: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_has_no_gpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert fuse_device("auto", plain) == device
    assert fuse_device("cpu", plain) == "cpu"


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(NoDevice, match="unknown device 'tpu': use one of auto, cpu, cuda"):
        resolve_device("tpu")


def test_importing_render_costs_no_heavy_import() -> None:
    code = (
        "import sys, lora_fuse.pictures.pairs, lora_fuse.regression.goldens;"
        "print({'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_loading_and_rendering_prints_nothing() -> None:
    """In a fresh process: the libraries warn when they are first imported."""
    code = (
        "from pathlib import Path; from lora_fuse.pictures.render import *;"
        f"pipe = load_pipeline(Path({str(POCKET / 'model')!r}), 'QwenImagePipeline', dtype='float32');"
        "render(pipe, Case('a', 'a cat', 0, (), 64, 64), Sampling(2, 1.0, ' '))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")
