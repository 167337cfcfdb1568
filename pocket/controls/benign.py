"""What the gate has to let through: the same merge, made, stored, loaded or run in another way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_fuse.pictures import pairs, picture, render
from pocket.controls import files, pictures
from pocket.controls.control import Built, Control
from pocket.controls.rig import Rig

if TYPE_CHECKING:
    from collections.abc import Iterator

STORED = "float16"  # the dtype of the pocket model's files
SMALL = "1MB"  # a shard


def _again(rig: Rig, folder: Path) -> Built:
    return rig.built(rig.merge(folder / "merged"))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _within(context: Callable[[], AbstractContextManager[None]], rig: Rig, _: Path) -> Built:
    pipe = rig.load(rig.right)
    with context():
        return Built(rig.right, rig.render(pipe))


def _reloaded(rig: Rig, folder: Path) -> Built:
    """Nothing is shared: what diffusers wrote is loaded whole."""
    render.load_pipeline(rig.right, rig.setup.pipeline, dtype=STORED).save_pretrained(folder)
    pipe = render.load_pipeline(folder, rig.setup.pipeline, dtype=rig.setup.dtype)
    return Built(folder, rig.render(pipe), same_files=False)


def _resharded(rig: Rig, folder: Path) -> Built:
    merged = rig.merge(folder / "merged")
    transformer = render.load_pipeline(merged, rig.setup.pipeline, dtype=STORED).transformer
    shutil.rmtree(merged / "transformer")
    transformer.save_pretrained(merged / "transformer", max_shard_size=SMALL)
    return rig.built(merged, same_files=False)


def _other_metadata(rig: Rig, folder: Path) -> Built:
    merged = rig.merge(folder / "merged")
    for path in (merged / "transformer").glob("*.safetensors"):
        files.rewrite(path, lambda tensors: tensors, files.read_metadata(path) | {"note": "of another day"})
    return rig.built(merged)


def _index_rewritten(rig: Rig, folder: Path) -> Built:
    merged = rig.merge(folder / "merged")
    index = merged / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    index.unlink()
    index.write_text(json.dumps(dict(reversed(content.items())), indent=None), encoding="utf-8")
    return rig.built(merged)


def _elsewhere(rig: Rig, folder: Path) -> Built:
    return rig.built(rig.merge(folder / "über uns" / "a b.c" / "merged"))


def _lora_file(write: Callable[[Path, Path], Path], rig: Rig, folder: Path) -> Built:
    """Fused from another file that means the same; the unfused side reads that file too."""
    plan = rig.plan(write(rig.lora, folder / "lora.safetensors"))
    pipe = rig.load(rig.merge(folder / "merged", plan))
    beside = pairs.render_references(plan, rig.cases, rig.setup, rig.shared)
    return Built(folder / "merged", rig.render(pipe), references=beside)


def _in_peft_names(lora: Path, out: Path) -> Path:
    return files.copy_of(lora, out, files.in_peft_names, files.peft_metadata(lora))


def _alpha_folded(lora: Path, out: Path) -> Path:
    return files.copy_of(lora, out, files.alpha_folded)


def _in_float32(lora: Path, out: Path) -> Path:
    return files.copy_of(lora, out, lambda tensors: {name: tensor.float() for name, tensor in tensors.items()})


def _repainted(change: Callable[[picture.Levels], picture.Levels], rig: Rig, _: Path) -> Built:
    return Built(rig.right, [pictures.changed(one, change) for one in rig.render(rig.load(rig.right))])


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
    return Built(rig.right, rig.render(rig.load(rig.right), rig.cases[::-1])[::-1])


def _warmed_up(rig: Rig, _: Path) -> Built:
    pipe = rig.load(rig.right)
    return Built(
        rig.right, [rig.render(pipe, [other, case])[1] for other, case in zip(rig.cases[::-1], rig.cases, strict=True)]
    )


BENIGN = (
    Control("again", "merged and rendered once more", _again),
    Control("1 thread", "instead of 2", partial(_within, _one_thread)),
    Control("other attention", "torch's MATH backend", partial(_within, lambda: sdpa_kernel(SDPBackend.MATH))),
    Control("saved by diffusers", "the whole pipeline, loaded and saved in float16", _reloaded),
    Control("resharded", f"the transformer in shards of {SMALL}", _resharded),
    Control("header", "other metadata in the shards", _other_metadata),
    Control("model_index.json", "other order and spaces", _index_rewritten),
    Control("other path", "with spaces, dots and an umlaut", _elsewhere),
    Control("PEFT names", "the LoRA as diffusers writes it", partial(_lora_file, _in_peft_names)),
    Control("alpha folded", "alpha / rank is multiplied into lora_up", partial(_lora_file, _alpha_folded)),
    Control("LoRA backwards", "its tensors in the opposite order", partial(_lora_file, files.backwards)),
    Control("LoRA in float32", "the same values, stored wider", partial(_lora_file, _in_float32)),
    Control("noise", "3% of the values one level up or down", partial(_repainted, pictures.noise)),
    Control("PNG", "saved with other compression", partial(_repainted, pictures.reencoded)),
    Control("VAE slicing, tiling", "on; the pictures are smaller than a tile", _sliced),
    Control("cases backwards", "rendered in the opposite order", _backwards),
    Control("warm-up", "after a picture of the other case", _warmed_up),
)
