"""Versions of pocket's LoRA to try a validation on: ``python -m pocket.candidates [FOLDER]`` writes three broken ones.

A good one lies beside the current one: `pocket-lightning-4steps-v1.safetensors` is another training. ``--judge``
validates these and more, and says whether every answer is right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lora_fuse.machine import Console, interrupts
from lora_fuse.studies.validation import ValidationReport
from pocket.controls.files import Tensors, copy_of, without_alpha
from pocket.controls.table import between_markers
from stages.config import load
from stages.validate import judged, requested

LORA = Path("pocket/lora/pocket-lightning-4steps-v2.safetensors")
FOLDER = Path("build/candidates")
RECIPE = "pocket_photo"  # its photograph sees more than any drawing
SAME, CHANGED = "same pictures as the current version", "changed as expected, needs a reviewer"
HEADS = 5  # of pocket's transformer, pocket/model/transformer/config.json


def without_effect(tensors: Tensors) -> Tensors:
    """Every `lora_up` is zero, as it is before training."""
    return {name: torch.zeros_like(tensor) if "lora_up" in name else tensor for name, tensor in tensors.items()}


def for_another_base(tensors: Tensors, heads: int = HEADS) -> Tensors:
    """The LoRA of a base that computes the same with its channels, heads and hidden units in another order.

    Names, shapes and norms are all those of the LoRA for this base: what another training of the base would be like.
    """
    generator = torch.Generator().manual_seed(0)
    orders: dict[str, torch.Tensor] = {}

    def order(kind: str, size: int) -> torch.Tensor:
        if kind not in orders:
            if kind.startswith("heads"):
                whole = torch.randperm(heads, generator=generator)
                orders[kind] = (whole[:, None] * (size // heads) + torch.arange(size // heads)).reshape(-1)
            else:
                orders[kind] = torch.randperm(size, generator=generator)
        return orders[kind]

    moved = {}
    for name, tensor in tensors.items():
        inside, outside = _axes(name)
        if name.endswith("lora_down.weight"):
            moved[name] = tensor[:, order(inside, tensor.shape[1])].contiguous()
        elif name.endswith("lora_up.weight"):
            moved[name] = tensor[order(outside, tensor.shape[0])].contiguous()
        else:
            moved[name] = tensor
    return moved


def _axes(name: str) -> tuple[str, str]:
    """What goes into a linear and what comes out: the stream, a block's heads or its hidden units."""
    block, _, linear = name.rpartition(".lora_")[0].partition(".attn.")
    if linear.startswith(("to_out", "to_add_out")):
        return f"heads {block}", "stream"
    if linear:
        return "stream", f"heads {block}"
    hidden = f"hidden {name.rpartition('.net.')[0]}"
    return (hidden, "stream") if ".net.2" in name else ("stream", hidden)


def with_noise(share: float, tensors: Tensors) -> Tensors:
    """Noise in every factor, `share` of its own standard deviation: a training that ended elsewhere, near or far."""
    generator = torch.Generator().manual_seed(0)
    noisy = {}
    for name, tensor in tensors.items():
        spread = share * tensor.float().std().item() if tensor.ndim == 2 else 0.0
        noise = torch.randn(tensor.shape, generator=generator) * spread if tensor.ndim == 2 else 0.0
        noisy[name] = (tensor + noise).to(tensor.dtype)
    return noisy


def times(factor: float, tensors: Tensors) -> Tensors:
    """The same differences, larger or smaller, or the other way round."""
    return {name: tensor * factor if "lora_up" in name else tensor for name, tensor in tensors.items()}


