"""Examples: pictures and prompts that are chosen by the recipe, then their latents and embeddings as tensors."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from lora_fuse.pictures import render
from pocket import SIDE, scenes
from pocket.train import model
from pocket.train.autoencoder import encode, load_vae
from pocket.train.recipe import Recipe
from pocket.train.runtime import DEVICE, Tensors, log

EMPTY = " "  # the negative prompt that the recipes give the pipelines


@dataclass(frozen=True, slots=True)
class Example:
    """Input pictures, a prompt, and the pictures that answer it."""

    inputs: tuple[int, ...]
    prompt: str
    answers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Curriculum:
    """All scenes, and the examples by kind: `edits` of one input picture, `pairs` of two, `texts` of none."""

    records: list[scenes.Scene]
    kinds: dict[str, list[Example]]


def curriculum(recipe: Recipe) -> Curriculum:
    """Choose scenes and examples; a function of the recipe alone."""
    rng = random.Random(recipe.seed + 1)
    records = [scene for _ in range(recipe.families) for scene in scenes.family(rng, recipe.members)]
    edits = []
    for first in range(0, len(records), recipe.members):
        found = _edits(records[first : first + recipe.members], first)
        edits += rng.sample(found, min(len(found), recipe.edits // recipe.families))
    texts = defaultdict(list)
    for number, scene in enumerate(records):
        if not scene.night:
            texts[scenes.caption(scene)].append(number)
    pairs = []
    for _ in range(recipe.pairs):
        # the hat's where there is one
        for transfer in scenes.transfers(scenes.random_scene(rng), scenes.random_scene(rng))[-1:]:
            pairs.append(Example((len(records), len(records) + 1), transfer.prompt, (len(records) + 2,)))
            records += [transfer.first, transfer.second, transfer.answer]
    of_text = [Example((), prompt, tuple(numbers)) for prompt, numbers in texts.items()]
    return Curriculum(records, {"edits": edits, "pairs": pairs, "texts": of_text})


def _edits(members: Sequence[scenes.Scene], offset: int) -> list[Example]:
    """Every (picture, prompt, picture) of a family in which the last rightly answers the prompt about the first."""
    return [
        Example((offset + i,), asked.prompt, (offset + j,))
        for (i, start), (j, end) in permutations(enumerate(members), 2)
        for asked in scenes.instructions(start)
        if end in scenes.answers(start, asked)
    ]


def draw_all(records: Sequence[scenes.Scene], style: scenes.Style = "plain") -> torch.Tensor:
    """The drawings, uint8 (n, SIDE, SIDE, 3), by as many processes as there are cores."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return torch.from_numpy(np.stack(list(pool.map(partial(_pixels, style=style), records, chunksize=64))))


def _pixels(scene: scenes.Scene, style: scenes.Style) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(scenes.draw(scene, SIDE, style))


@dataclass(slots=True)
class Given:
    """Inputs of the transformer beside the noisy picture, for a batch of n examples."""

    conditions: list[torch.Tensor]  # input pictures as tokens, each (n, tokens, 4 channels)
    embeds: torch.Tensor  # (n, words, width)
    mask: torch.Tensor  # (n, words)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (n, c, h, w) to tokens (n, h/2 * w/2, 4 c), as the pipelines do."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, c * 4)


def latents(weights: Tensors, pictures: torch.Tensor) -> Tensors:
    """Tokens of every picture at unit spread, and the mean and spread of each channel that make them so."""
    raw = encode(load_vae(weights), pictures)
    mean = raw.mean((0, 2, 3))
    std = raw.std((0, 2, 3))
    tokens = pack((raw - mean[:, None, None]) / std[:, None, None])
    return {"tokens": tokens.cpu(), "mean": mean.cpu(), "std": std.cpu()}


def normalized(weights: Tensors, pictures: torch.Tensor, scale: Tensors) -> torch.Tensor:
    """Tokens of other pictures on the scale that `latents` found, on the device."""
    mean, std = (scale[key].to(DEVICE)[:, None, None] for key in ("mean", "std"))
    return pack((encode(load_vae(weights), pictures) - mean) / std)


