"""Every pipeline class of every family renders: merged as base + LoRA beside it, a right merge near the noise floor."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.errors import RenderFailed
from lora_fuse.fusion import FuseJob, Plan, plan_base
from lora_fuse.lora import LoraInput
from lora_fuse.models import pipelines
from lora_fuse.models.pipeline_call import CFG_ALONE
from lora_fuse.pictures.calls.call_arguments import check_case, check_sampling
from lora_fuse.pictures.cases import Case, Sampling
from lora_fuse.pictures.metrics import psnr_db
from lora_fuse.pictures.pairs import Setup, render_pairs
from lora_fuse.pictures.render import load_pipeline, make_scheduler, render
from lora_fuse.regression.verdicts import compare, over_floor
from tests.tiny_models import FAMILIES, tiny, tiny_transformer
from tests.tiny_models.pipelines import PIPELINES


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lora_of(name: str, component: str, path: Path) -> LoraInput:
    """A LoRA of rank 2 for the queries of every attention of a family's tiny denoiser, in diffusers' names."""
    numbers = torch.Generator().manual_seed(1)
    factors = {}
    for module, found in tiny_transformer(name).named_modules():
        if isinstance(found, torch.nn.Linear) and module.rpartition(".")[2] in ("to_q", "to_qkv_mlp_proj"):
            rows, columns = found.weight.shape
            factors[f"{component}.{module}.lora_A.weight"] = torch.randn(2, columns, generator=numbers) / 2
            factors[f"{component}.{module}.lora_B.weight"] = torch.randn(rows, 2, generator=numbers) / 2
    save_file(factors, path)
    return LoraInput("tiny", path, 1.0)


def fused(name: str, folder: Path) -> Plan:
    """The plan of a merge of a family's tiny pipeline, which is written to ``merged``."""
    component = pipelines()[PIPELINES[name][0]].denoisers[0]
    base = tiny(name, folder / "base", dtype=torch.float32)
    plan = plan_base(base, [lora_of(name, component, folder / "l.safetensors")])
    FuseJob(plan, folder / "merged", device="cpu").run()
    return plan


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"wan_22", "sdxl"}))  # of these several components, below
def test_merged_and_unfused_agree_to_the_noise_floor_and_the_lora_shows(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (90, 140, 30)).save(tmp_path / "in.png")
    kind = PIPELINES[name][0]
    call = pipelines()[kind]
    plan = fused(name, tmp_path)
    takes = 1 in call.pictures and name != "qwen_image_21"  # which scales it to a megapixel
    images = (tmp_path / "in.png",) if takes else ()
    case = Case("rabbit", "a purple rabbit", 0, images, 64, 64, 5 if call.makes_clip else None)
    sampling = Sampling(2, 3.0, "grey" if call.guidance.negative else None, guidance=call.guidance)
    setup = Setup(kind, sampling, {}, "cpu", "float32", baseline=sampling)
    (pair,) = render_pairs(tmp_path / "merged", plan, [case], setup)
    assert pair.unfused_by == "diffusers"
    apart, floor = (compare(one, pair.unfused) for one in (pair.merged, pair.floor))
    assert (over_floor(apart, floor) or 0) < 1
    assert 0 < floor.values["latents_l2"] < 1e-4
    assert pair.baseline is not None
    assert psnr_db(pair.baseline.levels, pair.merged.levels) < 60
    assert pair.merged.size == ((192, 64) if call.makes_clip else (64, 64))
    assert sampling.guided == (call.guidance.off < 3)
    whole = render(load_pipeline(tmp_path / "merged", kind, dtype="float32"), case, sampling)
    assert (whole.latents == pair.merged.latents).all()  # with prompts that were encoded apart


def lora_into(base: Path, component: str, path: Path) -> None:
    """A LoRA for the queries of a component, in diffusers' names."""
    numbers = torch.Generator().manual_seed(2)
    factors = {}
    for name, tensor in open_checkpoint(base, component).tensors().items():
        if name.endswith(("to_q.weight", "q_proj.weight")):
            module = f"{component}.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = torch.randn(2, tensor.shape[1], generator=numbers)
            factors[f"{module}.lora_B.weight"] = torch.randn(tensor.shape[0], 2, generator=numbers)
    save_file(factors, path)


