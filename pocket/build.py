"""Write the pocket checkpoint, its LoRA and its drawn input pictures: ``python -m pocket.build [--check] [OUT]``."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from safetensors.torch import save_file

from lora_fuse.render import quiet_libraries
from pocket import drawings

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent
LORA = Path("lora/pocket-lightning-4steps.safetensors")
SHARD_SIZE = "120KB"  # half the transformer and a bit: two shards

MODEL_INDEX = {
    "_class_name": "QwenImageEditPipeline",
    "processor": ["transformers", "Qwen2VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}

# Say which library wrote a file: true of the build, not of the model.
VERSION_KEYS = {"_diffusers_version", "transformers_version"}


def build(out: Path) -> None:
    """Write ``model/``, ``lora/`` and the drawn ``inputs/`` under `out`; other files there stay."""
    quiet_libraries()
    from pocket import model  # imports diffusers and transformers, which must be quiet first

    folder = out / "model"
    words = model.tokenizer()
    transformer = model.transformer()
    transformer.save_pretrained(folder / "transformer", max_shard_size=SHARD_SIZE)
    model.vae().save_pretrained(folder / "vae")
    model.text_encoder(words).save_pretrained(folder / "text_encoder")
    model.scheduler().save_pretrained(folder / "scheduler")
    words.save_pretrained(folder / "tokenizer")
    # The parts, not a Qwen2VLProcessor: that one cannot be made without torchvision, and with it writes more files.
    words.save_pretrained(folder / "processor")
    model.image_processor().save_pretrained(folder / "processor")
    video = {"video_processor_type": "Qwen2VLVideoProcessor"}  # looked for where torchvision is installed
    _write_json(folder / "processor" / "video_preprocessor_config.json", video)
    _write_json(folder / "model_index.json", MODEL_INDEX)
    _forget_versions(folder)
    (out / LORA).parent.mkdir(parents=True, exist_ok=True)
    save_file(model.lora(transformer), out / LORA)
    drawings.draw_inputs(out / "inputs")


def _forget_versions(folder: Path) -> None:
    for path in sorted(folder.rglob("*.json")):
        _write_json(path, _without_versions(json.loads(path.read_text(encoding="utf-8"))))


def _without_versions(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_versions(item) for key, item in value.items() if key not in VERSION_KEYS}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    """Sha256 of every file under ``model/`` and ``lora/`` and of the drawn inputs, by POSIX path.

    A picture is hashed by its pixels: the bytes of a PNG depend on the zlib that packed it.
    """
    files = [path for part in ("model", "lora") for path in (folder / part).rglob("*") if path.is_file()]
    drawn = [path for name in drawings.DRAWINGS if (path := folder / "inputs" / name).is_file()]
    return {path.relative_to(folder).as_posix(): _digest(path) for path in [*files, *drawn]}


def _digest(path: Path) -> str:
    if path.suffix != ".png":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with Image.open(path) as picture:
        return hashlib.sha256(f"{picture.mode}{picture.size}".encode() + picture.tobytes()).hexdigest()


def first_difference(built: Path, kept: Path) -> str | None:
    """The first file, by name, that only one of the folders has or whose content differs; None if all agree."""
    want, have = digests(built), digests(kept)
    return next((name for name in sorted(want | have) if want.get(name) != have.get(name)), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, or compare a fresh build with what is there; the exit status is 1 if they differ."""
    parser = argparse.ArgumentParser(prog="python -m pocket.build", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=HERE, metavar="OUT", help="default: the package itself")
    parser.add_argument("--check", action="store_true", help="write nothing; compare OUT with a fresh build")
    options = parser.parse_args(arguments)
    if not options.check:
        build(options.out)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        name = first_difference(Path(folder), options.out)
    if name:
        print(f"{name} in {options.out} is not what pocket.build writes: build it again", file=sys.stderr)
    return int(name is not None)


if __name__ == "__main__":
    sys.exit(main())