def encoders(folder: Path) -> dict[int, Any]:
    """The pipelines without transformer and VAE, which encode prompts, by the number of their input pictures.

    They are loaded from a repository that is written to `folder` first.
    """
    render.quiet_libraries()
    render.allow_missing_torchvision()
    model.save_frame(folder)
    parts = {"transformer": None, "vae": None, "dtype": torch.float32, "local_files_only": True}
    pipelines = zip((1, 2, 0), model.PIPELINES, strict=True)
    return {count: pipeline.from_pretrained(folder, **parts).to(DEVICE) for count, pipeline in pipelines}


@torch.no_grad()
def embed(pipes: dict[int, Any], chosen: Curriculum, pictures: torch.Tensor) -> Tensors:
    """Every example's prompt by the `encoders`, and the empty one for the same input pictures, uint8 (n, h, w, 3)."""
    out: Tensors = {}
    for name, examples in chosen.kinds.items():
        inputs = len(examples[0].inputs)
        pipe = pipes[inputs]
        size = 1 if inputs > 1 else 128  # several pictures: the pipeline takes them as one prompt's
        for kind in ("asked", "empty"):
            parts = [_embed(pipe, examples[i : i + size], pictures, kind) for i in range(0, len(examples), size)]
            out |= {f"{name}.{kind}.{key}": value for key, value in _padded(parts).items()}
        out[f"{name}.inputs"] = torch.tensor([example.inputs for example in examples], dtype=torch.int64)
        log(f"embedded {len(examples)} {name}")
    return out


def _embed(pipe: Any, batch: Sequence[Example], pictures: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = [example.prompt if kind == "asked" else EMPTY for example in batch]
    images = [Image.fromarray(pictures[i].numpy()) for example in batch for i in example.inputs]
    given = {"image": images} if images else {}
    embeds, mask = pipe._get_qwen_prompt_embeds(prompt=prompts, device=DEVICE, **given)
    return embeds.half().cpu(), mask.bool().cpu()


def _padded(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    longest = max(embeds.shape[1] for embeds, _ in parts)
    return {
        "embeds": torch.cat([functional.pad(e, (0, 0, 0, longest - e.shape[1])) for e, _ in parts]),
        "mask": torch.cat([functional.pad(m, (0, longest - m.shape[1])) for _, m in parts]),
    }


class Examples:
    """Examples of one kind on the device, drawn in batches."""

    def __init__(self, kind: str, chosen: Sequence[Example], tokens: torch.Tensor, data: Tensors) -> None:
        self.tokens = tokens
        self.inputs = data[f"{kind}.inputs"].to(DEVICE)
        width = data[f"{kind}.asked.embeds"].shape[1]  # the empty prompt is the shortest
        self.text = {
            key: tuple(_widened(data[f"{kind}.{key}.{part}"].to(DEVICE), width) for part in ("embeds", "mask"))
            for key in ("asked", "empty")
        }
        counts = [len(example.answers) for example in chosen]
        self.counts = torch.tensor(counts, device=DEVICE)
        self.firsts = self.counts.cumsum(0) - self.counts
        self.answers = torch.tensor([i for example in chosen for i in example.answers], device=DEVICE)

    def __len__(self) -> int:
        return len(self.counts)

    def draw(self, n: int) -> torch.Tensor:
        """N random examples."""
        return torch.randint(len(self), (n,), device=DEVICE)

    def answer(self, index: torch.Tensor) -> torch.Tensor:
        """The number of a right answer's picture for each example, at random where there are several."""
        step = (torch.rand(len(index), device=DEVICE) * self.counts[index]).long()
        return self.answers[self.firsts[index] + step]

    def given(self, index: torch.Tensor, empty: torch.Tensor | bool = False) -> Given:
        """Input pictures and prompts; the empty prompt where `empty`."""
        conditions = [self.tokens[column] for column in self.inputs[index].unbind(1)]
        without = torch.as_tensor(empty, device=DEVICE).expand(len(index))
        pairs = zip(self.text["asked"], self.text["empty"], strict=True)
        embeds, mask = (torch.where(without.view(-1, *[1] * (a.ndim - 1)), e[index], a[index]) for a, e in pairs)
        return Given(conditions, embeds.float(), mask)


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    return functional.pad(x, (0, 0) * (x.ndim - 2) + (0, width - x.shape[1]))
