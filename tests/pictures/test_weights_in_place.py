"""Laws of the noise floor: weights are moved as rounding would move them, and nothing else is."""

import math

import pytest
import torch

from lora_fuse.errors import RenderFailed
from lora_fuse.pictures.weights_in_place import SHARE, jitter, loaded_names
from tests.tiny_models import texts

DTYPES = {"bfloat16": 7, "float16": 10, "float32": 23}  # and the bits after the point


class Small(torch.nn.Module):
    """Two layers; the second is never named."""

    def __init__(self, dtype: torch.dtype = torch.float32, stored: torch.dtype | None = None, size: int = 256) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = torch.nn.Linear(size, size)
        self.second = torch.nn.Linear(size, size)
        for parameter in self.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data = values.to(stored or dtype).to(dtype)


def moved(before: torch.Tensor, after: torch.Tensor, bits: int) -> torch.Tensor:
    """By how many ulps of that many bits each value moved, in float64; float16 has no finer ones below 2^-14."""
    exponent = torch.frexp(before.double()).exponent - 1
    if bits == DTYPES["float16"]:
        exponent = exponent.clamp(min=-14)
    return (after.double() - before.double()) / torch.exp2((exponent - bits).double())


@pytest.mark.parametrize("memory", DTYPES)
@pytest.mark.parametrize("disk", DTYPES)
def test_one_weight_in_twelve_moves_by_one_ulp_of_the_coarsest_dtype(memory: str, disk: str) -> None:
    coarsest = min((memory, disk), key=lambda name: DTYPES[name])
    kinds = [getattr(torch, name) for name in (memory, disk)]
    model = Small(kinds[0], stored=getattr(torch, coarsest))
    before = model.first.weight.detach().clone()
    jitter(model, ["first.weight"], kinds)
    steps = moved(before, model.first.weight.detach(), DTYPES[coarsest])
    assert set(steps.flatten().tolist()) == {-1.0, 0.0, 1.0}
    assert model.first.weight.dtype == kinds[0]
    share = float(steps.abs().mean())
    assert share == pytest.approx(SHARE, rel=0.05)
    assert float((steps > 0).double().mean()) == pytest.approx(share / 2, rel=0.08)


def test_the_variance_is_that_of_a_rounding() -> None:
    """Of rounding itself, not of the formula: float32 values to float16."""
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double()
    rounding = moved(values, values.half(), DTYPES["float16"]).square().mean()
    model = Small(torch.float32, torch.float16, 512)
    before = model.first.weight.detach().clone()
    jitter(model, ["first.weight"], [torch.float32, torch.float16])
    jittered = moved(before, model.first.weight.detach(), DTYPES["float16"]).square().mean()
    assert float(jittered) == pytest.approx(1 / 12, rel=0.05)
    assert float(jittered) == pytest.approx(float(rounding), rel=0.05)


def test_what_is_not_named_stays_as_it_is() -> None:
    model, same = Small(), Small()
    jitter(model, ["first.weight"], [torch.float32])
    assert not torch.equal(model.first.weight, same.first.weight)
    for name in ("first.bias", "second.weight", "second.bias"):
        assert torch.equal(model.get_parameter(name), same.get_parameter(name))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_weight_that_the_model_lacks_is_named_since_the_floor_would_be_too_low() -> None:
    with pytest.raises(RenderFailed, match=r"no third\.weight \(1 missing\)"):
        jitter(Small(), ["first.weight", "third.weight"], [torch.float32])


def test_the_same_seed_moves_the_same_weights_and_another_others() -> None:
    models = [Small(), Small(), Small()]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        jitter(model, ["first.weight", "second.weight"], [torch.float16], seed)
    first, again, other = (model.first.weight for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_two_weights_of_a_model_do_not_move_alike() -> None:
    model, before = Small(), Small()
    jitter(model, ["first.weight", "second.weight"], [torch.float16])
    steps = [moved(getattr(before, name).weight, getattr(model, name).weight, 10) for name in ("first", "second")]
    assert not torch.equal(*steps)


def test_a_weight_under_a_lora_of_peft_is_found_and_the_lora_s_stay() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["first"]), Small())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    jitter(model, ["first.weight", "second.weight"], [torch.float16])
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"first.base_layer.weight", "second.weight"}


@pytest.mark.parametrize("name", DTYPES)
def test_a_zero_moves_no_further_than_the_smallest_ulp(name: str) -> None:
    model, dtype = Small(), getattr(torch, name)
    model.first.weight.data.zero_()
    jitter(model, ["first.weight"], [torch.float32, dtype])
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    with torch.no_grad():
        assert 0 < float(model.first.weight.abs().max()) <= smallest
    assert math.isfinite(smallest)


def test_names_of_a_checkpoint_are_found_in_clip_as_it_is_loaded() -> None:
    """The name of one layer, as files have it with and without the prefix that one of both classes has in memory."""
    layer = "encoder.layers.0.self_attn.q_proj.weight"
    for projection in (False, True):
        model = texts.clip(projection=projection)
        for name in (layer, f"text_model.{layer}"):
            (found,) = loaded_names(model, {name: None})
            assert found in dict(model.named_parameters())
    assert loaded_names(model, {"text_projection.weight": 1}) == {"text_projection.weight": 1}