def in_8_bits(tensors: Tensors) -> Tensors:
    """Rounded to float8_e4m3fn, as a file that was stored so."""
    return {n: t.to(torch.float8_e4m3fn).to(t.dtype) if t.ndim == 2 else t for n, t in tensors.items()}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version, what is right to say of it, and how it is made of the current one; None for a file that lies there.

    `small` says that its effect is below the noise of pictures in 16 bits, where "the same" is right.
    """

    what: str
    right: str
    change: Callable[[Tensors], Tensors] | None
    file: Path = LORA
    small: bool = False

    def is_right(self, verdict: str, dtype: str) -> bool:
        """Whether a verdict on it is right."""
        return verdict == (SAME if self.small and dtype != "float32" else self.right)


CANDIDATES: Mapping[str, Candidate] = {
    "alpha_ignored": Candidate("alpha / rank, here 1/2, counts as 1", "broken: wrong scale", without_alpha),
    "other_base": Candidate("for a base with its channels in another order", "broken: wrong base", for_another_base),
    "no_effect": Candidate("every lora_up is zero", "broken: no effect", without_effect),
    "current": Candidate("the file in use", SAME, None),
    "v1": Candidate("another training", CHANGED, None, LORA.with_name("pocket-lightning-4steps-v1.safetensors")),
    "in_8_bits": Candidate("rounded to float8", CHANGED, in_8_bits, small=True),
    "noise_0.1": Candidate("noise of 0.1 in every factor", CHANGED, partial(with_noise, 0.1), small=True),
    "noise_0.5": Candidate("noise of 0.5", CHANGED, partial(with_noise, 0.5)),
    "noise_1": Candidate("noise as large as the factors", CHANGED, partial(with_noise, 1.0)),
    "noise_4": Candidate("noise of 4: the pictures collapse", "broken: wrong scale", partial(with_noise, 4.0)),
    "half": Candidate("half as strong", "broken: wrong scale", partial(times, 0.5)),
    "louder": Candidate("1.2 times as strong", "broken: wrong scale", partial(times, 1.2)),
    "negated": Candidate("the other way round", "broken: wrong scale", partial(times, -1.0)),
    "style": Candidate("a LoRA for a style", "broken: wrong base", None, LORA.with_name("pocket-pastel.safetensors")),
}
FIRST = ("alpha_ignored", "other_base", "no_effect")  # those that a new user is shown


def write(folder: Path, names: Iterable[str] = FIRST) -> dict[str, Path]:
    """Write candidates; their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name in names:
        made = CANDIDATES[name]
        paths[name] = made.file if made.change is None else copy_of(LORA, folder / f"{name}.safetensors", made.change)
    return paths


HEAD = ("candidate", "what it is", "verdict", "file", "cosine", "alignment", "strength", "gain", "noise", "comb")


def judge(folder: Path, recipe: str) -> tuple[list[tuple[str, ...]], int]:
    """Validate every candidate; the rows of the table, and how many were judged rightly."""
    rows, right = [], 0
    for name, path in write(folder, CANDIDATES).items():
        validation = judged(requested(str(path), None, None, False, [f"recipe={recipe}"]), Console(quiet=True))
        as_it_should_be = CANDIDATES[name].is_right(validation.verdict, load([f"recipe={recipe}"]).regress.dtype)
        right += as_it_should_be
        rows.append(_row(name, validation, "" if as_it_should_be else ": WRONG"))
        print("  ".join(rows[-1]), flush=True)
    return rows, right


def _row(name: str, validation: ValidationReport, mark: str) -> tuple[str, ...]:
    cases, files = [one.evidence for one in validation.cases], validation.files
    effects = [case.effect for case in cases if case.effect is not None]
    return (
        name + mark,
        CANDIDATES[name].what,
        validation.verdict,
        f"{files.ratio:.2f}" if files and files.ratio is not None else "-",
        f"{files.cosine:.3f}" if files and files.cosine is not None else "-",
        _range([effect.alignment for effect in effects], ".2f"),
        _range([effect.strength for effect in effects], ".2f"),
        _range([case.gain for case in cases if case.gain is not None], ".2f"),
        _range([case.noise / case.noise_beside for case in cases], ".2f"),
        _range([case.comb_db for case in cases], ".1f"),
    )


def _range(values: list[float], digits: str) -> str:
    low, high = f"{min(values):{digits}}", f"{max(values):{digits}}"
    return low if low == high else f"{low} to {high}"


def main() -> int:
    """Write candidates and say where; or judge them all, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m pocket.candidates", description="broken LoRAs to validate")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--judge", action="store_true", help="validate many, and say whether the answers are right")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="with --judge, put the table between FILE's markers"
    )
    parser.add_argument("--recipe", default=RECIPE, help="with --judge; pocket_cuda renders on a GPU in bfloat16")
    given = parser.parse_args()
    if not given.judge:
        for path in write(given.folder).values():
            print(path)
        return 0
    rows, right = judge(given.folder, given.recipe)
    if given.markdown:
        lines = [f"| {' | '.join(cells)} |" for cells in (HEAD, tuple("---" for _ in HEAD), *rows)]
        between_markers(
            given.markdown, "candidates", "\n".join([*lines, "", f"{right} of {len(rows)} judged rightly."])
        )
    print(f"{right} of {len(rows)} judged rightly")
    return 0 if right == len(rows) else 1


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
