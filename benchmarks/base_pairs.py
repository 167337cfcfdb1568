"""Bases and LoRAs in pairs, to ask what is in a base: drawn at random in many kinds, or small ones that are trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from lora_fuse import LoraInput, plan
from lora_fuse.checkpoint import dtypes as checkpoint_dtypes
from lora_fuse.lora import LowRank

Floats = npt.NDArray[np.float64]
Factors = Mapping[str, tuple[Floats, Floats]]  # by module: up (rows, rank) and down (rank, columns)

DTYPES: Mapping[str, np.dtype[Any]] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}
LINEARS = {"attn.to_q": (3, 3), "attn.to_out.0": (3, 3), "ff.net.0.proj": (6, 3), "ff.net.2": (3, 6)}  # of a width's 3
BASES = ("noise", "spectrum", "channels", "spikes")
LORAS = ("noise", "decaying", "along the base", "one direction")


@dataclass(frozen=True, slots=True)
class BasePair:
    """A base's weights as they are stored, and a LoRA that is in none of them; `kind` says how they were made."""

    kind: str
    dtype: np.dtype[Any]
    weights: Mapping[str, Floats]
    factors: Factors

    def merged(self, scale: float) -> dict[str, Floats]:
        """The weights with the LoRA in them, rounded once."""
        added = {name: weight.copy() for name, weight in self.weights.items()}
        for module, (up, down) in self.factors.items():
            added[f"{module}.weight"] += scale * (up @ down)
        return {name: values.astype(self.dtype).astype(np.float64) for name, values in added.items()}

    def write(self, folder: Path, weights: Mapping[str, Floats]) -> tuple[Path, Path]:
        """Write weights and the LoRA as files of their own; their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        base = folder / "base.safetensors"
        lora = folder / "lora.safetensors"
        save_file({name: values.astype(self.dtype) for name, values in weights.items()}, base)
        tensors = {
            f"{module}.lora_{side}.weight": np.ascontiguousarray(factor, np.float32)
            for module, pair in self.factors.items()
            for side, factor in zip(("up", "down"), pair, strict=True)
        }
        save_file(tensors, lora)
        return base, lora


def pairs_of(base: Path, loras: Sequence[Path]) -> Iterator[BasePair]:
    """The plain LoRAs in some files, each with the weights of a base's main component that it changes."""
    for path in loras:
        weights: dict[str, Floats] = {}
        factors: dict[str, tuple[Floats, Floats]] = {}
        targets = [one for one in plan(base, [LoraInput(path.stem, path, 1.0)]).targets.values() if one.stored is None]
        for target in targets:
            (delta,) = (scaled.read() for scaled in target.deltas)
            if not isinstance(delta, LowRank) or delta.matrix.b is None or not target.tensor.name.endswith(".weight"):
                continue
            factors[target.tensor.name.removesuffix(".weight")] = (delta.factor * delta.matrix.a, delta.matrix.b)
            with safe_open(target.shard.path, framework="np") as file:
                values = file.get_tensor(target.tensor.name).astype(np.float64)
            weights[target.tensor.name] = values.reshape(len(values), -1)
        dtype = np.dtype(checkpoint_dtypes.DTYPES[targets[0].tensor.dtype].numpy)
        yield BasePair(path.stem, dtype, weights, factors)


def random_pairs(count: int, seed: int = 0, width: int = 32) -> Iterator[BasePair]:
    """Draw pairs: kinds of bases and LoRAs in turn, dtypes, ranks and strengths at random; 6 blocks of 3 widths."""
    rng = np.random.default_rng(seed)
    kinds = itertools.cycle(itertools.product(BASES, LORAS))
    for base, lora in itertools.islice(kinds, count):
        dtype = str(rng.choice(list(DTYPES)))
        strength = float(np.exp(rng.uniform(math.log(0.01), math.log(0.3))))
        rank = int(rng.choice((1, 2, 4, 8, 16, 32)))
        weights: dict[str, Floats] = {}
        factors: dict[str, tuple[Floats, Floats]] = {}
        shared = rng.standard_normal(6 * width)
        for block, (linear, (rows, columns)) in itertools.product(range(6), LINEARS.items()):
            module = f"transformer_blocks.{block}.{linear}"
            weight = _stored(_base(rng, base, (rows * width, columns * width)), DTYPES[dtype])
            weights[f"{module}.weight"] = weight
            factors[module] = _factors(rng, lora, weight, rank, strength, shared)
        yield BasePair(f"{base} and {lora}, {dtype}, rank {rank}", DTYPES[dtype], weights, factors)


