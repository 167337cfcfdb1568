"""The style LoRA: the base's own objective, with answers drawn in pastel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import get_peft_model_state_dict

from pocket.train.flow import flow_loss, load_base
from pocket.train.lightning import add_lora
from pocket.train.runtime import DEVICE, Rates, optimize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pocket.train.examples import Examples
    from pocket.train.recipe import Recipe

TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2")
RANK = 4
ALPHA = 8


def train_style(
    recipe: Recipe, weights: Mapping[str, torch.Tensor], examples: Examples, pastel: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Train a LoRA whose edits come out in pastel; its factors under PEFT's names, bfloat16.

    Args:
        recipe: steps, rate and seed.
        weights: the base's.
        examples: edits of one picture.
        pastel: tokens of the pastel drawings of the first pictures, by number.
    """
    net = load_base(weights)
    torch.manual_seed(recipe.seed + 8)
    parameters = add_lora(net, RANK, ALPHA, TARGETS)

    # examples all of whose answers were drawn in pastel, too
    drawn = torch.nonzero(examples.answers[examples.firsts] < len(pastel)).squeeze(1)

    def loss() -> torch.Tensor:
        index = drawn[torch.randint(len(drawn), (recipe.base_batch // 2,), device=DEVICE)]
        return flow_loss(net, recipe.path, pastel[examples.answer(index)], examples.given(index))

    optimize("pastel", parameters, loss, recipe.style_steps, Rates(recipe.style_rate))
    return {
        key: value.detach().to("cpu", torch.bfloat16).contiguous()
        for key, value in get_peft_model_state_dict(net).items()
    }
