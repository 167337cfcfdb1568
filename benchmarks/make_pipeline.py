"""Make a whole Qwen-Image-Edit with random weights and a LoRA for it: ``python -m benchmarks.make_pipeline OUT``.

Configurations are the published ones, classes and initialisation diffusers' and transformers' own, in bfloat16: normal
weights of one size for all tensors, norms too, would end in infinities. The decoder's last layer is scaled so that a
picture has contrast and is not clipped. Tokenizer, scheduler and processor are pocket's, with the real picture sizes.
With fewer than 60 blocks the text encoder is small too: two layers, and pocket's vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.make_checkpoint import Noise, make_lora, qwen_image_edit_config, tensor_shapes
from lora_fuse.machine import interrupts, progress, text

if TYPE_CHECKING:
    import torch

POCKET = Path(__file__).resolve().parents[1] / "pocket/model"
BLOCKS = 60
SHARD = "5GB"
SIDES = {"shortest_edge": 3136, "longest_edge": 12845056}  # pixels of a picture that the real processor takes
CONTRAST = 0.4  # standard deviation of a decoded picture, of which -1 to 1 are shown
RANK = 64
ALPHA = 8.0


def make_pipeline(out: Path, blocks: int = BLOCKS) -> None:
    """Write `out`/base, a pipeline, and `out`/lora/lora.safetensors; on a GPU if there is one.

    Raises:
        FileExistsError: `out`/base exists.
    """
    import torch

    base = out / "base"
    base.mkdir(parents=True)
    shutil.copy(POCKET / "model_index.json", base)
    for name in ("tokenizer", "scheduler", "processor"):
        shutil.copytree(POCKET / name, base / name)
    processor = base / "processor/preprocessor_config.json"
    settings = json.loads(processor.read_text(encoding="utf-8"))
    settings |= {"min_pixels": SIDES["shortest_edge"], "max_pixels": SIDES["longest_edge"], "size": SIDES}
    processor.write_text(json.dumps(settings), encoding="utf-8")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = qwen_image_edit_config(blocks)
    parts: dict[str, Callable[[], Any]] = {
        "transformer": lambda: _transformer(config, device),
        "text_encoder": lambda: _text_encoder(device, small=blocks < BLOCKS),
        "vae": lambda: _vae(device),
    }
    for name, make in parts.items():
        clock = progress.Stopwatch()
        part = make()
        part.save_pretrained(base / name, max_shard_size=SHARD)
        size = sum(path.stat().st_size for path in (base / name).iterdir())
        text.say(f"{name}: {progress.human_bytes(size)} in {progress.human_seconds(clock.seconds)}")
        del part
    torch.set_default_dtype(torch.float32)
    (out / "lora").mkdir()
    make_lora(out / "lora/lora.safetensors", tensor_shapes(config), RANK, ALPHA, Noise(1))


def _transformer(config: dict[str, Any], device: torch.device) -> Any:
    import torch
    from diffusers import QwenImageTransformer2DModel

    with device:
        return QwenImageTransformer2DModel.from_config(config).to(torch.bfloat16)


def _text_encoder(device: torch.device, *, small: bool) -> Any:
    """Qwen2.5-VL of 7 billion parameters; a small one has the same width, which the transformer expects."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = json.loads((POCKET / "text_encoder/config.json").read_text(encoding="utf-8"))
    config |= {"dtype": "bfloat16", "tie_word_embeddings": False}
    words = config["text_config"]
    layers = 2 if small else 28
    words |= {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
    words |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers, "tie_word_embeddings": False}
    words |= {"intermediate_size": 18944} | ({} if small else {"vocab_size": 152064})
    words["rope_parameters"]["mrope_section"] = [16, 24, 24]
    vision = config["vision_config"]
    vision |= {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    vision |= {"depth": 2, "fullatt_block_indexes": [1]} if small else {}
    vision |= {} if small else {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]}
    with device:
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).to(torch.bfloat16)


def _vae(device: torch.device) -> Any:
    import torch
    from diffusers import AutoencoderKLQwenImage

    with device:
        vae = AutoencoderKLQwenImage().to(torch.bfloat16)
    side = 64 if device.type == "cuda" else 16  # of latents; an eighth of the picture's
    with torch.no_grad():
        for _ in range(3):  # the decoder is not linear in its last layer: clipping follows it
            latents = torch.randn(1, 16, 1, side, side, device=device, dtype=torch.bfloat16)
            contrast = float(vae.decode(latents, return_dict=False)[0].float().std())
            vae.decoder.conv_out.weight.mul_(CONTRAST / max(contrast, 1e-6))
    return vae


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_pipeline", description="a model to measure")
    parser.add_argument("out", type=Path, help="folder for base/ and lora/")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="transformer blocks (default: all 60, 57.7 GB)")
    options = parser.parse_args()
    if (options.out / "base").exists():
        parser.error(f"{options.out / 'base'} exists; remove it or name another folder")
    make_pipeline(options.out, options.blocks)


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