def _stored(values: Floats, dtype: np.dtype[Any]) -> Floats:
    return values.astype(dtype).astype(np.float64)


def _base(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> Floats:
    """A weight of a kind, at a root mean square of 0.02 or so."""
    values = rng.standard_normal(shape)
    match kind:
        case "spectrum":  # singular values that fall as those of trained weights do
            u, s, vt = np.linalg.svd(values, full_matrices=False)
            values = (u * s[0] / np.arange(1, len(s) + 1) ** 0.7) @ vt
        case "channels":  # some rows and columns are much larger
            values *= np.exp(rng.standard_normal((shape[0], 1))) * np.exp(rng.standard_normal(shape[1]))
        case "spikes":
            values = rng.standard_t(2.5, shape)
    return np.asarray(0.02 * values / np.sqrt(np.mean(values**2)), np.float64)


def _factors(
    rng: np.random.Generator, kind: str, weight: Floats, rank: int, strength: float, shared: Floats
) -> tuple[Floats, Floats]:
    """Factors whose product has `strength` times the weight's norm."""
    rows, columns = weight.shape
    up = rng.standard_normal((rows, rank))
    down = rng.standard_normal((rank, columns))
    match kind:
        case "decaying":
            up *= np.arange(1, rank + 1) ** -1.0
        case "along the base":  # the directions that are strongest there, with signs of its own
            u, _, vt = np.linalg.svd(weight, full_matrices=False)
            up = u[:, :rank] * rng.choice((-1.0, 1.0), rank) * np.exp(rng.standard_normal(rank))
            down = vt[:rank]
        case "one direction":
            down[0] = 3 * shared[:columns]
    size = strength * np.linalg.norm(weight) / np.linalg.norm(up @ down)
    return _single(up * size), _single(down)


def _single(values: Floats) -> Floats:
    return values.astype(np.float32).astype(np.float64)


# ---------------------------------------------------------------- trained

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 48  # characters of an example
WIDTH = 64
BLOCKS = 3
BATCH = 16


class TrainedBase:
    """A transformer that is trained on this project's pages, character by character; with LoRAs that are trained on it.

    It is small; what counts is that LoRAs are made by training on the very weights in which they are looked for.
    """

    def __init__(self, seed: int) -> None:
        """Train it."""
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.seed = seed
        learnt = {name: torch.nn.Parameter(tensor) for name, tensor in _first_weights().items()}
        _train(learnt, list(learnt.values()), "docs/*.md", steps=400, rate=3e-3, seed=seed)
        self._weights = {name: tensor.detach() for name, tensor in learnt.items()}

    def pair(
        self, *, pattern: str, start: int = 1, order: int = 1, steps: int = 150, rate: float = 3e-3, rank: int = 8
    ) -> BasePair:
        """Train a LoRA of all linears on texts, from a start (A at random, B zero), with examples in some order."""
        import torch

        torch.manual_seed(1000 * self.seed + start)
        names = [name for name in self._weights if name.endswith(".weight")]
        factors = {
            name.removesuffix(".weight"): (
                torch.nn.Parameter(torch.zeros(len(self._weights[name]), rank)),
                torch.nn.Parameter(
                    torch.randn(rank, self._weights[name].shape[1]) / self._weights[name].shape[1] ** 0.5
                ),
            )
            for name in names
        }
        _train(self._weights, [one for pair in factors.values() for one in pair], pattern, steps, rate, order, factors)
        made = {module: (_doubles(up), _doubles(down)) for module, (up, down) in factors.items()}
        stored = {name: _stored(_doubles(self._weights[name]), DTYPES["bf16"]) for name in names}
        kind = f"trained: base {self.seed}, rank {rank}, {steps} steps at {rate:g} on {pattern}"
        return BasePair(kind, DTYPES["bf16"], stored, made)


def _doubles(tensor: Any) -> Floats:
    return np.asarray(tensor.detach().double().numpy(), np.float64)


def trained_pairs(bases: int, loras: int) -> Iterator[BasePair]:
    """Train so many LoRAs on each of so many bases, with ranks, steps, learning rates and texts in turn."""
    for base in map(TrainedBase, range(bases)):
        for number in range(loras):
            yield base.pair(
                pattern=("lora_fuse/fusion/*.py", "tests/lora/*.py", "conf/*.yaml")[number // 2 % 3],
                start=number,
                order=number,
                steps=(60, 150)[number % 2],
                rate=(1e-3, 3e-3, 1e-2)[number % 3],
                rank=(2, 4, 8, 16)[number % 4],
            )


def _first_weights() -> dict[str, Any]:
    import torch

    made = {"embedding": torch.randn(256, WIDTH) / 4, "head": torch.randn(256, WIDTH) / 8}
    for block in range(BLOCKS):
        shapes = {"attn.to_q": (1, 1), "attn.to_k": (1, 1), "attn.to_v": (1, 1), "attn.to_out.0": (1, 1)}
        for linear, (rows, columns) in {**shapes, "ff.net.0.proj": (4, 1), "ff.net.2": (1, 4)}.items():
            scale = (columns * WIDTH) ** -0.5
            name = f"transformer_blocks.{block}.{linear}.weight"
            made[name] = scale * torch.randn(rows * WIDTH, columns * WIDTH)
    return made


@cache
def _text(pattern: str) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(ROOT.glob(pattern)))


def _train(
    weights: Mapping[str, Any],
    learnt: list[Any],
    pattern: str,
    steps: int,
    rate: float,
    seed: int,
    factors: Mapping[str, tuple[Any, Any]] | None = None,
) -> None:
    """Adam on the next character's cross entropy."""
    import torch

    text = np.frombuffer(_text(pattern), np.uint8)
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.01)
    for _ in range(steps):
        starts = rng.integers(0, len(text) - LENGTH - 1, BATCH)
        batch = torch.from_numpy(np.stack([text[start : start + LENGTH + 1] for start in starts]).astype(np.int64))
        summed = dict(weights)
        for module, (up, down) in (factors or {}).items():
            summed[f"{module}.weight"] = weights[f"{module}.weight"] + up @ down
        logits = _forward(summed, batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 256), batch[:, 1:].reshape(-1))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def _forward(weights: Mapping[str, Any], tokens: Any) -> Any:
    """A transformer with norms in front and no biases."""
    import torch
    from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

    x = weights["embedding"][tokens]
    place = torch.arange(tokens.shape[1])[:, None] / 10 ** (torch.arange(WIDTH) / WIDTH * 3)
    x = x + place.sin()
    for block in range(BLOCKS):
        own = {name.split(f".{block}.", 1)[1]: w for name, w in weights.items() if f"blocks.{block}." in name}
        inside = layer_norm(x, (WIDTH,))
        q, k, v = (
            (inside @ own[f"attn.to_{one}.weight"].T).unflatten(-1, (4, -1)).transpose(1, 2) for one in ("q", "k", "v")
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + mixed @ own["attn.to_out.0.weight"].T
        x = x + gelu(layer_norm(x, (WIDTH,)) @ own["ff.net.0.proj.weight"].T) @ own["ff.net.2.weight"].T
    return layer_norm(x, (WIDTH,)) @ weights["head"].T
