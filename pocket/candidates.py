"""Versions of pocket's LoRA to try a validation on: ``python -m pocket.candidates [FOLDER]`` writes three broken ones.

A good one lies beside the current one: `pocket-lightning-4steps-v1.safetensors` is another training. ``--judge``
validates these and more, and says whether every answer is right. ``--compare`` compares the files alone, in a moment.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lora_fuse.lora import LoraInput
from lora_fuse.machine import Console, interrupts
from lora_fuse.studies.validation import ValidationReport, compare_files
from pocket import LORAS
from pocket.controls.files import Tensors, copy_of, without_alpha
from pocket.controls.rig import RECIPE
from pocket.controls.table import between_markers, markdown
from stages.config import load
from stages.validate import judged, requested

LORA = Path("pocket/lora") / LORAS["v2"]
FOLDER = Path("build/candidates")
MODEL = Path("pocket/model")
SAME = "same pictures as the current version"
CHANGED = "changed as expected, needs a reviewer"
SCALE = "broken: wrong scale"
BASE = "broken: wrong base"
HEADS = 5  # of pocket's transformer, pocket/model/transformer/config.json


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
    """Input and output of a linear: the stream, a block's heads or its hidden units."""
    block, _, linear = name.rpartition(".lora_")[0].partition(".attn.")
    if linear.startswith(("to_out", "to_add_out")):
        return f"heads {block}", "stream"
    if linear:
        return "stream", f"heads {block}"
    hidden = f"hidden {name.rpartition('.net.')[0]}"
    return (hidden, "stream") if ".net.2" in name else ("stream", hidden)


