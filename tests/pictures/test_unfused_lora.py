"""Laws of LoRAs beside a base: the model gives what it would give with the sums as its weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.fusion.plan import make_plan
from lora_fuse.lora import LoraInput
from lora_fuse.pictures.unfused_lora import attach_differences
from tests.support import tiny as small
from tests.support.original_names import differences, random_lora
from tests.tiny_models import call, tiny


@pytest.mark.parametrize("name", ["wan_22", "krea_2", "z_image"])
def test_modulations_norms_and_tokens_act_beside_the_base_as_in_it(name: str, tmp_path: Path) -> None:
    """A block is not linear in its modulation, nor are all norms in their weight."""
    folder = tiny(name, tmp_path / "pipe", dtype=torch.float32)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    base = {key: tensor.numpy() for key, tensor in pipe.transformer.state_dict().items()}
    keys, deltas = differences(base, "")
    factors, products = random_lora(base)
    small.write_lora(tmp_path / "l.safetensors", {**factors, **{key: part / 8 for key, part in keys.items()}})
    changes = {**products, **{key: part / 8 for key, part in deltas.items()}}

    def picture() -> np.ndarray:
        made = pipe(**call(name), generator=torch.Generator().manual_seed(1), output_type="latent")
        return np.asarray(made[0].detach() if isinstance(made[0], torch.Tensor) else made[0])

    plain = picture()
    plan = make_plan(open_checkpoint(folder), [LoraInput("l", tmp_path / "l.safetensors", 1.0)])
    hooks = attach_differences(pipe.transformer, plan.targets)
    beside = picture()
    for hook in hooks:
        hook.remove()
    np.testing.assert_array_equal(picture(), plain)
    sums = {key: torch.from_numpy(part + changes.get(key, 0.0)).float() for key, part in base.items()}
    pipe.transformer.load_state_dict(sums)
    merged = picture()
    np.testing.assert_allclose(beside, merged, rtol=0, atol=1e-4 * np.abs(merged).max())
    assert np.abs(beside - plain).max() > 0.1
