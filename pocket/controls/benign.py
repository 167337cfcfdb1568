"""Changes that the gate has to let through: the same merge, made, stored, loaded or run in another way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_fuse.pictures import render
from pocket.controls import files, pictures
from pocket.controls.control import Control
from pocket.controls.rig import Built, Rig

STORED = "float16"  # the dtype of the pocket model's files
SMALL = "1MB"  # a shard


def _one_thread(rig: Rig, _: Path) -> Built:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return rig.rerendered()
    finally:
        torch.set_num_threads(before)


def _other_attention(rig: Rig, _: Path) -> Built:
    with sdpa_kernel(SDPBackend.MATH):
        return rig.rerendered()


def _reloaded(rig: Rig, folder: Path) -> Built:
    """Share nothing: load whole what diffusers wrote."""
    render.load_pipeline(rig.right, rig.setup.pipeline, dtype=STORED).save_pretrained(folder)
    pipe = render.load_pipeline(folder, rig.setup.pipeline, dtype=rig.setup.dtype)
    return Built(folder, rig.render(pipe), same_files=False)


def _resharded(rig: Rig, folder: Path) -> Built:
    merged = rig.merge(folder)
    transformer = render.load_pipeline(merged, rig.setup.pipeline, dtype=STORED).transformer
    shutil.rmtree(merged / "transformer")
    transformer.save_pretrained(merged / "transformer", max_shard_size=SMALL)
    return rig.built(merged, same_files=False)


def _other_metadata(rig: Rig, folder: Path) -> Built:
    merged = rig.merge(folder)
    for path in (merged / "transformer").glob("*.safetensors"):
        files.rewrite(path, metadata=files.read_metadata(path) | {"note": "of another day"})
    return rig.built(merged)


def _index_rewritten(rig: Rig, folder: Path) -> Built:
    merged = rig.merge(folder)
    index = merged / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    index.unlink()
    index.write_text(json.dumps(dict(reversed(content.items())), indent=None), encoding="utf-8")
    return rig.built(merged)


def _lora_file(write: Callable[[Path, Path], object], rig: Rig, folder: Path) -> Built:
    """Fuse another file that means the same; the unfused side reads that file too."""
    lora = folder / "lora.safetensors"
    write(rig.lora, lora)
    plan = rig.plan(lora)
    merged = rig.merge(folder, plan)
    return Built(merged, rig.render(rig.load(merged)), references=rig.references(plan))


def _in_peft_names(lora: Path, out: Path) -> None:
    files.copy_of(lora, out, files.in_peft_names, files.peft_metadata(lora))


def _sliced(rig: Rig, _: Path) -> Built:
    pipe = rig.load(rig.right)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    try:
        return Built(rig.right, rig.render(pipe))
    finally:  # the VAE is everybody's
        pipe.vae.disable_slicing()
        pipe.vae.disable_tiling()


def _backwards(rig: Rig, _: Path) -> Built:
    return Built(rig.right, rig.rerendered(rig.cases[::-1]).pictures[::-1])


def _warmed_up(rig: Rig, _: Path) -> Built:
    pipe = rig.load(rig.right)
    turned = zip(rig.cases[::-1], rig.cases, strict=True)
    return Built(rig.right, [rig.render(pipe, [other, case])[1] for other, case in turned])


BENIGN = (
    Control("again", "merged and rendered once more", Rig.fused),
    Control("1 thread", "instead of 2", _one_thread),
    Control("other attention", "torch's MATH backend", _other_attention),
    Control("saved by diffusers", "the whole pipeline, loaded and saved in float16", _reloaded),
    Control("resharded", f"the transformer in shards of {SMALL}", _resharded),
    Control("header", "other metadata in the shards", _other_metadata),
    Control("model_index.json", "other order and spaces", _index_rewritten),
    Control(
        "other path", "with spaces, dots and an umlaut", lambda rig, folder: rig.fused(folder / "über uns" / "a b.c")
    ),
    Control("PEFT names", "the LoRA as diffusers writes it", partial(_lora_file, _in_peft_names)),
    Control(
        "alpha folded",
        "alpha / rank is multiplied into lora_up",
        partial(_lora_file, partial(files.copy_of, change=files.alpha_folded)),
    ),
    Control("LoRA backwards", "its tensors in the opposite order", partial(_lora_file, files.backwards)),
    Control(
        "LoRA in float32",
        "the same values, stored wider",
        partial(_lora_file, partial(files.copy_of, change=files.in_float32)),
    ),
    Control("noise", "3% of the values one level up or down", lambda rig, _: rig.repainted(pictures.noise)),
    Control("PNG", "saved with other compression", lambda rig, _: rig.repainted(pictures.reencoded)),
    Control("VAE slicing, tiling", "on; the pictures are smaller than a tile", _sliced),
    Control("cases backwards", "rendered in the opposite order", _backwards),
    Control("warm-up", "after a picture of the other case", _warmed_up),
)
