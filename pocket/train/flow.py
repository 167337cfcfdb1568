"""The base: rectified flow from noise to the answer's latents, given pictures and prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain, cycle, repeat
from typing import Any

import torch
from torch.nn import functional

from pocket.train import model
from pocket.train.examples import Examples, Given
from pocket.train.recipe import Recipe
from pocket.train.runtime import DEVICE, Rates, Tensors, captured, optimize

# The examples of each step in turn: eight in ten edit one picture.
CYCLE = (*["edits"] * 4, "pairs", *["edits"] * 4, "texts")


def velocity(net: Any, x: torch.Tensor, sigma: torch.Tensor, given: Given) -> torch.Tensor:
    """The transformer's output for the tokens of the noisy picture `x`, called as the pipelines call it."""
    side = math.isqrt(x.shape[1])
    out: torch.Tensor = net(
        hidden_states=torch.cat([x, *given.conditions], 1),
        timestep=sigma,
        encoder_hidden_states=given.embeds,
        encoder_hidden_states_mask=given.mask,
        img_shapes=[[(1, side, side)] * (1 + len(given.conditions))] * len(x),
        return_dict=False,
    )[0]
    return out[:, : x.shape[1]]


def on_path(
    path: str, answer: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """State and velocity at `sigma`.

    ``straight``: rectified flow (Liu, Gong and Liu, 2022), the objective of Qwen-Image. ``curved``: a quarter circle
    from the same noise to the same picture, along which few Euler steps overshoot.
    """
    if path == "straight":
        return (1 - sigma) * answer + sigma * noise, noise - answer
    a = torch.cos(sigma * math.pi / 2)
    b = torch.sin(sigma * math.pi / 2)
    return a * answer + b * noise, (a * noise - b * answer) * math.pi / 2


def flow_loss(net: Any, path: str, answer: torch.Tensor, given: Given) -> torch.Tensor:
    """Mean squared error of the velocity at random sigmas."""
    u = torch.rand(len(answer), device=DEVICE)
    sigma = 2 * u / (1 + u)  # shift 2: more of the noisy end, where the answer is decided
    x, target = on_path(path, answer, torch.randn_like(answer), sigma[:, None, None])
    return functional.mse_loss(velocity(net, x, sigma, given), target)


def train_base(recipe: Recipe, examples: Mapping[str, Examples]) -> Tensors:
    """Train the transformer; returns the moving average of its weights.

    As in data found in the wild, a share of the prompts is wrong, and another share is left out. So the base needs
    guidance by the empty prompt (Ho and Salimans, 2022) to do what a prompt says.
    """
    torch.manual_seed(recipe.seed + 4)
    net = model.transformer().to(DEVICE)
    runs = {"edits": captured(net)}  # a compilation takes longer than the other kinds' steps
    kinds = cycle(CYCLE)
    paths = chain(repeat("straight", round(recipe.base_steps * recipe.straight)), repeat(recipe.path))

    def loss() -> torch.Tensor:
        kind = next(kinds)
        chosen = examples[kind]
        index = chosen.draw(recipe.base_batch)
        u = torch.rand(len(index), device=DEVICE)
        answer = _some_wrong(recipe, chosen, index, u < recipe.wrong)
        given = chosen.given(index, u > 1 - recipe.dropped)
        return flow_loss(runs.get(kind, net), next(paths), chosen.tokens[answer], given)

    rates = Rates(recipe.base_rate, decay=0.01, matrix=recipe.matrix_rate, average=0.998)
    optimize("base", list(net.parameters()), loss, recipe.base_steps, rates)
    return {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}


def _some_wrong(recipe: Recipe, chosen: Examples, index: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """Numbers of the answers; where `wrong`, another edit of the same scene, or another prompt's picture."""
    right = chosen.answer(index)
    if chosen.inputs.shape[1] != 1:
        return torch.where(wrong, chosen.answer(chosen.draw(len(index))), right)
    first = right // recipe.members * recipe.members
    return torch.where(wrong, first + torch.randint(recipe.members, right.shape, device=DEVICE), right)


def load_base(weights: Tensors) -> Any:
    """The trained transformer, frozen."""
    net = model.transformer()
    net.load_state_dict(dict(weights))
    return net.to(DEVICE).requires_grad_(False)
