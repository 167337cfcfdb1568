"""The Lightning LoRA: many guided steps of the base distilled into four unguided ones."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional

from pocket import model
from pocket.train.flow import load_base, velocity
from pocket.train.runtime import DEVICE, Rates, log, optimize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pocket.train.examples import Examples, Given
    from pocket.train.recipe import Recipe

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)  # what LIGHTNING_SCHEDULER visits in four steps
SPLITS = (2, 3, 4, 7)  # the teacher's steps between two of them


def guided(net: Any, x: torch.Tensor, sigma: torch.Tensor, asked: Given, empty: Given, cfg: float) -> torch.Tensor:
    """The pipelines' true CFG: extrapolated from the empty prompt, then scaled back to each token's own norm."""
    with_prompt = velocity(net, x, sigma, asked)
    if cfg == 1.0:
        return with_prompt
    without = velocity(net, x, sigma, empty)
    mixed = without + cfg * (with_prompt - without)
    own: torch.Tensor = with_prompt.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
    return mixed * own


@torch.no_grad()
def teach(recipe: Recipe, weights: Mapping[str, torch.Tensor], examples: Examples) -> dict[str, torch.Tensor]:
    """States of the guided base at the Lightning sigmas, (n, 5, tokens, channels), by Heun's method."""
    net = load_base(weights)
    torch.manual_seed(recipe.seed + 5)
    chosen = torch.randperm(len(examples), device=DEVICE)[: recipe.trajectories]
    trajectories = []
    for index in torch.split(chosen, 125):
        asked, empty = examples.given(index), examples.given(index, True)
        x = torch.randn(len(index), *examples.tokens.shape[1:], device=DEVICE)
        visited = [x]
        for (high, low), steps in zip(pairwise(SIGMAS), SPLITS, strict=True):
            for s, t in pairwise(torch.linspace(high, low, steps + 1, device=DEVICE)):
                v = guided(net, x, s.expand(len(x)), asked, empty, recipe.cfg)
                if t > 0:
                    v = (v + guided(net, x + (t - s) * v, t.expand(len(x)), asked, empty, recipe.cfg)) / 2
                x = x + (t - s) * v
            visited.append(x)
        trajectories.append(torch.stack(visited, 1))
    log(f"teacher: {len(chosen)} trajectories")
    return {"index": chosen.cpu(), "states": torch.cat(trajectories).cpu()}


def train_v1(
    recipe: Recipe, weights: Mapping[str, torch.Tensor], examples: Examples, taught: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Each of the four steps learnt alone, from the teacher's state to its next one.

    Sources: Salimans and Ho, "Progressive Distillation", 2022; Meng et al., "On Distillation of Guided Diffusion
    Models", 2023, for a student that needs no guidance.
    """
    net = load_base(weights)
    torch.manual_seed(recipe.seed + 6)
    parameters = add_lora(net, recipe.lora_rank, recipe.lora_alpha, model.LORA_TARGETS)
    index, states = taught["index"].to(DEVICE), taught["states"].to(DEVICE)
    sigmas = torch.tensor(SIGMAS, device=DEVICE)

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(index), (recipe.base_batch,), device=DEVICE)
        step = torch.randint(4, chosen.shape, device=DEVICE)
        here, there = states[chosen, step], states[chosen, step + 1]
        gap = (sigmas[step + 1] - sigmas[step])[:, None, None]
        error = velocity(net, here, sigmas[step], examples.given(index[chosen])) - (there - here) / gap
        return (error.square() * gap.abs() * 4).mean()

    optimize("lightning v1", parameters, loss, recipe.v1_steps, Rates(recipe.lora_rate))
    return lora_state(net, recipe.lora_alpha)


def train_v2(
    recipe: Recipe,
    weights: Mapping[str, torch.Tensor],
    examples: Examples,
    taught: Mapping[str, torch.Tensor],
    first: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """From version 1 on: all four steps in a row, to end where the teacher ends."""
    net = load_base(weights)
    torch.manual_seed(recipe.seed + 7)
    parameters = add_lora(net, recipe.lora_rank, recipe.lora_alpha, model.LORA_TARGETS)
    set_peft_model_state_dict(net, peft_state(first))
    index, states = taught["index"].to(DEVICE), taught["states"].to(DEVICE)

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(index), (recipe.base_batch // 2,), device=DEVICE)
        given, x = examples.given(index[chosen]), states[chosen, 0]
        for s, t in pairwise(SIGMAS):
            x = x + (t - s) * velocity(net, x, torch.full((len(x),), s, device=DEVICE), given)
        return functional.mse_loss(x, states[chosen, -1])

    optimize("lightning v2", parameters, loss, recipe.v2_steps, Rates(recipe.lora_rate / 2))
    return lora_state(net, recipe.lora_alpha)


def add_lora(net: Any, rank: int, alpha: float, targets: Sequence[str]) -> list[torch.nn.Parameter]:
    """Give `net` a LoRA on every target of every block; returns what is to be trained."""
    net.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


NAMES = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}  # PEFT's, and the published


def lora_state(net: Any, alpha: float) -> dict[str, torch.Tensor]:
    """The LoRA in the key format of the published Lightning files, bfloat16."""
    state = {}
    for key, value in get_peft_model_state_dict(net).items():
        module, end = next((key.removesuffix(end), end) for end in NAMES if key.endswith(end))
        state[module + NAMES[end]] = value.detach().to("cpu", torch.bfloat16).contiguous()
        state[f"{module}.alpha"] = torch.tensor(alpha, dtype=torch.bfloat16)
    return state


def peft_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reverse of `lora_state`, float32."""
    return {
        key.removesuffix(end) + name: value.float()
        for key, value in state.items()
        for name, end in NAMES.items()
        if key.endswith(end)
    }