@pytest.mark.parametrize(
    ("name", "components"),
    [("wan_22", ("transformer", "transformer_2")), ("sdxl", ("unet", "text_encoder", "text_encoder_2"))],
)
def test_components_that_are_fused_together_act_together_beside_the_base(
    name: str, components: tuple[str, ...], tmp_path: Path
) -> None:
    kind = PIPELINES[name][0]
    call = pipelines()[kind]
    base = tiny(name, tmp_path / "base", dtype=torch.float32)
    for component in components:
        lora_into(base, component, tmp_path / f"{component}.safetensors")
    plan = plan_base(base, [LoraInput(part, tmp_path / f"{part}.safetensors", 1.0) for part in components])
    assert [part.component for part in plan.parts] == list(components)
    FuseJob(plan, tmp_path / "merged", device="cpu").run()
    case = Case("rabbit", "a purple rabbit", 0, (), 64, 64, 5 if call.makes_clip else None)
    sampling = Sampling(2, 3.0, "grey", guidance=call.guidance)
    setup = Setup(kind, sampling, {}, "cpu", "float32", baseline=sampling)
    (pair,) = render_pairs(tmp_path / "merged", plan, [case], setup)
    assert pair.unfused_by == "diffusers"
    floor = compare(pair.floor, pair.unfused)
    assert pair.baseline is not None
    apart, lost = (compare(one, pair.unfused) for one in (pair.merged, pair.baseline))
    assert (over_floor(apart, floor) or 0) < 2  # of text encoders that are moved too
    assert 0 < floor.values["latents_l2"] < 1e-4
    assert apart.values["latents_l2"] < 1e-4
    assert lost.values["latents_l2"] > 1e-3
    whole = render(load_pipeline(tmp_path / "merged", kind, dtype="float32"), case, sampling)
    assert (whole.latents == pair.merged.latents).all()
    alone = render(load_pipeline(base, kind, dtype="float32"), case, sampling)
    assert (alone.latents == pair.baseline.latents).all()


def test_a_lora_that_diffusers_misreads_is_attached_here_and_in_its_own_names_there(tmp_path: Path) -> None:
    """FLUX.2's last modulation, whose halves are the other way round in original names."""
    base = tiny("flux_2_klein", tmp_path / "base", dtype=torch.float32)
    rows, columns = open_checkpoint(base, "transformer").tensors()["norm_out.linear.weight"].shape
    numbers = torch.Generator().manual_seed(2)
    down = torch.randn(2, columns, generator=numbers)
    up = torch.randn(rows, 2, generator=numbers)
    by = {}
    for name in ("diffusion_model.final_layer.adaLN_modulation.1", "transformer.norm_out.linear"):
        path = tmp_path / f"{name}.safetensors"
        save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
        plan = plan_base(base, [LoraInput("l", path, 1.0)])
        FuseJob(plan, tmp_path / name, device="cpu").run()
        setup = Setup("Flux2KleinPipeline", Sampling(2, 1.0, None, guidance=CFG_ALONE), {}, "cpu", "float32")
        (pair,) = render_pairs(tmp_path / name, plan, [Case("rabbit", "a rabbit", 0, (), 64, 64)], setup)
        assert compare(pair.merged, pair.unfused).values["latents_l2"] < 1e-5
        by[name] = pair.unfused_by
    ours, theirs = by.values()
    assert ours.startswith("lora-fuse, for diffusers misreads norm_out.linear.weight")
    assert theirs == "diffusers"


def test_what_a_call_has_no_argument_for_is_refused() -> None:
    flux, wan = (pipelines()[name] for name in ("FluxPipeline", "WanPipeline"))
    with pytest.raises(RenderFailed, match="asks for 5 frames and FluxPipeline makes pictures"):
        check_case(flux, Case("case", "a", 0, (), 64, 64, 5))
    with pytest.raises(RenderFailed, match=r"'grey' and FluxPipeline takes none: .* to null"):
        check_sampling(flux, Sampling(2, 1.0, "grey"))
    with pytest.raises(RenderFailed, match="call_sigmas has 2 and the call of WanPipeline takes none"):
        check_sampling(wan, Sampling(2, 1.0, None, call_sigmas=(1.0, 0.5)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacings": "trailing"}, "has no 'timestep_spacings'"),
        ({"_class_name": "EulerScheduler"}, "has no EulerScheduler"),
    ],
)
def test_a_scheduler_of_unknown_class_or_settings_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(RenderFailed, match=words):
        make_scheduler(settings)
