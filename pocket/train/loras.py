"""The LoRAs: Lightning, many guided steps of the base distilled into four unguided ones; and a style."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional

from pocket import LORA_TARGETS
from pocket.train.examples import Examples, Given
from pocket.train.flow import flow_loss, load_base, velocity
from pocket.train.recipe import Recipe
from pocket.train.runtime import DEVICE, Rates, Tensors, log, optimize

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)  # the Lightning scheduler's in four steps
SPLITS = (2, 3, 4, 7)  # the teacher's steps between two of them
PUBLISHED = {"A.weight": "down.weight", "B.weight": "up.weight"}  # names of the factors, by PEFT's

STYLE_TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2")
STYLE_RANK = 4
STYLE_ALPHA = 8


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
def teach(recipe: Recipe, weights: Tensors, examples: Examples) -> Tensors:
    """States of the guided base at the Lightning sigmas, (n, 5, tokens, channels), by Heun's method."""
    net = load_base(weights)
    torch.manual_seed(recipe.seed + 5)
    chosen = torch.randperm(len(examples), device=DEVICE)[: recipe.trajectories]
    trajectories = []
    for index in torch.split(chosen, 125):
        asked = examples.given(index)
        empty = examples.given(index, True)
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


def train_v1(recipe: Recipe, weights: Tensors, examples: Examples, taught: Tensors) -> Tensors:
    """Learn each of the four steps alone, from the teacher's state to its next one.

    Sources: Salimans and Ho, "Progressive Distillation", 2022; Meng et al., "On Distillation of Guided Diffusion
    Models", 2023, for a student that needs no guidance.
    """
    net = load_base(weights)
    torch.manual_seed(recipe.seed + 6)
    parameters = add_lora(net, recipe.lora_rank, recipe.lora_alpha, LORA_TARGETS)
    index = taught["index"].to(DEVICE)
    states = taught["states"].to(DEVICE)
    sigmas = torch.tensor(SIGMAS, device=DEVICE)

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(index), (recipe.base_batch,), device=DEVICE)
        step = torch.randint(4, chosen.shape, device=DEVICE)
        here = states[chosen, step]
        there = states[chosen, step + 1]
        gap = (sigmas[step + 1] - sigmas[step])[:, None, None]
        error = velocity(net, here, sigmas[step], examples.given(index[chosen])) - (there - here) / gap
        return (error.square() * gap.abs() * 4).mean()

    optimize("lightning v1", parameters, loss, recipe.v1_steps, Rates(recipe.lora_rate))
    return lora_state(net, recipe.lora_alpha)


def train_v2(recipe: Recipe, weights: Tensors, examples: Examples, taught: Tensors, first: Tensors) -> Tensors:
    """Train version 1 on: all four steps in a row, to end where the teacher ends."""
    net = load_base(weights)
    torch.manual_seed(recipe.seed + 7)
    parameters = add_lora(net, recipe.lora_rank, recipe.lora_alpha, LORA_TARGETS)
    set_peft_model_state_dict(net, peft_state(first))
    index = taught["index"].to(DEVICE)
    states = taught["states"].to(DEVICE)

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(index), (recipe.base_batch // 2,), device=DEVICE)
        given = examples.given(index[chosen])
        x = states[chosen, 0]
        for s, t in pairwise(SIGMAS):
            x = x + (t - s) * velocity(net, x, torch.full((len(x),), s, device=DEVICE), given)
        return functional.mse_loss(x, states[chosen, -1])

    optimize("lightning v2", parameters, loss, recipe.v2_steps, Rates(recipe.lora_rate / 2))
    return lora_state(net, recipe.lora_alpha)


def train_style(recipe: Recipe, weights: Tensors, examples: Examples, pastel: torch.Tensor) -> Tensors:
    """Train a LoRA by the base's own objective, with answers in pastel; its factors under PEFT's names, bfloat16.

    `pastel` are the tokens of the pastel drawings of the first pictures, by number.
    """
    net = load_base(weights)
    torch.manual_seed(recipe.seed + 8)
    parameters = add_lora(net, STYLE_RANK, STYLE_ALPHA, STYLE_TARGETS)

    # examples all of whose answers were drawn in pastel, too
    drawn = torch.nonzero(examples.answers[examples.firsts] < len(pastel)).squeeze(1)

    def loss() -> torch.Tensor:
        index = drawn[torch.randint(len(drawn), (recipe.base_batch // 2,), device=DEVICE)]
        return flow_loss(net, recipe.path, pastel[examples.answer(index)], examples.given(index))

    optimize("pastel", parameters, loss, recipe.style_steps, Rates(recipe.style_rate))
    return _factors(net)


def add_lora(net: Any, rank: int, alpha: float, targets: Sequence[str]) -> list[torch.nn.Parameter]:
    """Give `net` a LoRA on every target of every block; returns its parameters, which are to be trained."""
    net.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _factors(net: Any) -> Tensors:
    state = get_peft_model_state_dict(net)
    return {key: value.detach().to("cpu", torch.bfloat16).contiguous() for key, value in state.items()}


def lora_state(net: Any, alpha: float) -> Tensors:
    """The LoRA in the key format of the published Lightning files, bfloat16."""
    state = {}
    for key, value in _factors(net).items():
        module, _, factor = key.rpartition(".lora_")
        state[f"{module}.lora_{PUBLISHED[factor]}"] = value
        state[f"{module}.alpha"] = torch.tensor(alpha, dtype=torch.bfloat16)
    return state


def peft_state(state: Tensors) -> Tensors:
    """The reverse of `lora_state`, float32."""
    of_peft = {published: factor for factor, published in PUBLISHED.items()}
    split = {key: key.rpartition(".lora_") for key in state if not key.endswith(".alpha")}
    return {f"{module}.lora_{of_peft[factor]}": state[key].float() for key, (module, _, factor) in split.items()}
