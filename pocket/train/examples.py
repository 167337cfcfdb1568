"""Examples as tensors: latents of the pictures, and prompts through the pipelines' own encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.nn import functional

from pocket.train.autoencoder import encode, load_vae
from pocket.train.runtime import DEVICE, log

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pocket.train.pictures import Curriculum, Example

EMPTY = " "  # the negative prompt that the recipes give the pipelines


@dataclass(slots=True)
class Given:
    """What the transformer is given beside the noisy picture, for a batch of n examples.

    `conditions`: input pictures as tokens, each (n, tokens, 4 channels); `embeds` (n, words, width); `mask` (n, words).
    """

    conditions: list[torch.Tensor]
    embeds: torch.Tensor
    mask: torch.Tensor


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (n, c, h, w) to tokens (n, h/2 * w/2, 4 c), as the pipelines do."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, c * 4)


def latents(weights: dict[str, torch.Tensor], pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens of every picture at unit spread, and the mean and spread of each channel that make them so."""
    raw = encode(load_vae(weights), pictures)
    mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3))
    tokens = pack((raw - mean[:, None, None]) / std[:, None, None])
    return {"tokens": tokens.cpu(), "mean": mean.cpu(), "std": std.cpu()}


def normalized(
    weights: dict[str, torch.Tensor], pictures: torch.Tensor, scale: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Tokens of other pictures on the scale that `latents` found, on the device."""
    mean, std = (scale[key].to(DEVICE)[:, None, None] for key in ("mean", "std"))
    return pack((encode(load_vae(weights), pictures) - mean) / std)


@torch.no_grad()
def embed(pipes: dict[int, Any], chosen: Curriculum, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every example's prompt, and the empty one for the same input pictures.

    Args:
        pipes: a pipeline without transformer and VAE by the number of input pictures.
        chosen: the examples.
        pictures: uint8 (n, h, w, 3).
    """
    out: dict[str, torch.Tensor] = {}
    for name, examples in chosen.kinds().items():
        pipe = pipes[len(examples[0].inputs)]
        for kind in ("asked", "empty"):
            parts = [_embed(pipe, batch, pictures, kind) for batch in _batches(examples)]
            out |= {f"{name}.{kind}.{key}": value for key, value in _padded(parts).items()}
        out[f"{name}.inputs"] = torch.tensor([example.inputs for example in examples], dtype=torch.int64)
        log(f"embedded {len(examples)} {name}")
    return out


def _batches(examples: Sequence[Example]) -> Iterable[Sequence[Example]]:
    size = 1 if len(examples[0].inputs) > 1 else 128  # several pictures: the pipeline takes them as one prompt's
    return (examples[i : i + size] for i in range(0, len(examples), size))


def _embed(pipe: Any, batch: Sequence[Example], pictures: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = [example.prompt if kind == "asked" else EMPTY for example in batch]
    images = [Image.fromarray(pictures[i].numpy()) for example in batch for i in example.inputs]
    given = {"image": images} if images else {}
    embeds, mask = pipe._get_qwen_prompt_embeds(prompt=prompts, device=DEVICE, **given)
    return embeds.half().cpu(), mask.bool().cpu()


def _padded(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    longest = max(embeds.shape[1] for embeds, _ in parts)
    return {
        "embeds": torch.cat([functional.pad(e, (0, 0, 0, longest - e.shape[1])) for e, _ in parts]),
        "mask": torch.cat([functional.pad(m, (0, longest - m.shape[1])) for _, m in parts]),
    }


class Examples:
    """Examples of one kind on the device, drawn in batches."""

    def __init__(
        self, kind: str, chosen: Sequence[Example], tokens: torch.Tensor, data: dict[str, torch.Tensor]
    ) -> None:
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