def with_noise(share: float, tensors: Tensors) -> Tensors:
    """Add noise to every factor, `share` of its own standard deviation: a training that ended near, or far."""
    generator = torch.Generator().manual_seed(0)

    def noisy(factor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(factor.shape, generator=generator) * (share * factor.float().std().item())
        return (factor + noise).to(factor.dtype)

    return {name: noisy(tensor) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}


def times(factor: float, tensors: Tensors) -> Tensors:
    """Scale every `lora_up`: the same differences, larger or smaller, or the other way round; 0 is before training."""
    return {name: tensor * factor if "lora_up" in name else tensor for name, tensor in tensors.items()}


def in_8_bits(tensors: Tensors) -> Tensors:
    """Round to float8_e4m3fn, as a file that was stored so."""
    return {n: t.to(torch.float8_e4m3fn).to(t.dtype) if t.ndim == 2 else t for n, t in tensors.items()}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version and its right verdict; it is made of the current one by `change`, or is a `file` of pocket's.

    `small` says that its effect is below the noise of pictures in 16 bits, where "the same" is right.
    """

    what: str
    right: str
    change: Callable[[Tensors], Tensors] | None = None
    file: str = LORAS["v2"]
    small: bool = False

    def is_right(self, verdict: str, dtype: str) -> bool:
        """Compare a verdict on it with the right one."""
        return verdict == (SAME if self.small and dtype != "float32" else self.right)


CANDIDATES: Mapping[str, Candidate] = {
    "alpha_ignored": Candidate("alpha / rank, here 1/2, counts as 1", SCALE, without_alpha),
    "other_base": Candidate("for a base with its channels in another order", BASE, for_another_base),
    "no_effect": Candidate("every lora_up is zero", "broken: no effect", partial(times, 0.0)),
    "current": Candidate("the file in use", SAME),
    "v1": Candidate("another training", CHANGED, file=LORAS["v1"]),
    "in_8_bits": Candidate("rounded to float8", CHANGED, in_8_bits, small=True),
    "noise_0.1": Candidate("noise of 0.1 in every factor", CHANGED, partial(with_noise, 0.1), small=True),
    "noise_0.5": Candidate("noise of 0.5", CHANGED, partial(with_noise, 0.5)),
    "noise_1": Candidate("noise as large as the factors", CHANGED, partial(with_noise, 1.0)),
    "noise_4": Candidate("noise of 4: the pictures collapse", SCALE, partial(with_noise, 4.0)),
    "half": Candidate("half as strong", SCALE, partial(times, 0.5)),
    "louder": Candidate("1.2 times as strong", SCALE, partial(times, 1.2)),
    "negated": Candidate("the other way round", SCALE, partial(times, -1.0)),
    "style": Candidate("a LoRA for a style", "broken: another effect", file=LORAS["pastel"]),
}
FIRST = ("alpha_ignored", "other_base", "no_effect")  # those that a new user is shown


def write(folder: Path, names: Iterable[str] = FIRST) -> dict[str, Path]:
    """Write candidates; their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name in names:
        change = CANDIDATES[name].change
        there = LORA.with_name(CANDIDATES[name].file)
        paths[name] = copy_of(LORA, folder / f"{name}.safetensors", change) if change else there
    return paths


FILES = ("candidate", "what it is", "size", "cosine", "by block", "relation")
HEAD = ("candidate", "what it is", "verdict", "file", "cosine", "alignment", "strength", "gain", "noise", "comb")


def judge(folder: Path, recipe: str) -> tuple[list[tuple[str, ...]], int]:
    """Validate every candidate; the rows of the table, and how many were judged rightly."""
    dtype = load([f"recipe={recipe}"]).regress.dtype
    rows = []
    right = 0
    for name, path in write(folder, CANDIDATES).items():
        validation = judged(requested(str(path), None, None, False, [f"recipe={recipe}"]), Console(quiet=True))
        is_right = CANDIDATES[name].is_right(validation.verdict, dtype)
        right += is_right
        rows.append(_row(name, validation, "" if is_right else ": WRONG"))
        print("  ".join(rows[-1]), flush=True)
    return rows, right


def compare(folder: Path) -> list[tuple[str, ...]]:
    """Compare every candidate's file with the current one; the rows of the table."""
    rows: list[tuple[str, ...]] = []
    for name, path in write(folder, CANDIDATES).items():
        found = compare_files(LoraInput("lora", LORA, 1.0), LoraInput("lora", path, 1.0), MODEL)
        by_block = [block.cosine for block in found.blocks if block.cosine is not None]
        rows.append(
            (
                name,
                CANDIDATES[name].what,
                "-" if found.ratio is None else f"{found.ratio:.3f}",
                "-" if found.cosine is None else f"{found.cosine:.3f}",
                _range(by_block, ".3f") if by_block else "-",
                "-" if found.kinship is None else str(found.kinship),
            )
        )
    return rows


def _row(name: str, validation: ValidationReport, mark: str) -> tuple[str, ...]:
    files = validation.files
    cases = [judged.evidence for judged in validation.cases]
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
    return " to ".join(dict.fromkeys(f"{value:{digits}}" for value in (min(values), max(values))))


def main() -> int:
    """Write candidates and say where; or judge them all, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m pocket.candidates", description="broken LoRAs to validate")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--judge", action="store_true", help="validate many, and say whether the answers are right")
    parser.add_argument("--compare", action="store_true", help="compare the files of the same, without pictures")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table between FILE's markers")
    parser.add_argument("--recipe", default=RECIPE, help="with --judge; pocket_cuda renders on a GPU in bfloat16")
    options = parser.parse_args()
    if options.compare:
        table = markdown(FILES, compare(options.folder))
        print(table)
        if options.markdown:
            between_markers(options.markdown, "candidate files", table)
        return 0
    if not options.judge:
        print(*write(options.folder).values(), sep="\n")
        return 0
    rows, right = judge(options.folder, options.recipe)
    summary = f"{right} of {len(rows)} judged rightly"
    if options.markdown:
        between_markers(options.markdown, "candidates", f"{markdown(HEAD, rows)}\n\n{summary}.")
    print(summary)
    return 0 if right == len(rows) else 1


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
